"""attention_block: blocks of queries and keys, in any order, are attention over the whole."""

from __future__ import annotations

import dataclasses
import random
from typing import Any

import pytest
import torch

from tests.conftest import Exact, make_qkv
from tests.ops.blocks import (
    Piece,
    Select,
    backward_in_blocks,
    forward_in_blocks,
    make_query_sums,
    pieces,
    random_cuts,
    run_in_blocks,
    select_rows,
)
from tests.ops.calls import (
    HEAD_DIMS,
    Tensors,
    assert_close,
    deterministic_mode,
    output_gradients,
    run_operator,
    run_reference,
)
from tests.planning import Spec, plan_tensor
from tests.reference import interleaved_table, multiplicities

LENGTHS, RATES = [16, 40], [1, 3]
# Of 101 positions.
CUTS = {
    "whole": [],
    "at segments": [16, 32, 80],
    "anywhere": [7, 41, 63],
    "empty pieces": [0, 0, 50, 50, 101],
    "single rows": [20, 21, 22, 100],
}


def random_table(rates: list[int], heads: int, rng: random.Random) -> torch.Tensor | None:
    if rng.random() < 0.3:
        return None
    return torch.tensor([[rng.randint(-1, r - 1) for _ in range(heads)] for r in rates])


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("padding", ["masked", "zeros"])
@pytest.mark.parametrize("key_cuts", CUTS)
@pytest.mark.parametrize("query_cuts", CUTS)
def test_blocks_are_the_whole(
    query_cuts: str, key_cuts: str, padding: str, is_causal: bool, device: str, exact: Exact
) -> None:
    tensors = make_qkv(101, 6, 8, batch=2, kv_heads=3, dtype=exact.dtype, device=device)
    options: dict[str, Any] = {"is_causal": is_causal, "padding": padding}
    actual = run_in_blocks(tensors, LENGTHS, RATES, CUTS[query_cuts], CUTS[key_cuts], **options)
    assert_close(actual, run_reference(tensors, LENGTHS, RATES, **options), exact)


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("seed", range(12))
def test_random_blocks_are_the_whole(seed: int, is_causal: bool, device: str, exact: Exact) -> None:
    rng = random.Random(seed)
    seq_len, branches, kv_heads = rng.randint(1, 200), rng.randint(1, 4), rng.randint(1, 3)
    rates = [rng.randint(1, 9) for _ in range(branches)]
    lengths = [rng.randint(1, 250) for _ in range(branches)]
    heads = kv_heads * rng.randint(1, 3)
    tensors = make_qkv(
        seq_len, heads, 12, batch=2, kv_heads=kv_heads, dtype=exact.dtype, device=device, seed=seed
    )
    options: dict[str, Any] = {
        "head_offsets": random_table(rates, heads, rng),
        "is_causal": is_causal,
        "padding": rng.choice(["masked", "zeros"]),
        "scale": rng.choice([None, 0.7]),
    }
    if rng.random() < 0.5:
        options |= {"dropout_p": 0.3, "dropout_seed": torch.tensor([seed], device=device)}
    cuts = (random_cuts(seq_len, rng), random_cuts(seq_len, rng))
    in_place = rng.random() < 0.5
    actual = run_in_blocks(tensors, lengths, rates, *cuts, seed=seed, in_place=in_place, **options)
    assert_close(actual, run_reference(tensors, lengths, rates, **options), exact)


