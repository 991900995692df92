"""The modules: parameters, initialization, dropout, state, copies, and the two ring modules."""

from __future__ import annotations

import copy
import io
import pickle
import warnings

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from dilated_attention_pytorch import (
    DilatedAttention,
    MultiheadDilatedAttention,
    PatternCache,
    RingDilatedAttentionV2,
    RingDilatedAttentionV3,
    TieredPatternCache,
    default_pattern_cache,
    dilated_attention,
)
from tests.conftest import make_qkv

BRANCHES = ([16, 32], [1, 2])


def make_v3(*arguments, **options):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        return RingDilatedAttentionV3(*arguments, **options)


def make_multihead(**options):
    torch.manual_seed(0)
    options = {"dtype": torch.float64, **options}
    return MultiheadDilatedAttention(options.pop("embed_dim", 32), 4, *BRANCHES, **options)


def embedded(batch=2, seq_len=48, embed_dim=32, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, seq_len, embed_dim, generator=generator, dtype=torch.float64)


MAKERS = {"standard": DilatedAttention, "v2": RingDilatedAttentionV2, "v3": make_v3}


@pytest.fixture(params=MAKERS)
def make(request):
    return MAKERS[request.param]


@pytest.mark.parametrize("is_causal", [False, True])
def test_modules_are_the_function_with_settings(make, device, exact, is_causal):
    q, k, v = make_qkv(48, kv_heads=2, dtype=exact.dtype, device=device)
    options = {"head_offsets": "blocked", "scale": 0.2, "padding": "zeros"}
    expected = dilated_attention(q, k, v, *BRANCHES, is_causal=is_causal, **options)
    assert torch.equal(make(*BRANCHES, **options)(q, k, v, is_causal=is_causal), expected)


@pytest.mark.parametrize("maker", [RingDilatedAttentionV2, make_v3])
def test_ring_modules_take_is_causal_by_position(maker):
    q, k, v = make_qkv(48)
    expected = dilated_attention(q, k, v, *BRANCHES, is_causal=True)
    assert torch.equal(maker(*BRANCHES)(q, k, v, True), expected)


def test_v2_and_v3_agree_and_share_one_implementation():
    arguments = (*BRANCHES, 0.5, 1, "cpu", torch.float64, True)
    v2, v3 = RingDilatedAttentionV2(*arguments), make_v3(*arguments, False)
    inputs = make_qkv(48, requires_grad=True)
    results = []
    for module in (v2, v3):
        torch.manual_seed(7)
        out = module(*inputs)
        results.append((out, *torch.autograd.grad(out.square().sum(), inputs)))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    assert isinstance(v3, RingDilatedAttentionV2)


def test_v3_warns_at_construction_and_says_what_to_do():
    with pytest.warns(DeprecationWarning) as caught:
        RingDilatedAttentionV3(*BRANCHES, cache_on_gpu=True)
    assert len(caught) == 1 and caught[0].filename == __file__
    message = str(caught[0].message)
    assert "RingDilatedAttentionV3 is deprecated: use RingDilatedAttentionV2" in message
    assert "dilated_attention_pytorch.ring_dilated_attention_v2" in message
    assert "cache_on_gpu" in message


def test_v2_does_not_warn():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        RingDilatedAttentionV2(*BRANCHES)


def test_dropout_works_in_training_only(make):
    q, k, v = make_qkv(48)
    module = make(*BRANCHES, dropout=0.5)
    expected = dilated_attention(q, k, v, *BRANCHES)
    torch.manual_seed(0)
    assert not torch.equal(module(q, k, v), expected)
    torch.manual_seed(0)
    dropped = dilated_attention(q, k, v, *BRANCHES, dropout_p=0.5)
    torch.manual_seed(0)
    assert torch.equal(module(q, k, v), dropped)
    state = torch.get_rng_state()
    assert torch.equal(module.eval()(q, k, v), expected)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("ring_size", [0, 2, 4])
def test_more_than_one_process_is_refused(ring_size):
    with pytest.raises(ValueError, match=f"ring_size must be None or 1.*got {ring_size}"):
        RingDilatedAttentionV2(*BRANCHES, ring_size=ring_size)


def test_each_module_uses_the_cache_that_it_was_given(make):
    q, k, v = make_qkv(45)
    cache = PatternCache()
    before = default_pattern_cache().statistics()
    module = make(*BRANCHES, pattern_cache=cache)
    module(q, k, v)
    module(q, k, v)
    assert (cache.statistics().misses, cache.statistics().hits) == (1, 1)
    assert default_pattern_cache().statistics() == before


