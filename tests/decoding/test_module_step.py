"""Layers that decode through a cache: the numbers of one causal pass."""

from __future__ import annotations

import re
import sys
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import nn

from dilated_attention_pytorch import (
    DilatedAttention,
    DilatedKVCache,
    MultiheadDilatedAttention,
    RingDilatedAttentionV2,
)
from dilated_attention_pytorch.ring.sharding import Sharding


def make_layer(**options: Any) -> MultiheadDilatedAttention:
    torch.manual_seed(0)
    options = {"num_kv_heads": 2, "dtype": torch.float64, **options}
    return MultiheadDilatedAttention(32, 4, [8, 40], [1, 3], **options).eval()


@pytest.mark.parametrize(
    "options",
    [{}, {"head_offsets": "blocked", "scale": 0.2, "padding": "zeros"}, {"dropout": 0.5}],
)
@torch.no_grad()
def test_a_layer_with_a_cache_is_the_layer_on_the_whole_text(options: dict[str, Any]) -> None:
    layer = make_layer(**options)
    x = torch.randn(2, 70, 32, dtype=torch.float64)
    cache = layer.make_kv_cache(2)
    parts = [layer(part, is_causal=True, kv_cache=cache)[0] for part in x.split([30] + 40 * [1], 1)]
    expected, _ = layer(x, is_causal=True)
    torch.testing.assert_close(torch.cat(parts, 1), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("before", [False, True])
@torch.no_grad()
def test_texts_of_a_batch_have_lengths_of_their_own(before: bool) -> None:
    """A prompt padded on either side, then steps that some texts sit out."""
    layer = make_layer()
    texts = [torch.randn(1, n, 32, dtype=torch.float64) for n in (60, 41, 52)]
    expected = [layer(text, is_causal=True)[0] for text in texts]
    cache = layer.make_kv_cache(3)
    begins, sizes = [0, 0, 0], [30, 11, 0]
    while any(begin < text.shape[1] for begin, text in zip(begins, texts, strict=True)):
        n = max(sizes) + 2
        x = torch.full((3, n, 32), torch.nan, dtype=torch.float64)
        mask = torch.ones(3, n, dtype=torch.bool)
        places = [slice(n - size, n) if before else slice(0, size) for size in sizes]
        for b, (begin, size, rows) in enumerate(zip(begins, sizes, places, strict=True)):
            x[b, rows], mask[b, rows] = texts[b][0, begin : begin + size], False
        out, _ = layer(x, key_padding_mask=mask, is_causal=True, kv_cache=cache)
        for b, (begin, size, rows) in enumerate(zip(begins, sizes, places, strict=True)):
            wanted = expected[b][0, begin : begin + size]
            torch.testing.assert_close(out[b, rows], wanted, rtol=0, atol=1e-12)
        assert torch.all(out[mask] == 0)
        begins = [begin + size for begin, size in zip(begins, sizes, strict=True)]
        left = [text.shape[1] - begin for begin, text in zip(begins, texts, strict=True)]
        sizes = [min(more, size) for more, size in zip(left, (1, 3, 1), strict=True)]
    assert cache.lengths == (60, 41, 52)


def test_make_kv_cache_fits_the_layer() -> None:
    cache = make_layer(dtype=torch.float32).make_kv_cache(3, max_seq_len=20, dtype=torch.bfloat16)
    assert (cache.batch_size, cache.num_kv_heads, cache.num_heads, cache.head_dim) == (3, 2, 4, 8)
    assert (cache.max_seq_len, cache.dtype) == (20, torch.bfloat16)


@pytest.mark.parametrize(
    ("options", "call", "said"),
    [
        ({}, {"kv_cache": 3}, "kv_cache must be a DilatedKVCache, got int"),
        ({}, {"is_causal": False}, "is_causal must be True where kv_cache is given, got False"),
        (
            {"dropout": 0.5},
            {},
            "dropout must be 0, or the module in evaluation mode, where kv_cache",
        ),
        (
            {"lengths": [8, 41]},
            {},
            "kv_cache must have the module's segment_lengths, (8, 41), got (",
        ),
        (
            {"rates": [1, 2]},
            {},
            "kv_cache must have the module's dilation_rates, (1, 2), got (1, 3)",
        ),
        ({"head_offsets": "blocked"}, {}, "kv_cache must have the module's head_offsets, ((0, 0"),
        ({}, {"query": torch.zeros(1, 3, 4, 8)}, "query must be [1, 2, 4, 8]"),
        ({}, {"seq_lens": [3]}, "seq_lens must end at seq_len, 2, or before, got 3"),
        ({"group": "g"}, {}, "kv_cache must be None where the module has a group"),
    ],
)
def test_what_does_not_fit_a_cache_is_refused(
    options: dict[str, Any], call: dict[str, Any], said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    lengths, rates = options.pop("lengths", [8, 40]), options.pop("rates", [1, 3])
    group = options.pop("group", None)
    module = DilatedAttention(lengths, rates, **options)
    if group is not None:
        module.sharding = group
        monkeypatch.setattr(sys.modules[DilatedAttention.__module__], "telling", nullcontext)
    x = torch.zeros(1, 2, 4, 8)
    cache = DilatedKVCache(1, 4, 8, [8, 40], [1, 3])
    with pytest.raises((TypeError, ValueError), match=re.escape(said)):
        module(**{"query": x, "key": x, "value": x, "is_causal": True, "kv_cache": cache, **call})
    assert cache.length == 0


def test_a_layer_with_a_group_makes_no_cache() -> None:
    layer = make_layer()
    layer.attention.sharding = Sharding("g", None, "auto")
    with pytest.raises(ValueError, match="attention must have no group where a cache is made, got"):
        layer.make_kv_cache(1)


def test_another_module_in_the_place_of_attention_is_refused() -> None:
    layer = make_layer()
    cache = layer.make_kv_cache(1)
    layer.attention = nn.Identity()
    x = torch.zeros(1, 2, 32, dtype=torch.float64)
    for call in (lambda: layer(x, is_causal=True, kv_cache=cache), lambda: layer.make_kv_cache(1)):
        with pytest.raises(TypeError, match="attention must be a DilatedAttention, got Identity"):
            call()


def test_the_ring_module_takes_a_cache_as_well() -> None:
    x = torch.randn(1, 20, 4, 8, dtype=torch.float64)
    module = RingDilatedAttentionV2([8, 40], [1, 3])
    cache = DilatedKVCache(1, 4, 8, [8, 40], [1, 3], dtype=torch.float64)
    parts = [module(p, p, p, is_causal=True, kv_cache=cache) for p in x.split([9, 1, 10], 1)]
    expected = module(x, x, x, is_causal=True)
    torch.testing.assert_close(torch.cat(parts, 1), expected, rtol=0, atol=1e-12)