@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
def test_head_dims(head_dim: int, in_place: bool, device: str, exact: Exact) -> None:
    tensors = make_qkv(90, 4, head_dim, kv_heads=2, dtype=exact.dtype, device=device)
    actual = run_in_blocks(
        tensors, LENGTHS, RATES, [50], [33, 60], in_place=in_place, is_causal=True
    )
    assert_close(actual, run_reference(tensors, LENGTHS, RATES, is_causal=True), exact)


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("padding", ["masked", "zeros"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_one_block_is_attention_bit_for_bit(
    dtype: torch.dtype, padding: str, is_causal: bool, device: str
) -> None:
    tensors = make_qkv(120, 4, 16, kv_heads=2, dtype=dtype, device=device)
    options: dict[str, Any] = {"is_causal": is_causal, "padding": padding}
    with deterministic_mode():
        plain = run_operator(tensors, LENGTHS, RATES, **options)
        out, lse = torch.ops.dilated.attention_block(*tensors, 120, 0, 0, LENGTHS, RATES, **options)
        grads = torch.ops.dilated.attention_block_backward(
            *output_gradients(tensors[0]), *tensors, out, lse, 120, 0, 0, LENGTHS, RATES, **options
        )
    for ours, theirs in zip((out, lse, *grads), plain, strict=True):
        assert ours.dtype == theirs.dtype and torch.equal(ours, theirs)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("head_dim", [17, 64, 100, 128, 256])
@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize(("is_causal", "deterministic"), [(False, True), (True, False)])
def test_eight_blocks_are_as_exact_as_one(
    dtype: torch.dtype,
    head_dim: int,
    is_causal: bool,
    deterministic: bool,
    in_place: bool,
    device: str,
) -> None:
    lengths, rates, cuts = [128, 400], [1, 2], [50 * i for i in range(1, 8)]
    tensors = make_qkv(400, 4, head_dim, kv_heads=2, dtype=dtype, device=device)
    expected = run_reference(tensors, lengths, rates, is_causal=is_causal)
    with deterministic_mode(deterministic):
        one, eight = (
            run_in_blocks(
                tensors, lengths, rates, [], key_cuts, in_place=in_place, is_causal=is_causal
            )
            for key_cuts in ([], cuts)
        )
    assert eight.out.dtype == dtype and eight.lse.dtype == torch.float32
    for name, right in expected._asdict().items():
        finite = torch.isfinite(right)
        once, continued = (
            (getattr(result, name).cpu().double() - right)[finite].abs() for result in (one, eight)
        )
        floor = 1e-6 * right[finite].abs().max()
        assert continued.mean() <= 1.05 * once.mean() + floor, name
        assert continued.max() <= 1.5 * once.max() + floor, name


def poison_unlisted(branches: tuple[list[int], list[int]], heads: int) -> Select:
    """Gives blocks whose key and value rows are NaN where no query meets them, causal or not."""
    table = interleaved_table(branches[1], heads)

    def select(tensors: Tensors, queries: Piece, keys: Piece) -> Tensors:
        query, key, value = select_rows(tensors, queries, keys)
        counts = multiplicities(tensors[0].shape[1], *branches, table, False, queries, keys)
        met = (counts > 0).any(1).unflatten(0, (key.shape[2], -1)).any(1).T[..., None]
        assert not met.all()
        met = met.to(key.device)
        return query, key.where(met, torch.nan), value.where(met, torch.nan)

    return select


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("is_bfloat16", [False, True])
def test_unlisted_rows_are_not_read(
    is_bfloat16: bool, is_causal: bool, device: str, exact: Exact
) -> None:
    branches = ([16, 40], [4, 6])
    dtype = torch.bfloat16 if is_bfloat16 else exact.dtype
    tensors = make_qkv(101, 4, 24, kv_heads=2, dtype=dtype, device=device)
    poison = poison_unlisted(branches, 4)
    queries, keys = (20, 60), pieces(101, [30, 45, 90])
    clean, dirty = (
        forward_in_blocks(tensors, branches, queries, keys, select=select, is_causal=is_causal)
        for select in (select_rows, poison)
    )
    assert all(torch.equal(a, b) for a, b in zip(clean, dirty, strict=True))
    whole = torch.ops.dilated.attention(*tensors, *branches, is_causal=is_causal)
    blocks = [(queries, piece) for piece in keys]
    with deterministic_mode():
        clean_sums, dirty_sums = (
            backward_in_blocks(tensors, branches, whole, blocks, select=select, is_causal=is_causal)
            for select in (select_rows, poison)
        )
    assert all(torch.equal(a, b) for a, b in zip(clean_sums, dirty_sums, strict=True))


@pytest.mark.parametrize("head_dim", [16, 20, 64, 128, 129])
@pytest.mark.parametrize("is_bfloat16", [False, True])
def test_no_keys_change_nothing(
    is_bfloat16: bool, head_dim: int, device: str, exact: Exact
) -> None:
    dtype = torch.bfloat16 if is_bfloat16 else exact.dtype
    q, k, v = make_qkv(800, 4, head_dim, batch=2, kv_heads=2, dtype=dtype, device=device)
    q, first_keys, branch = q[:, 130:400], (k[:, :400], v[:, :400]), ([400], [2])
    out, lse = torch.ops.dilated.attention_block(q, *first_keys, 800, 130, 0, *branch, partial=True)
    nothing = torch.isneginf(lse)
    assert nothing.any() and not nothing.all()
    dirty = out.masked_fill(nothing.mT[..., None], torch.nan)
    wide = torch.full((2, 270, 4, head_dim + 3), torch.nan, dtype=out.dtype, device=device)
    wide[..., 1:-2] = dirty
    # No rows, and rows of another segment.
    for begin, end in ((400, 400), (400, 800)):
        block = (q, k[:, begin:end], v[:, begin:end], 800, 130, begin, *branch)
        none = torch.ops.dilated.attention_block(*block)
        assert not none[0].any() and torch.isneginf(none[1]).all()
        for running in (dirty, wide[..., 1:-2]):
            for partial in (False, True):
                again = torch.ops.dilated.attention_block(
                    *block, out=running, lse=lse, partial=partial
                )
                assert torch.equal(again[0], out if partial else out.to(dtype))
                assert torch.equal(again[1], lse)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("head_dim", [1, 16, 17, 48, 100])
def test_query_sums_are_zeros_of_whole_sixteens(
    head_dim: int, dtype: torch.dtype, device: str
) -> None:
    query = torch.randn(2, 5, 3, head_dim, device=device, dtype=dtype, requires_grad=True)
    sums = torch.ops.dilated.make_query_sums(query)
    expected = make_query_sums(query.detach())
    assert torch.equal(sums, expected) and sums.dtype == expected.dtype
    assert sums.device == query.device and not sums.requires_grad


def test_writes_to_query_sums_are_counted(device: str, exact: Exact) -> None:
    q, k, v = make_qkv(40, 1, 16, dtype=exact.dtype, device=device)
    out, lse = torch.ops.dilated.attention(q, k, v, [40], [1])
    sums = make_query_sums(q)
    weight = torch.ones_like(sums, requires_grad=True)
    product = (sums * weight).sum()
    into = torch.ops.dilated.attention_block_backward_into
    into(sums, out, None, q, k, v, out, lse, 40, 0, 0, [40], [1])
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        product.backward()
    grad_query = torch.ops.dilated.round_query_sums(sums, q)
    before = grad_query.clone()
    sums.zero_()
    assert torch.equal(grad_query, before)


def test_running_out_is_not_read_where_nothing_was_attended(device: str, exact: Exact) -> None:
    q, k, v = make_qkv(60, 4, 16, dtype=exact.dtype, device=device)
    block = (q, k, v, 60, 0, 0, LENGTHS, [2, 3])
    out, lse = torch.ops.dilated.attention_block(*block)
    running = (torch.full_like(out, torch.nan), torch.full_like(lse, -torch.inf))
    continued = torch.ops.dilated.attention_block(*block, out=running[0], lse=running[1])
    assert torch.equal(continued[0], out) and torch.equal(continued[1], lse)


def test_zero_keys_count_where_the_rows_own_position_is(device: str, exact: Exact) -> None:
    # One segment of 64, cut by the sequence's end at 50: 14 zero keys for every row.
    q, k, v = make_qkv(50, 2, 16, dtype=exact.dtype, device=device)

    def block(keys: Piece) -> torch.Tensor:
        rows = slice(*keys)
        lse: torch.Tensor = torch.ops.dilated.attention_block(
            q[:, :20], k[:, rows], v[:, rows], 50, 0, keys[0], [32], [1], padding="zeros"
        )[1]
        return lse

    # Rows 0 .. 19 lie in a full segment; rows 32 .. 49 in one that lacks 14 keys.
    assert torch.isneginf(block((32, 50))).all()
    tail = torch.ops.dilated.attention_block(
        q[:, 32:], k[:, 32:32], v[:, 32:32], 50, 32, 32, [32], [1], padding="zeros"
    )
    assert torch.isneginf(tail[1]).all() and not tail[0].any()
    out, lse = torch.ops.dilated.attention_block(
        q[:, 32:] * 0, k[:, 32:33], v[:, 32:33], 50, 32, 32, [32], [1], padding="zeros"
    )
    counts = torch.ones(18, dtype=lse.dtype)
    counts[0] = 1 + 14
    torch.testing.assert_close(lse.cpu()[0, 0], counts.log(), rtol=0, atol=exact.forward)
    torch.testing.assert_close(
        out[0, :, 0].cpu(), (v[0, 32:33, 0].cpu() / counts[:, None]), rtol=0, atol=exact.forward
    )


def test_far_positions(device: str, exact: Exact) -> None:
    # Moved by a multiple of every segment, a block is the same block.
    move, seq_len = 480 * 10**6, 10**9
    tensors = make_qkv(240, 4, 16, dtype=exact.dtype, device=device)
    near = run_operator(tensors, [48, 80], [1, 2])
    block = (seq_len, move, move, [48, 80], [1, 2])
    out, lse = torch.ops.dilated.attention_block(*tensors, *block)
    assert torch.equal(out, near.out) and torch.equal(lse, near.lse)
    grads = torch.ops.dilated.attention_block_backward(
        *output_gradients(tensors[0]), *tensors, out, lse, *block
    )
    for ours, theirs in zip(grads, near[2:], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=exact.backward)


def test_running_result_in_any_layout(device: str, exact: Exact) -> None:
    q, k, v = make_qkv(101, 4, 16, kv_heads=2, dtype=exact.dtype, device=device, poison=True)
    first = (q, k[:, :41], v[:, :41], 101, 0, 0, LENGTHS, RATES)
    out, lse = torch.ops.dilated.attention_block(*first, partial=True)
    second = (q, k[:, 41:], v[:, 41:], 101, 0, 41, LENGTHS, RATES)
    expected = torch.ops.dilated.attention_block(*second, out=out, lse=lse)
    strided = out.transpose(1, 3).contiguous().transpose(1, 3)
    padded = torch.full((1, 101, 5, 20), torch.nan, dtype=out.dtype, device=device)
    padded[:, :, :4, 3:19] = out
    turned = lse.mT.contiguous().mT
    for layout in (strided, padded[:, :, :4, 3:19]):
        actual = torch.ops.dilated.attention_block(*second, out=layout, lse=turned)
        assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))