def test_v2_without_pattern_cache():
    q, k, v = make_qkv(45)
    before = default_pattern_cache().statistics()
    out = RingDilatedAttentionV2(*BRANCHES, use_pattern_cache=False)(q, k, v)
    assert default_pattern_cache().statistics() == before
    assert torch.equal(out, dilated_attention(q, k, v, *BRANCHES))
    with pytest.raises(ValueError, match="use_pattern_cache must be True"):
        RingDilatedAttentionV2(*BRANCHES, use_pattern_cache=False, pattern_cache=PatternCache())


def test_wrong_settings_fail_at_construction(make):
    for options, message in (
        ({"dropout": 1.0}, "dropout must be at least 0 and below 1, got 1.0"),
        ({"dropout": -0.5}, "dropout.*got -0.5"),
        ({"padding": "none"}, "padding must be"),
        ({"head_offsets": "spiral"}, "head_offsets must be"),
    ):
        with pytest.raises(ValueError, match=message):
            make(*BRANCHES, **options)
    with pytest.raises(ValueError, match="same length"):
        make([16], [1, 2])
    with pytest.raises(TypeError, match="segment_length"):
        make(*BRANCHES, segment_length=4)


@pytest.mark.parametrize(
    "duplicate", [copy.deepcopy, lambda module: pickle.loads(pickle.dumps(module))]
)
def test_copies_compute_the_same_and_share_no_cache(make, duplicate):
    q, k, v = make_qkv(48)
    module = make(*BRANCHES, head_offsets=[[0] * 4, [1, 0, 1, 0]], pattern_cache=PatternCache(9))
    expected = module(q, k, v)
    twin = duplicate(module)
    assert type(twin) is type(module) and twin.pattern_cache.max_entries == 9
    assert len(twin.pattern_cache) == 0 and len(module.pattern_cache) == 1
    assert torch.equal(twin(q, k, v), expected)


def test_extra_repr_shows_what_differs_from_the_default():
    assert repr(DilatedAttention(*BRANCHES)) == (
        "DilatedAttention(segment_lengths=[16, 32], dilation_rates=[1, 2])"
    )
    module = RingDilatedAttentionV2(
        *BRANCHES, 0.1, head_offsets="blocked", padding="zeros", scale=1.0
    )
    for part in ("head_offsets='blocked'", "padding='zeros'", "scale=1.0", "dropout=0.1"):
        assert part in repr(module)
    text = repr(make_multihead(num_kv_heads=2, gamma_init=0.5))
    for part in ("embed_dim=32, num_heads=4, num_kv_heads=2, gamma_init=0.5", "DilatedAttention("):
        assert part in text


# MultiheadDilatedAttention


@pytest.mark.parametrize("layer_norm", [False, True])
@pytest.mark.parametrize("num_kv_heads", [None, 2, 1])
def test_multihead_is_projections_around_the_function(layer_norm, num_kv_heads):
    module = make_multihead(
        layer_norm=layer_norm, num_kv_heads=num_kv_heads, head_offsets="blocked"
    )
    x, y, z = (embedded(seed=seed) for seed in range(3))
    out, weights = module(x, y, z, is_causal=True)
    kv_heads = num_kv_heads or 4
    assert module.k_proj.weight.shape == (kv_heads * 8, 32)
    heads = dilated_attention(
        module.q_proj(x).view(2, 48, 4, 8),
        module.k_proj(y).view(2, 48, kv_heads, 8),
        module.v_proj(z).view(2, 48, kv_heads, 8),
        *BRANCHES,
        head_offsets="blocked",
        is_causal=True,
    ).reshape(2, 48, 32)
    if layer_norm:
        heads = nn.functional.layer_norm(heads, (32,), module.norm.weight, module.norm.bias)
    assert weights is None
    torch.testing.assert_close(out, module.out_proj(heads))


def test_layer_norm_comes_before_the_output_projection():
    module, seen = make_multihead(layer_norm_eps=1e-12), []
    module.out_proj.register_forward_hook(lambda _, inputs, __: seen.append(inputs[0]))
    module(embedded())
    torch.testing.assert_close(seen[0].mean(-1), torch.zeros(2, 48, dtype=torch.float64))
    torch.testing.assert_close(
        seen[0].var(-1, unbiased=False), torch.ones(2, 48, dtype=torch.float64)
    )
    assert make_multihead(layer_norm=False).norm is None


def test_key_and_value_default_to_query_and_key():
    module = make_multihead()
    x, y = embedded(seed=1), embedded(seed=2)
    assert torch.equal(module(x)[0], module(x, x, x)[0])
    assert torch.equal(module(x, y)[0], module(x, y, y)[0])
    with pytest.raises(ValueError, match="key must be given where value is"):
        module(x, value=y)


