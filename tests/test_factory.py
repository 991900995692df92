"""The factories: which class a name selects, defaults, and how wrong arguments are refused."""

from __future__ import annotations

import warnings

import pytest
import torch

from dilated_attention_pytorch import (
    DilatedAttention,
    PatternCache,
    RingDilatedAttentionV2,
    create_dilated_attention,
    create_multihead_dilated_attention,
    dilated_attention,
)
from tests.conftest import make_qkv

CLASSES = {
    "standard": DilatedAttention,
    "ring": RingDilatedAttentionV2,
    "auto": RingDilatedAttentionV2,
}


def test_the_documented_call_selects_v2():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        attention = create_multihead_dilated_attention(
            "ring",
            embed_dim=768,
            num_heads=12,
            segment_lengths=[2048, 4096],
            dilation_rates=[1, 2],
        )
    assert type(attention.attention) is RingDilatedAttentionV2
    x = torch.randn(1, 100, 768, generator=torch.Generator().manual_seed(0))
    out, weights = attention(x)
    assert out.shape == x.shape and weights is None and torch.isfinite(out).all()


@pytest.mark.parametrize("name", CLASSES)
def test_names_select_classes(name):
    assert type(create_dilated_attention(name)) is CLASSES[name]
    module = create_multihead_dilated_attention(name, embed_dim=32, num_heads=4)
    assert type(module.attention) is CLASSES[name]


def test_defaults():
    module = create_multihead_dilated_attention()
    assert (module.embed_dim, module.num_heads) == (768, 12)
    for attention in (module.attention, create_dilated_attention()):
        assert attention.scheme.segment_lengths == (2048, 4096, 8192)
        assert attention.scheme.dilation_rates == (1, 2, 4)
        assert type(attention) is RingDilatedAttentionV2


@pytest.mark.parametrize("name", CLASSES)
def test_options_reach_the_module(name):
    cache = PatternCache()
    options = {"head_offsets": "blocked", "padding": "zeros", "scale": 0.3, "pattern_cache": cache}
    q, k, v = make_qkv(40)
    module = create_dilated_attention(
        name, segment_lengths=[16, 32], dilation_rates=[1, 2], dropout=0.5, **options
    ).eval()
    expected = dilated_attention(q, k, v, [16, 32], [1, 2], **options)
    assert torch.equal(module(q, k, v), expected)
    assert module.dropout == 0.5 and cache.statistics().hits == 1


@pytest.mark.parametrize("name", CLASSES)
def test_options_reach_both_halves_of_the_multihead_module(name):
    cache = PatternCache()
    module = create_multihead_dilated_attention(
        name,
        32,
        4,
        [16, 32],
        [1, 2],
        num_kv_heads=2,
        bias=False,
        layer_norm_eps=0.25,
        gamma_init=0.0,
        dropout=0.5,
        head_offsets="blocked",
        padding="zeros",
        scale=0.3,
        device="cpu",
        dtype=torch.float64,
        pattern_cache=cache,
    )
    inner = module.attention
    assert (inner.dropout, inner.scale, inner.pattern_cache) == (0.5, 0.3, cache)
    assert (inner.scheme.head_offsets, inner.scheme.padding) == ("blocked", "zeros")
    assert module.k_proj.weight.shape == (16, 32) and module.q_proj.bias is None
    assert module.norm.eps == 0.25 and (module.v_proj.weight == 0).all()
    assert module.q_proj.weight.dtype == torch.float64
    without = create_multihead_dilated_attention(name, 32, 4, layer_norm=False)
    assert without.norm is None


def test_ring_options_reach_v2_within_the_multihead_module():
    module = create_multihead_dilated_attention("ring", 32, 4, use_pattern_cache=False, ring_size=1)
    assert module.attention.pattern_cache is False
    with pytest.raises(ValueError, match="ring_size must be None or 1"):
        create_multihead_dilated_attention("ring", 32, 4, ring_size=2)


@pytest.mark.parametrize("create", [create_dilated_attention, create_multihead_dilated_attention])
def test_unknown_arguments_are_named(create):
    with pytest.raises(
        TypeError, match=r"keyword arguments must be among .*, got \['lr', 'window'\]"
    ):
        create("ring", dropout=0.1, lr=1, window=2)
    with pytest.raises(TypeError, match=r"\['ring_size'\]"):
        create("standard", ring_size=1)


@pytest.mark.parametrize("create", [create_dilated_attention, create_multihead_dilated_attention])
def test_unknown_types_list_the_known_ones(create):
    with pytest.raises(ValueError, match=r"\['auto', 'standard', 'ring'\], got 'improved'"):
        create("improved")


@pytest.mark.parametrize("create", [create_dilated_attention, create_multihead_dilated_attention])
@pytest.mark.parametrize("name", ["segment_lengths", "dilation_rates"])
def test_one_list_without_the_other_is_refused(create, name):
    with pytest.raises(ValueError, match="must be given together"):
        create("ring", **{name: [1, 2]})