def test_given_pattern_equals_own_planning(device: str, exact: Exact) -> None:
    q, k, v = make_qkv(120, 6, 16, kv_heads=2, dtype=exact.dtype, device=device)
    right = Spec(120, [32, 50], [1, 3], 6, 2, queries=((30, 90),), keys=((10, 70),))
    block = (q[:, 30:90], k[:, 10:70], v[:, 10:70], 120, 30, 10, [32, 50], [1, 3])
    own = torch.ops.dilated.attention_block(*block)
    given = torch.ops.dilated.attention_block(*block, pattern=plan_tensor(right, device))
    assert all(torch.equal(a, b) for a, b in zip(own, given, strict=True))


@pytest.mark.parametrize(
    "change",
    [
        {"queries": ((31, 91),)},
        {"queries": ((30, 60), (61, 91))},
        {"keys": ((0, 60),)},
        {"keys": ((10, 71),)},
        {"seq_len": 121},
    ],
)
def test_pattern_of_another_block_is_refused(change: dict[str, Any]) -> None:
    q, k, v = make_qkv(120, 6, 16, kv_heads=2)
    right = Spec(120, [32, 50], [1, 3], 6, 2, queries=((30, 90),), keys=((10, 70),))
    wrong = plan_tensor(dataclasses.replace(right, **change))
    with pytest.raises(ValueError, match="pattern"):
        torch.ops.dilated.attention_block(
            q[:, 30:90], k[:, 10:70], v[:, 10:70], 120, 30, 10, [32, 50], [1, 3], pattern=wrong
        )


def test_a_block_has_no_gradient_of_its_own(device: str, exact: Exact) -> None:
    q, k, v = make_qkv(20, 2, 16, dtype=exact.dtype, device=device, requires_grad=True)
    out, _ = torch.ops.dilated.attention_block(q, k, v, 20, 0, 0, [8], [1])
    with pytest.raises(RuntimeError, match="attention_block"):
        out.sum().backward()


def test_inputs_are_left_alone(device: str, exact: Exact) -> None:
    q, k, v = make_qkv(40, 2, 16, dtype=exact.dtype, device=device)
    block = (q, k, v, 40, 0, 0, [8], [1])
    out, lse = torch.ops.dilated.attention_block(*block, partial=True)
    before = out.clone(), lse.clone()
    torch.ops.dilated.attention_block(*block, out=out, lse=lse, partial=True)
    assert torch.equal(out, before[0]) and torch.equal(lse, before[1])