def test_magneto_initialization():
    module = make_multihead(embed_dim=512, num_kv_heads=2, gamma_init=0.5)
    gains = {"q_proj": 1.0, "k_proj": 1.0, "v_proj": 0.5, "out_proj": 0.5}
    for name, gain in gains.items():
        projection = getattr(module, name)
        rows, columns = projection.weight.shape
        deviation = gain * (2 / (rows + columns)) ** 0.5
        # 131,072 samples or more: their deviation is within 0.2 % of the true one, one sigma.
        assert projection.weight.std().item() == pytest.approx(deviation, rel=0.01)
        assert projection.weight.mean().item() == pytest.approx(0, abs=deviation / 50)
        assert (projection.bias == 0).all()
    nn.init.ones_(module.norm.bias)
    module.reset_parameters()
    assert (module.norm.weight == 1).all() and (module.norm.bias == 0).all()


def test_parameters_follow_the_factory_arguments():
    module = make_multihead(bias=False, device="meta", dtype=torch.bfloat16)
    assert {name for name, _ in module.named_parameters()} == {
        "q_proj.weight",
        "k_proj.weight",
        "v_proj.weight",
        "norm.weight",
        "norm.bias",
        "out_proj.weight",
    }
    for parameter in module.parameters():
        assert parameter.device.type == "meta" and parameter.dtype == torch.bfloat16


def test_state_dict_round_trip():
    module, other = make_multihead(), make_multihead(gamma_init=3.0)
    x = embedded()
    assert not torch.equal(module(x)[0], other(x)[0])
    file = io.BytesIO()
    torch.save(module.state_dict(), file)
    file.seek(0)
    other.load_state_dict(torch.load(file, weights_only=True))
    assert torch.equal(module(x)[0], other(x)[0])


@pytest.mark.parametrize(
    "duplicate", [copy.deepcopy, lambda module: pickle.loads(pickle.dumps(module))]
)
def test_multihead_copies(duplicate):
    module, x = make_multihead(pattern_cache=PatternCache()), embedded()
    expected, _ = module(x)
    assert torch.equal(duplicate(module)(x)[0], expected)


def test_multihead_dropout_works_in_training_only():
    module, x = make_multihead(dropout=0.5), embedded()
    assert not torch.equal(module(x)[0], module(x)[0])
    module.eval()
    assert torch.equal(module(x)[0], make_multihead().eval()(x)[0])


def test_multihead_errors_name_the_argument():
    for arguments, options, message in (
        ((30, 4), {}, "embed_dim must be a multiple of num_heads, 4, got 30"),
        ((32, 0), {}, "num_heads must be at least 1 and below 2\\^16, got 0"),
        ((32, 4), {"num_kv_heads": 3}, "num_kv_heads must divide num_heads, 4, got 3"),
        ((32, 4), {"head_offsets": [[0], [0]]}, "each of the 4 heads, got 1"),
        ((32, 4), {"dropout": 2.0}, "dropout"),
    ):
        with pytest.raises(ValueError, match=message):
            MultiheadDilatedAttention(*arguments, *BRANCHES, **options)
    with pytest.raises(TypeError, match="num_heads must be an integer, got '4'"):
        MultiheadDilatedAttention(32, "4", *BRANCHES)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"query must be \[batch, seq_len, embed_dim = 32\]"):
        make_multihead()(embedded(embed_dim=16))
    with pytest.raises(ValueError, match=r"value must be .*got shape \(48, 32\)"):
        make_multihead()(embedded(), embedded(), embedded()[0])


def gradients(module, call):
    module.zero_grad()
    call().square().sum().backward()
    return [parameter.grad.clone() for parameter in module.parameters()]


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_multihead_compiles_without_graph_breaks(backend):
    module, x = make_multihead(head_offsets="blocked", num_kv_heads=2), embedded()
    expected = gradients(module, lambda: module(x, is_causal=True)[0])
    compiled = torch.compile(module, fullgraph=True, backend=backend)
    for actual, gradient in zip(
        gradients(module, lambda: compiled(x, is_causal=True)[0]), expected, strict=True
    ):
        torch.testing.assert_close(actual, gradient)


def test_multihead_under_activation_checkpointing():
    module, x = make_multihead(dropout=0.3), embedded()
    torch.manual_seed(2)
    expected = gradients(module, lambda: module(x)[0])
    torch.manual_seed(2)
    for actual, gradient in zip(
        gradients(module, lambda: checkpoint(module, x, use_reentrant=False)[0]),
        expected,
        strict=True,
    ):
        assert torch.equal(actual, gradient)


