"""decode_attend and decode_append: every device, dtype and head_dim against the reference."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from torch import Tensor

from dilated_attention_pytorch import ops
from dilated_attention_pytorch.decoding.layout import Layout, make_layout
from dilated_attention_pytorch.pattern import Scheme
from tests.conftest import make_qkv
from tests.reference import reference_attention

BRANCHES = ([16, 48, 150, 37], [1, 2, 6, 5])  # the second and third nest in the first
TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-5, torch.bfloat16: 2e-2, torch.float16: 3e-3}


def layout_of(heads: int, kv_heads: int, capacity: int = 200) -> Layout:
    scheme = Scheme.make(*BRANCHES, "interleaved", "masked")
    return make_layout(scheme, heads, kv_heads, capacity, grown=False)


def decode(q: Tensor, k: Tensor, v: Tensor, lengths: list[int], **options: Any) -> Any:
    """Of the last positions of each text, over a full cache."""
    table = torch.tensor(layout_of(q.shape[2], k.shape[2]).table, device=q.device)
    ends = torch.tensor(lengths, dtype=torch.int64, device=q.device)
    return ops.decode_attend(q, k, v, ends, table, *BRANCHES, k.shape[2], **options)


def make(dtype: torch.dtype, device: str, heads: int, kv_heads: int, head_dim: int) -> Any:
    dtype = torch.float32 if (dtype, device) == (torch.float64, "cuda") else dtype
    q, k, v = make_qkv(150, heads, head_dim, batch=3, kv_heads=kv_heads, dtype=dtype, device=device)
    expected = reference_attention(
        *(x.double().cpu() for x in (q, k, v)), *BRANCHES, is_causal=True
    )
    return q, k, v, expected, TOLERANCE[dtype]


def last(x: Tensor, lengths: list[int], n: int, dim: int) -> Tensor:
    """The last n positions of each text."""
    rows = [x[b : b + 1].narrow(dim, end - n, n) for b, end in enumerate(lengths)]
    return torch.cat(rows)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize(
    ("heads", "kv_heads", "head_dim"),
    [(4, 4, 8), (8, 2, 64), (6, 1, 128), (16, 1, 40), (12, 4, 200), (2, 2, 256), (3, 1, 5)],
)
def test_last_positions_over_a_full_cache(
    dtype: torch.dtype, heads: int, kv_heads: int, head_dim: int, device: str
) -> None:
    q, k, v, (out, lse), tolerance = make(dtype, device, heads, kv_heads, head_dim)
    for n, lengths in ((1, [150, 1, 97]), (3, [48, 20, 121])):
        for b, end in enumerate(lengths):  # rows that are not there may hold anything
            k[b, end:], v[b, end:] = torch.nan, torch.nan
        actual = decode(last(q, lengths, n, 1), k, v, lengths)
        wanted = last(out, lengths, n, 1), last(lse, lengths, n, 2)
        for ours, theirs in zip(actual, wanted, strict=True):
            torch.testing.assert_close(ours.double().cpu(), theirs, rtol=tolerance, atol=tolerance)
        q, k, v, _, _ = make(dtype, device, heads, kv_heads, head_dim)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize(("heads", "kv_heads", "head_dim"), [(8, 2, 64), (4, 4, 128), (3, 1, 5)])
def test_steps_over_a_cache_that_forgets(
    dtype: torch.dtype, heads: int, kv_heads: int, head_dim: int, device: str
) -> None:
    q, k, v, (out, lse), tolerance = make(dtype, device, heads, kv_heads, head_dim)
    layout = layout_of(heads, kv_heads)
    table = torch.tensor(layout.table, device=device)
    rows = [q.new_full((3, layout.rows, head_dim), torch.nan) for _ in "kv"]
    lengths = torch.zeros(3, dtype=torch.int64, device=device)
    moves, begins = [(40, [40, 3, 0]), *[(1, [1, 1, 1])] * 110], [0, 0, 0]
    for n, counts in moves:
        key, value, query = (x.new_full((3, n, *x.shape[2:]), torch.nan) for x in (k, v, q))
        for b, (begin, count) in enumerate(zip(begins, counts, strict=True)):
            for to, source in ((key, k), (value, v), (query, q)):
                to[b, :count] = source[b, begin : begin + count]
        given = torch.tensor(counts, device=device)
        lists = (table, *BRANCHES)
        options = {"counts": given, "max_seq_len": 150}
        begins = [begin + count for begin, count in zip(begins, counts, strict=True)]
        if n > 1:
            ops.decode_append(*rows, lengths, key, value, *lists, **options)
        else:
            if begins[0] % 2:
                actual = ops.decode_step(*rows, lengths, query, key, value, *lists, **options)
            else:
                ops.decode_append(*rows, lengths, key, value, *lists, **options)
                actual = ops.decode_attend(query, *rows, lengths, *lists, kv_heads, counts=given)
            wanted = last(out, begins, 1, 1), last(lse, begins, 1, 2)
            for ours, theirs in zip(actual, wanted, strict=True):
                torch.testing.assert_close(
                    ours.double().cpu(), theirs, rtol=tolerance, atol=tolerance
                )
    assert lengths.tolist() == begins == [150, 113, 110]


def test_what_no_branch_holds_and_what_is_past_the_count(device: str) -> None:
    q, k, v, *_ = make(torch.float32, device, 2, 1, 16)
    table = torch.tensor([[[-1, 0, -1, 0], [3, 0, -1, 0]]], device=device)
    ends, counts = (torch.tensor(x, device=device) for x in ([3, 4, 0], [1, 1, 0]))
    out, lse = ops.decode_attend(q[:, :2], k, v, ends, table, [8], [4], 1, counts=counts)
    held = torch.zeros(3, 2, 2, dtype=torch.bool, device=device)
    held[1, 0, 1] = True  # position 3 of the second text, head 1
    assert torch.equal(out != 0, held[..., None].expand_as(out))
    assert torch.equal(lse.isfinite(), held.transpose(1, 2)) and not lse.isnan().any()


def test_no_queries_and_no_texts(device: str) -> None:
    q, k, v, *_ = make(torch.float32, device, 2, 1, 16)
    out, lse = decode(q[:, :0], k, v, [3, 4, 5])
    assert out.shape == (3, 0, 2, 16) and lse.shape == (3, 2, 0)
    out, lse = decode(q[:0, :1], k[:0], v[:0], [])
    assert out.shape == (0, 1, 2, 16) and lse.shape == (0, 2, 1)


@pytest.mark.parametrize("length", [11, 150])
def test_a_nan_reaches_the_queries_that_meet_it(length: int, device: str) -> None:
    q, k, v, *_ = make(torch.float32, device, 2, 1, 16)
    k[0, length - 2] = torch.nan  # of the last query's segment of rate 1
    lengths = [length, 20, 30]
    out, lse = decode(last(q, lengths, 1, 1), k, v, lengths)
    assert out[0].isnan().all() and lse[0].isnan().all()
    assert out[1:].isfinite().all() and lse[1:].isfinite().all()


def test_counts_are_from_none_to_all(device: str) -> None:
    q, k, v, *_ = make(torch.float32, device, 2, 1, 16)
    layout = layout_of(2, 1)
    table = torch.tensor(layout.table, device=device)
    rows = [q.new_full((3, layout.rows, 16), torch.nan) for _ in "kv"]
    lengths = torch.zeros(3, dtype=torch.int64, device=device)
    counts = torch.tensor([4, -2, 1], device=device)
    options = {"counts": counts, "max_seq_len": 150}
    ops.decode_append(*rows, lengths, k[:, :1], v[:, :1], table, *BRANCHES, **options)
    assert lengths.tolist() == [1, 0, 1]


def test_a_text_never_gets_longer_than_it_may() -> None:
    q, k, v, *_ = make(torch.float32, "cpu", 2, 1, 8)
    layout = layout_of(2, 1)
    rows = [q.new_zeros(3, layout.rows, 8) for _ in "kv"]
    lengths = torch.tensor([3, 150, 0])
    lists = (torch.tensor(layout.table), *BRANCHES)
    with pytest.raises(ValueError, match=r"key: must leave every text at most max_seq_len posi"):
        ops.decode_append(*rows, lengths, k[:, :1], v[:, :1], *lists, max_seq_len=150)
    assert lengths.tolist() == [3, 150, 0]


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "key of another dtype": (
        {"key": torch.zeros(3, 150, 1, 8).half()},
        "key: must have the dtype and device of query, float32 on cpu, got float16 on cpu",
    ),
    "value of another shape": (
        {"value": torch.zeros(3, 149, 1, 8)},
        "value: must have the shape of key, [3, 150, 1, 8], got [3, 149, 1, 8]",
    ),
    "heads that do not divide": ({"kv_heads": 3}, "kv_heads: must divide query's heads, 2, got 3"),
    "KV heads that key does not have": ({"kv_heads": 2}, "key: must have kv_heads, 2, got [3, 150"),
    "float lengths": (
        {"lengths": torch.ones(3)},
        "lengths: must be contiguous, int64 and on the device of query, cpu, got float32 on cpu",
    ),
    "too few lengths": (
        {"lengths": torch.ones(2, dtype=torch.int64)},
        "lengths: must be [batch] = [3], got [2]",
    ),
    "lattices of other heads": (
        {"lattices": torch.zeros(4, 3, 4, dtype=torch.int64)},
        "lattices: must be of query's heads, 2, got 3",
    ),
    "lattices of other branches": (
        {"lattices": torch.zeros(3, 2, 4, dtype=torch.int64)},
        "lattices: must be [branches, heads, 4] of 4 branches, got [3, 2, 4]",
    ),
    "too many branches": (
        {"segment_lengths": [8] * 17, "dilation_rates": [1] * 17},
        "segment_lengths and dilation_rates: must have the same length, from 1 to 16, got 17 and",
    ),
    "no segment": ({"segment_lengths": [0, 1, 1, 1]}, "segment_lengths: must be positive, got 0"),
    "no rate": ({"dilation_rates": [1, 1, 0, 1]}, "dilation_rates: must be positive and below 2^3"),
    "a scale that is not finite": ({"scale": float("inf")}, "scale: must be finite in float32"),
}


def test_wide_heads_are_refused(device: str) -> None:
    q, k, v = (torch.zeros(1, 4, 1, 264, device=device) for _ in "qkv")
    with pytest.raises(ValueError, match="query: head_dim must be at least 1 and at most 256, got"):
        decode(q[:, :1], k, v, [4])


@pytest.mark.parametrize("name", WRONG)
def test_wrong_arguments(name: str) -> None:
    change, said = WRONG[name]
    rows = torch.zeros(3, 150, 1, 8)
    good: dict[str, Any] = {
        "query": torch.zeros(3, 1, 2, 8),
        **{"key": rows, "value": rows},
        "lengths": torch.ones(3, dtype=torch.int64),
        "lattices": torch.tensor(layout_of(2, 1).table),
        **{"segment_lengths": BRANCHES[0], "dilation_rates": BRANCHES[1], "kv_heads": 1},
    }
    ops.decode_attend(**good)
    with pytest.raises(ValueError, match=re.escape(said)):
        ops.decode_attend(**{**good, **change})


def test_a_step_gives_no_gradients() -> None:
    q, k, v, *_ = make(torch.float32, "cpu", 2, 1, 8)
    with pytest.raises(RuntimeError, match="query: must not require a gradient, got one that does"):
        decode(q[:, :1].requires_grad_(), k, v, [1, 1, 1])
