"""The function: against the dense reference, its options, its errors, and under PyTorch's tools."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.utils.checkpoint import checkpoint

from dilated_attention_pytorch import (
    _C,
    DilatedAttention,
    PatternCache,
    default_pattern_cache,
    dilated_attention,
    head_group_offsets,
)
from dilated_attention_pytorch.pattern.offsets import offset_table
from tests.conftest import make_qkv
from tests.reference import blocked_table, dropout_keep, reference_attention

LISTS = {"segment_lengths": [8, 16], "dilation_rates": [1, 2]}
BRANCHES = ([16, 32, 96], [1, 2, 4])
TABLE = [[0, -1, 0, 0], [1, 0, -1, 1], [3, 2, -1, -1]]
OFFSETS = {
    "interleaved": ("interleaved", None),
    "blocked": ("blocked", blocked_table(BRANCHES[1], 4)),
    "list": (TABLE, torch.tensor(TABLE)),
    "tensor": (torch.tensor(TABLE, dtype=torch.int32), torch.tensor(TABLE)),
}


def assert_near(actual, expected, tolerance):
    torch.testing.assert_close(actual.cpu().double(), expected, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("padding", ["masked", "zeros"])
@pytest.mark.parametrize("offsets", OFFSETS)
def test_equals_the_reference(device, exact, offsets, padding, is_causal):
    given, table = OFFSETS[offsets]
    q, k, v = make_qkv(70, kv_heads=2, batch=2, dtype=exact.dtype, device=device)
    options = {"padding": padding, "is_causal": is_causal, "scale": 0.3}
    out, lse = dilated_attention(q, k, v, *BRANCHES, head_offsets=given, return_lse=True, **options)
    expected, expected_lse = reference_attention(q, k, v, *BRANCHES, head_offsets=table, **options)
    assert_near(out, expected, exact.forward)
    assert_near(lse, expected_lse, exact.forward)


def test_gradients_equal_the_reference_through_out_and_lse(device, exact):
    inputs = make_qkv(50, dtype=exact.dtype, device=device, requires_grad=True)
    twins = [x.detach().cpu().double().requires_grad_() for x in inputs]
    out, lse = dilated_attention(*inputs, *BRANCHES, return_lse=True)
    (out.square().sum() + lse.sin().sum()).backward()
    expected, expected_lse = reference_attention(*twins, *BRANCHES)
    (expected.square().sum() + expected_lse.sin().sum()).backward()
    for actual, twin in zip(inputs, twins, strict=True):
        assert_near(actual.grad, twin.grad, exact.backward)


def test_causal_output_ignores_the_future(device, exact):
    q, k, v = make_qkv(96, dtype=exact.dtype, device=device)
    before = dilated_attention(q, k, v, *BRANCHES, is_causal=True)
    v[:, 80:] += 1e3
    k[:, 80:] *= -2
    after = dilated_attention(q, k, v, *BRANCHES, is_causal=True)
    assert torch.equal(before[:, :80], after[:, :80])
    assert not torch.equal(before[:, 80:], after[:, 80:])


def test_a_query_in_no_branch_gets_zeros_and_minus_infinity(device, exact):
    q, k, v = make_qkv(24, dtype=exact.dtype, device=device)
    out, lse = dilated_attention(q, k, v, [8], [2], head_offsets=[[0] * 4], return_lse=True)
    assert lse.shape == (1, 4, 24)
    assert (out[:, 1::2] == 0).all() and (lse[:, :, 1::2] == -torch.inf).all()
    assert (out[:, ::2] != 0).any(-1).all() and torch.isfinite(lse[:, :, ::2]).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_out_has_the_dtype_of_query_and_lse_is_float32(device, dtype):
    q, k, v = make_qkv(40, dtype=dtype, device=device)
    out, lse = dilated_attention(q, k, v, *BRANCHES, return_lse=True)
    assert out.dtype == dtype and lse.dtype == torch.float32
    expected, _ = reference_attention(q, k, v, *BRANCHES)
    assert_near(out, expected, 4 * torch.finfo(dtype).eps)


@pytest.mark.parametrize("rates", [[1, 2, 4], [3, 5], [16]])
@pytest.mark.parametrize("heads", [1, 4, 6])
def test_named_offsets_are_the_planners(rates, heads):
    for name, planned in (
        ("interleaved", _C.interleaved_offsets),
        ("blocked", _C.blocked_offsets),
    ):
        expected = tuple(tuple(planned(rate, heads)) for rate in rates)
        assert offset_table(name, rates, heads) == expected


def test_head_groups():
    table = head_group_offsets([1, 2, 4, 6, 12], 12)
    groups = [[h for h in range(12) if row[h] >= 0] for row in table]
    assert groups == [[0, 1, 2], [3, 4, 5], [6, 7], [8, 9], [10, 11]]
    assert [row[group[0]] for row, group in zip(table, groups, strict=True)] == [0, 1, 2, 3, 4]
    assert head_group_offsets([1, 1, 2], 3)[2] == (-1, -1, 0)  # 2 mod 2
    with pytest.raises(ValueError, match="heads must be at least the number of branches.*got 2"):
        head_group_offsets([1, 2, 4], 2)
    with pytest.raises(ValueError, match="dilation_rates must be positive"):
        head_group_offsets([1, 0], 2)


def test_head_groups_attend_within_their_branch():
    q, k, v = make_qkv(64, heads=3)
    out = dilated_attention(q, k, v, [8, 64], [1, 2], head_offsets=head_group_offsets([1, 2], 3))
    local = dilated_attention(q[:, :, :2], k[:, :, :2], v[:, :, :2], [8], [1])
    assert torch.equal(out[:, :, :2], local)
    assert (out[:, 0::2, 2] == 0).all() and (out[:, 1::2, 2] != 0).all()  # offset 1 mod 2


def test_dropout_follows_torchs_generator_and_the_documented_hash(device, exact):
    q, k, v = make_qkv(48, dtype=exact.dtype, device=device, batch=2)
    torch.manual_seed(3)
    out = dilated_attention(q, k, v, *BRANCHES, dropout_p=0.375)
    torch.manual_seed(3)
    again = dilated_attention(q, k, v, *BRANCHES, dropout_p=0.375)
    other = dilated_attention(q, k, v, *BRANCHES, dropout_p=0.375)
    torch.manual_seed(3)
    seed = int(torch.randint(2**63 - 1, (1,), device=device))
    keep = dropout_keep(seed, 0.375, 2, 4, (0, 48), (0, 48))
    expected, _ = reference_attention(q, k, v, *BRANCHES, keep=keep, dropout_p=0.375)
    assert_near(out, expected, exact.forward)
    assert torch.equal(out, again) and not torch.equal(out, other)


def test_no_cache_gives_the_same_and_touches_no_cache():
    q, k, v = make_qkv(61)
    cache = PatternCache()
    default = default_pattern_cache().statistics()
    without = dilated_attention(q, k, v, *BRANCHES, head_offsets="blocked", pattern_cache=False)
    cached = dilated_attention(q, k, v, *BRANCHES, head_offsets="blocked", pattern_cache=cache)
    assert torch.equal(without, cached)
    assert default_pattern_cache().statistics() == default
    assert cache.statistics().misses == 1


def test_the_default_cache_is_used_where_none_is_given():
    q, k, v = make_qkv(61)
    dilated_attention(q, k, v, *BRANCHES)
    before = default_pattern_cache().statistics()
    dilated_attention(q, k, v, *BRANCHES)
    assert default_pattern_cache().statistics().hits == before.hits + 1


def test_inference_with_grouped_heads_plans_for_the_forward_pass_alone():
    q, k, v = make_qkv(61, 4, kv_heads=2, requires_grad=True)
    cache = PatternCache()
    with torch.no_grad():
        inferred = dilated_attention(q, k, v, *BRANCHES, pattern_cache=cache)
    least = cache.statistics().bytes
    trained = dilated_attention(q, k, v, *BRANCHES, pattern_cache=cache)
    assert cache.statistics().misses == 2 and cache.statistics().bytes > 2 * least + 100
    assert torch.equal(inferred, trained)
    trained.sum().backward()


def test_one_table_serves_training_and_inference_without_grouped_heads():
    q, k, v = make_qkv(61)
    cache = PatternCache()
    with torch.no_grad():
        dilated_attention(q, k, v, *BRANCHES, pattern_cache=cache)
    dilated_attention(q, k, v, *BRANCHES, pattern_cache=cache)
    assert cache.statistics().misses == 1


def test_the_default_device_does_not_matter():
    q, k, v = make_qkv(53)
    expected = dilated_attention(q, k, v, *BRANCHES, head_offsets="blocked")
    with torch.device("meta"):
        for cache in (PatternCache(), False):
            out = dilated_attention(q, k, v, *BRANCHES, head_offsets="blocked", pattern_cache=cache)
            assert torch.equal(out, expected)


@pytest.mark.parametrize("offsets", ["interleaved", "blocked"])
def test_compiles_without_graph_breaks(device, exact, offsets):
    def loss(q, k, v):
        out, lse = dilated_attention(
            q, k, v, [16, 32], [1, 2], head_offsets=offsets, is_causal=True, return_lse=True
        )
        return out.square().sum() + lse.sum()

    inputs = make_qkv(48, dtype=exact.dtype, device=device, requires_grad=True)
    expected = torch.autograd.grad(loss(*inputs), inputs)
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    for actual, gradient in zip(
        torch.autograd.grad(compiled(*inputs), inputs), expected, strict=True
    ):
        torch.testing.assert_close(actual, gradient)


def test_compiles_with_dropout_and_dynamic_length():
    def attend(q, k, v):
        return dilated_attention(q, k, v, [16, 32], [1, 2], dropout_p=0.5)

    compiled = torch.compile(attend, fullgraph=True, dynamic=True, backend="aot_eager")
    for seq_len in (40, 48, 57):
        q, k, v = make_qkv(seq_len)
        torch.manual_seed(1)
        expected = attend(q, k, v)
        torch.manual_seed(1)
        assert torch.equal(compiled(q, k, v), expected)


def test_works_on_fake_tensors():
    q, k, v = make_qkv(40)
    with torch._subclasses.FakeTensorMode() as mode:
        fakes = [mode.from_tensor(x) for x in (q, k, v)]
        out, lse = dilated_attention(*fakes, *BRANCHES, head_offsets="blocked", return_lse=True)
    assert out.shape == q.shape and lse.shape == (1, 4, 40) and lse.dtype == torch.float64


def test_activation_checkpointing_repeats_the_dropout():
    inputs = make_qkv(48, requires_grad=True)

    def attend(q, k, v):
        return dilated_attention(q, k, v, *BRANCHES, dropout_p=0.5)

    torch.manual_seed(5)
    expected = torch.autograd.grad(attend(*inputs).square().sum(), inputs)
    torch.manual_seed(5)
    out = checkpoint(attend, *inputs, use_reentrant=False)
    for actual, gradient in zip(
        torch.autograd.grad(out.square().sum(), inputs), expected, strict=True
    ):
        assert torch.equal(actual, gradient)


def test_autocast_casts_the_inputs(device):
    q, k, v = make_qkv(40, dtype=torch.float32, device=device)
    with torch.autocast(device, dtype=torch.bfloat16):
        out = dilated_attention(q, k, v, *BRANCHES)
    assert out.dtype == torch.bfloat16
    halves = [x.bfloat16() for x in (q, k, v)]
    assert torch.equal(out, dilated_attention(*halves, *BRANCHES))


WRONG = {
    "no branches": ({"segment_lengths": [], "dilation_rates": []}, ValueError, "at least 1, got 0"),
    "unequal lists": ({"segment_lengths": [8]}, ValueError, "same length.*got 1 and 2"),
    "segment of 0": ({"segment_lengths": [8, 0]}, ValueError, "segment_lengths.*positive.*got 0"),
    "segment past 64 bits": ({"segment_lengths": [8, 2**70]}, ValueError, "segment_lengths.*2.63"),
    "negative rate": ({"dilation_rates": [1, -2]}, ValueError, "dilation_rates.*positive.*got -2"),
    "rate past 32 bits": ({"dilation_rates": [1, 2**31]}, ValueError, "dilation_rates.*2.31"),
    "causal as a word": ({"is_causal": "no"}, TypeError, "is_causal must be a bool, got 'no'"),
    "causal as a tensor": (
        {"is_causal": torch.tensor(True)},
        TypeError,
        "is_causal must be a bool",
    ),
    "scale as a word": ({"scale": "a"}, TypeError, "scale must be a number, got 'a'"),
    "scale of nan": ({"scale": float("nan")}, ValueError, "scale must be finite, got nan"),
    "dropout as a word": ({"dropout_p": "a"}, TypeError, "dropout_p must be a number, got 'a'"),
    "float rate": ({"dilation_rates": [1, 2.0]}, TypeError, "dilation_rates must be a sequence of"),
    "no data": (
        {"segment_lengths": torch.tensor([8], device="meta")},
        TypeError,
        "segment_lengths must be a sequence of",
    ),
    "shards without a group": ({"shard_lengths": 3}, ValueError, "shard_lengths must be None.*3"),
    "bare number": ({"segment_lengths": 8}, TypeError, "segment_lengths must be a sequence of"),
    "offsets' name": ({"head_offsets": "spiral"}, ValueError, "'interleaved', 'blocked'.*'spiral'"),
    "offsets' rows": ({"head_offsets": [[0] * 4]}, ValueError, "head_offsets.*with 2 branches"),
    "offsets' columns": (
        {"head_offsets": [[0] * 3] * 2},
        ValueError,
        "head_offsets.*each of the 4 heads, got 3",
    ),
    "ragged offsets": ({"head_offsets": [[0], [0, 0]]}, ValueError, r"got rows of \[1, 2\]"),
    "offset too large": (
        {"head_offsets": [[0] * 4, [0, 1, 2, 0]]},
        ValueError,
        "below the branch's dilation rate, 2, got 2 in branch 1",
    ),
    "offset too small": ({"head_offsets": [[-2] * 4] * 2}, ValueError, "got -2 in branch 0"),
    "float offsets": ({"head_offsets": [[0.5] * 4] * 2}, TypeError, "table of integers"),
    "no offsets": ({"head_offsets": None}, TypeError, "head_offsets must be"),
    "padding": ({"padding": "ones"}, ValueError, "padding must be 'masked' or 'zeros', got 'ones'"),
    "dropout": ({"dropout_p": 1.0}, ValueError, "dropout_p"),
    "negative dropout": ({"dropout_p": -0.1}, ValueError, "dropout_p"),
    "no tensor": ({"key": [1.0]}, TypeError, "key must be a tensor, got list"),
    "dimensions": ({"value": torch.zeros(2, 3)}, ValueError, r"value must be \[batch.*\(2, 3\)"),
    "key heads": (
        {"key": torch.zeros(1, 40, 3, 16), "value": torch.zeros(1, 40, 3, 16)},
        ValueError,
        "key: must have heads that divide query's, 4, got 3",
    ),
    "heads past 16 bits": (
        dict.fromkeys(("query", "key", "value"), torch.zeros(1).expand(1, 2, 2**31, 4)),
        ValueError,
        "query: heads must be at least 1 and below 2\\^16, got 2147483648",
    ),
    "blocked heads past 16 bits": (
        {
            **dict.fromkeys(("query", "key", "value"), torch.zeros(1).expand(1, 2, 2**31, 4)),
            "head_offsets": "blocked",
        },
        ValueError,
        "heads must be at least 1 and below 2\\^16, got 2147483648",
    ),
    "integers": (
        dict.fromkeys(("query", "key", "value"), torch.zeros(1, 40, 4, 16, dtype=torch.int32)),
        ValueError,
        "query: must be float16.*got int32",
    ),
    "a tensor of None": ({"value": None}, TypeError, "value must be a tensor, got NoneType"),
    "scale past float32": ({"scale": 1e39}, ValueError, "scale: must be finite in float32, got 1e"),
    "scale past float64": ({"scale": 10**400}, ValueError, "scale must be finite"),
    "scale as a vector": ({"scale": torch.ones(1)}, TypeError, "scale must be a number"),
    "scale as a truth": ({"scale": torch.tensor(True)}, TypeError, "scale must be a number"),
    "scale without data": ({"scale": torch.ones((), device="meta")}, TypeError, "must be a number"),
    "scale to be learnt": (
        {"scale": torch.tensor(0.5, requires_grad=True)},
        ValueError,
        "scale must not require a gradient",
    ),
    "offsets without data": (
        {"head_offsets": torch.zeros(2, 4, dtype=torch.int64, device="meta")},
        ValueError,
        "head_offsets must be a dense tensor with data.*meta",
    ),
    "sparse offsets": (
        {"head_offsets": torch.zeros(2, 4, dtype=torch.int64).to_sparse()},
        ValueError,
        "head_offsets must be a dense tensor.*sparse_coo",
    ),
    "lengths": ({"key": torch.zeros(1, 39, 4, 16)}, ValueError, "key.*seq_len of query"),
    "dtypes": ({"value": torch.zeros(1, 40, 4, 16).half()}, ValueError, "value.*dtype of query"),
}


@pytest.mark.parametrize("case", WRONG)
@pytest.mark.parametrize("cache", [None, False])
def test_wrong_arguments_are_named(case, cache):
    options, error, message = WRONG[case]
    q, k, v = make_qkv(40, dtype=torch.float32)
    call = {"query": q, "key": k, "value": v, "segment_lengths": [8, 16], "dilation_rates": [1, 2]}
    with pytest.raises(error, match=message):
        dilated_attention(**{**call, **options}, pattern_cache=cache)


@pytest.mark.parametrize("named", ["key", "value"])
@pytest.mark.parametrize("shape", [(1, 40, 3, 16), (2, 40, 4, 16), (1, 39, 4, 16), (1, 40, 4, 8)])
def test_nothing_is_planned_for_keys_that_do_not_fit(shape, named):
    q, k, v = make_qkv(40, dtype=torch.float32)
    cache = PatternCache()
    tensors = {"query": q, "key": k, "value": v}
    for other in (torch.zeros(shape), tensors[named].half(), tensors[named].to("meta")):
        with pytest.raises(ValueError, match="^(key|value): "):
            dilated_attention(**{**tensors, named: other}, **LISTS, pattern_cache=cache)
    assert cache.statistics().misses == 0


def test_autocast_still_uses_the_cache():
    q, k, v = make_qkv(40, dtype=torch.float32)
    cache = PatternCache()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        dilated_attention(q, k.bfloat16(), v, **LISTS, pattern_cache=cache)
    assert cache.statistics().misses == 1


@pytest.mark.parametrize("number", [np.float32(0.5), np.array(0.5), torch.tensor(0.5)])
def test_numbers_of_numpy_and_of_torch_are_numbers(number):
    q, k, v = make_qkv(40, dtype=torch.float32)
    torch.manual_seed(1)
    expected = dilated_attention(q, k, v, **LISTS, scale=0.5, dropout_p=0.5)
    lists = {"segment_lengths": [np.int64(8), torch.tensor(16)], "dilation_rates": np.array([1, 2])}
    torch.manual_seed(1)
    out = dilated_attention(q, k, v, **lists, scale=number, dropout_p=number)
    assert torch.equal(out, expected)
    assert type(DilatedAttention([8], [1], scale=number, dropout=number).scale) is float


@pytest.mark.parametrize("cache", [True, "x"])
def test_what_is_no_cache_is_refused(cache):
    q, k, v = make_qkv(40, dtype=torch.float32)
    with pytest.raises(TypeError, match="pattern_cache must be a PatternCache, a TieredP"):
        dilated_attention(q, k, v, [8], [1], pattern_cache=cache)


def test_a_call_is_checked_also_after_an_equal_one_was_right():
    q, k, v = make_qkv(40, dtype=torch.float32)
    lengths, rate = [8, 16], torch.tensor(2)
    dilated_attention(q, k, v, lengths, [1, 2])
    for wrong in ([1, 2.0], [True, 2.0], [1, 2, 2]):
        with pytest.raises((TypeError, ValueError), match="dilation_rates"):
            dilated_attention(q, k, v, lengths, wrong)
    before = dilated_attention(q, k, v, lengths, [1, rate])
    rate += 1  # under the same identity
    lengths[1] = 24
    after = dilated_attention(q, k, v, lengths, [1, rate])
    assert torch.equal(after, dilated_attention(q, k, v, [8, 24], [1, 3]))
    assert not torch.equal(before, after)


def test_parameters_use_the_cache():
    cache = PatternCache()
    weight = torch.nn.Parameter(torch.randn(1, 40, 4, 16))
    for _ in range(3):
        dilated_attention(weight, weight, weight, [8], [1], pattern_cache=cache)
    assert (cache.statistics().misses, cache.statistics().hits) == (1, 2)


def test_a_missing_pattern_is_looked_for_once():
    class Watched(PatternCache):
        searches = 0

        def find(self, *arguments):
            self.searches += 1
            return super().find(*arguments)

    cache = Watched()
    q, k, v = make_qkv(40)
    for calls in (1, 2):
        dilated_attention(q, k, v, [8], [1], pattern_cache=cache)
        assert cache.searches == calls
    assert (cache.statistics().misses, cache.statistics().hits) == (1, 1)


def test_unknown_keywords_are_refused():
    q, k, v = make_qkv(8)
    with pytest.raises(TypeError, match="key_padding_mask"):
        dilated_attention(q, k, v, [8], [1], key_padding_mask=None)