def test_multihead_under_autocast(device):
    module = make_multihead(dtype=torch.float32, device=device)
    x = embedded().float().to(device)
    expected, _ = module(x)
    with torch.autocast(device, dtype=torch.bfloat16):
        out, _ = module(x)
    assert out.dtype == torch.bfloat16
    # A handful of roundings to 8 bits (2^-9 relative each) on values of order 1.
    torch.testing.assert_close(out.float(), expected, atol=0.05, rtol=0.05)
    out.float().square().sum().backward()
    assert all(torch.isfinite(parameter.grad).all() for parameter in module.parameters())


def test_settings_are_checked_at_construction():
    with pytest.raises(TypeError, match="scale must be a number"):
        DilatedAttention([4], [1], scale="x")
    with pytest.raises(TypeError, match="pattern_cache must be"):
        DilatedAttention([4], [1], pattern_cache="x")
    with pytest.raises(ValueError, match="gamma_init must be at least 0 and finite, got -1"):
        MultiheadDilatedAttention(8, 4, [4], [1], gamma_init=-1)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"num_heads": True}, TypeError, "num_heads must be an integer, got True"),
        ({"embed_dim": True}, TypeError, "embed_dim must be an integer, got True"),
        ({"num_kv_heads": True}, TypeError, "num_kv_heads must be an integer, got True"),
        ({"gamma_init": float("inf")}, ValueError, "gamma_init must be .* finite, got inf"),
        ({"gamma_init": float("nan")}, ValueError, "gamma_init must be .* finite, got nan"),
        ({"gamma_init": "x"}, TypeError, "gamma_init must be a number, got 'x'"),
        ({"layer_norm_eps": float("nan")}, ValueError, "layer_norm_eps must be .*, got nan"),
        ({"layer_norm_eps": -1}, ValueError, "layer_norm_eps must be at least 0.*got -1"),
        ({"layer_norm_eps": None}, TypeError, "layer_norm_eps must be a number, got None"),
        ({"scale": torch.ones(2)}, TypeError, "scale must be a number"),
    ],
)
def test_what_would_fail_in_forward_is_refused_at_construction(options, error, message):
    good = {"embed_dim": 32, "num_heads": 4, "segment_lengths": [8], "dilation_rates": [1]}
    with pytest.raises(error, match=message):
        MultiheadDilatedAttention(**{**good, **options})
    layer = MultiheadDilatedAttention(8, 4, [4], [1])
    with pytest.raises(TypeError, match="query must be a tensor, got str"):
        layer("x")


@pytest.mark.parametrize("form", [list, torch.tensor])
def test_announced_calls_find_their_patterns(device, form):
    cache = PatternCache()
    module = MultiheadDilatedAttention(
        32, 4, [16, 32], [1, 2], num_kv_heads=2, pattern_cache=cache, device=device
    )
    module.prefetch(form([50, 51]), device, is_causal=True)
    cache.drain()
    for n in (50, 51):
        module(torch.randn(1, n, 32, device=device), is_causal=True)
    assert (cache.statistics().hits, cache.statistics().misses) == (2, 0)
    with pytest.raises(ValueError, match="seq_len"):
        module.prefetch([-1], device)
    module.attention = torch.nn.Identity()
    with pytest.raises(TypeError, match="attention must be a DilatedAttention"):
        module.prefetch([50], device)


@pytest.mark.parametrize("cache", [PatternCache, TieredPatternCache])
def test_announced_batches_find_their_patterns(cache, device):
    patterns = cache()
    module = MultiheadDilatedAttention(
        32, 4, *BRANCHES, num_kv_heads=2, pattern_cache=patterns, device=device
    )
    x = torch.randn(3, 50, 32, device=device)
    left = [(20, 30), (0, 50), (50, 0)]
    packed = torch.nested.nested_tensor([x[0, :9], x[1, :40]], layout=torch.jagged)
    calls = (
        (([50, 7, 0], 50), lambda: module(x, seq_lens=[50, 7, 0])),
        ((torch.tensor(left), 50), lambda: module(x, seq_lens=left)),
        (([50, 50, 50], 50), lambda: module(x, seq_lens=[50, 50, 50])),
        (([9, 40], None), lambda: module(packed)),
    )
    for (seq_lens, seq_len), call in calls:
        module.prefetch_batch(seq_lens, device, seq_len=seq_len)
        patterns.drain()
        before = patterns.statistics()
        call()
        after = patterns.statistics()
        assert after.misses == before.misses and after.hits > before.hits
    module.attention = torch.nn.Identity()
    with pytest.raises(TypeError, match="attention must be a DilatedAttention"):
        module.prefetch_batch([50], device)
