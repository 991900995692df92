"""Batches of sequences in one call: each is as if called alone, and what is between is padding."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from torch import Tensor

from dilated_attention_pytorch import ops
from dilated_attention_pytorch.pattern.pattern import pairs_of
from tests.conftest import Exact, make_qkv
from tests.ops.blocks import backward_in_blocks, forward_in_blocks, pieces, random_cuts
from tests.ops.calls import (
    Result,
    Tensors,
    assert_close,
    deterministic_mode,
    differentiate,
    output_gradients,
    run_reference,
)

Places = list[tuple[int, int]]
BRANCHES: tuple[list[int], list[int]] = ([16, 40, 200], [1, 2, 3])
# Gaps, an empty sequence, one of one row, two alike; the last ends with the rows.
PLACES: Places = [(2, 70), (72, 0), (80, 1), (81, 70), (160, 140)]
ROWS = 300


def in_gaps(places: Places, rows: int) -> Tensor:
    """bool [rows]"""
    outside = torch.ones(rows, dtype=torch.bool)
    for first, length in places:
        outside[first : first + length] = False
    return outside


def poisoned(tensors: Tensors, places: Places) -> Tensors:
    """The same with NaN in the rows of no sequence."""
    outside = in_gaps(places, tensors[0].shape[1])[None, :, None, None].to(tensors[0].device)
    query, key, value = (x.masked_fill(outside, torch.nan) for x in tensors)
    return query, key, value


def run_batch(tensors: Tensors, places: Places, **options: Any) -> Result:
    """One call, whose gradients are NaN in the rows of no sequence as well."""
    inputs = [x.detach().requires_grad_() for x in tensors]
    table = torch.tensor(places, dtype=torch.int64).reshape(-1, 2)
    outputs = ops.attention(*inputs, *BRANCHES, sequences=table, **options)
    grad_out, grad_lse = output_gradients(tensors[0])
    outside = in_gaps(places, tensors[0].shape[1]).to(tensors[0].device)
    grad_out = grad_out.masked_fill(outside[None, :, None, None], torch.nan)
    grad_lse = grad_lse.masked_fill(outside, torch.nan)
    return differentiate(outputs, inputs, (grad_out, grad_lse))


def run_alone(tensors: Tensors, places: Places, **options: Any) -> Result:
    """A call for each sequence, which is the entry of a batch that dropout takes it for."""
    batch, rows, heads, _ = tensors[0].shape
    out, *grads = (torch.zeros_like(x) for x in (tensors[0], *tensors))
    lse_dtype = torch.float64 if out.dtype == torch.float64 else torch.float32
    lse = torch.full((batch, heads, rows), -torch.inf, dtype=lse_dtype, device=out.device)
    grad_out, grad_lse = output_gradients(tensors[0])
    for i, (first, length) in enumerate(places):
        here = slice(first, first + length)
        entries = i + 1 if "dropout_p" in options else 1
        inputs = [x[:, here].repeat(entries, 1, 1, 1).requires_grad_() for x in tensors]
        o, z = (x[-1:] for x in ops.attention(*inputs, *BRANCHES, **options))
        one = differentiate((o, z), inputs, (grad_out[:, here], grad_lse[:, :, here]))
        out[:, here], lse[:, :, here] = one.out, one.lse
        for whole, part in zip(grads, one[2:], strict=True):
            whole[:, here] = part[-1:]
    return Result(out, lse, *grads)


def random_places(rng: random.Random) -> tuple[Places, int]:
    """A batch and its rows: none, empty ones, single rows, gaps everywhere."""
    places, end = [], rng.choice([0, 0, 5])
    for _ in range(rng.choice([0, 1, 2, 3, 6])):
        length = rng.choice([0, 1, rng.randint(2, 20), rng.randint(20, 90)])
        places.append((end, length))
        end += length + rng.choice([0, 0, 1, 9])
    return places, end


def random_batch(
    rng: random.Random, device: str, exact: Exact
) -> tuple[Tensors, Places, dict[str, Any]]:
    places, rows = random_places(rng)
    tensors = make_qkv(
        rows,
        4,
        rng.choice([8, 20]),
        kv_heads=rng.choice([1, 2, 4]),
        dtype=exact.dtype,
        device=device,
        seed=rng.randrange(1000),
    )
    options: dict[str, Any] = {
        "is_causal": rng.random() < 0.5,
        "padding": rng.choice(["masked", "zeros"]),
    }
    if rng.random() < 0.3:
        options["head_offsets"] = torch.tensor([[0] * 4, [0, -1, 1, 1], [2, 0, -1, 1]])
    if rng.random() < 0.3:
        options |= {"dropout_p": 0.4, "dropout_seed": torch.tensor([7], device=device)}
    return tensors, places, options


@pytest.mark.parametrize("seed", range(20))
def test_each_sequence_is_as_if_alone(seed: int, device: str, exact: Exact) -> None:
    rng = random.Random(seed)
    for _ in range(60 if device == "cpu" else 6):
        tensors, places, options = random_batch(rng, device, exact)
        with deterministic_mode():
            expected = run_alone(tensors, places, **options)
            actual = run_batch(poisoned(tensors, places), places, **options)
        if device == "cpu":
            for name, ours, theirs in zip(Result._fields, actual, expected, strict=True):
                assert torch.equal(ours, theirs), f"{name} of {places}"
        assert_close(actual, expected, exact)


@pytest.mark.parametrize("is_deterministic", [False, True])
@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("padding", ["masked", "zeros"])
def test_results_are_the_definitions(
    padding: str, is_causal: bool, is_deterministic: bool, device: str, exact: Exact
) -> None:
    tensors = make_qkv(ROWS, 4, 16, kv_heads=2, dtype=exact.dtype, device=device)
    options: dict[str, Any] = {"is_causal": is_causal, "padding": padding}
    with deterministic_mode(is_deterministic):
        actual = run_batch(poisoned(tensors, PLACES), PLACES, **options)
    for first, length in PLACES:
        here = slice(first, first + length)
        alone = tensors[0][:, here], tensors[1][:, here], tensors[2][:, here]
        expected = run_reference(alone, *BRANCHES, **options)
        out, lse = actual.out[:, here].cpu().double(), actual.lse[:, :, here].cpu().double()
        torch.testing.assert_close(out, expected.out, rtol=0, atol=exact.forward)
        torch.testing.assert_close(lse, expected.lse, rtol=0, atol=10 * exact.forward)


@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("head_dim", [48, 64, 128, 256])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_16_bit_rows(
    dtype: torch.dtype, head_dim: int, is_causal: bool, dropout_p: float, device: str
) -> None:
    tensors = make_qkv(ROWS, 4, head_dim, kv_heads=2, dtype=dtype, device=device)
    options: dict[str, Any] = {"is_causal": is_causal}
    if dropout_p > 0:
        options |= {"dropout_p": dropout_p, "dropout_seed": torch.tensor([5], device=device)}
    for is_deterministic in (False, True):
        with deterministic_mode(is_deterministic):
            actual = run_batch(poisoned(tensors, PLACES), PLACES, **options)
            expected = run_alone(tensors, PLACES, **options)
        rounding = Exact(dtype, 2 * torch.finfo(dtype).eps, 4 * torch.finfo(dtype).eps)
        assert_close(actual, expected, rounding)


def test_rows_between_sequences_are_empty(device: str, exact: Exact) -> None:
    tensors = make_qkv(ROWS, 4, 16, kv_heads=2, dtype=exact.dtype, device=device)
    for is_deterministic in (False, True):
        with deterministic_mode(is_deterministic):
            result = run_batch(poisoned(tensors, PLACES), PLACES)
        outside = in_gaps(PLACES, ROWS).to(device)
        for rows in (result.out, *result[2:]):
            assert not rows[:, outside].any() and not rows.isnan().any()
        assert (result.lse[..., outside] == -torch.inf).all()


def test_a_batch_of_today_is_the_same(device: str, exact: Exact) -> None:
    batch = make_qkv(90, 4, 16, batch=3, dtype=exact.dtype, device=device)
    options = {"dropout_p": 0.5, "dropout_seed": torch.tensor([9], device=device)}
    expected, expected_lse = ops.attention(*batch, *BRANCHES, **options)
    packed = [x.flatten(0, 1)[None] for x in batch]
    table = torch.tensor([[0, 90], [90, 90], [180, 90]])
    out, lse = ops.attention(*packed, *BRANCHES, sequences=table, **options)
    torch.testing.assert_close(out.view_as(expected), expected, rtol=0, atol=exact.forward)
    lse = lse[0].unflatten(1, (3, 90)).transpose(0, 1)
    torch.testing.assert_close(lse, expected_lse, rtol=0, atol=10 * exact.forward)


def test_a_table_need_not_be_contiguous(device: str, exact: Exact) -> None:
    tensors = make_qkv(ROWS, 4, 16, dtype=exact.dtype, device=device)
    table = torch.tensor(PLACES)
    expected = ops.attention(*tensors, *BRANCHES, sequences=table)
    actual = ops.attention(*tensors, *BRANCHES, sequences=table.T.contiguous().T)
    assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))


def test_segment_attention_takes_sequences(device: str, exact: Exact) -> None:
    tensors = make_qkv(ROWS, 4, 16, dtype=exact.dtype, device=device)
    table = torch.tensor(PLACES)
    out, _ = ops.segment_attention(*tensors, 32, 2, sequences=table)
    expected, _ = ops.attention(*tensors, [32], [2], sequences=table)
    assert torch.equal(out, expected)


@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize("seed", range(10))
def test_blocks_of_a_batch_add_up_to_it(
    seed: int, in_place: bool, device: str, exact: Exact
) -> None:
    rng = random.Random(seed)
    for _ in range(20 if device == "cpu" else 3):
        tensors, places, options = random_batch(rng, device, exact)
        rows = tensors[0].shape[1]
        expected = run_batch(tensors, places, **options)
        held = poisoned(tensors, places)
        call = options | {"sequences": torch.tensor(places, dtype=torch.int64).reshape(-1, 2)}
        queries, keys = (pieces(rows, random_cuts(rows, rng)) for _ in "qk")
        outputs = [
            forward_in_blocks(held, BRANCHES, q, rng.sample(keys, len(keys)), **call)
            for q in queries
        ]
        out = torch.cat([o for o, _ in outputs], 1)
        lse = torch.cat([z for _, z in outputs], 2)
        blocks = [(q, k) for q in queries for k in keys]
        gradients = backward_in_blocks(
            held, BRANCHES, (out, lse), blocks, in_place=in_place, **call
        )
        outside = in_gaps(places, rows)
        actual = Result(out, lse, *gradients)
        assert not actual.out[:, outside].any()
        if in_place:  # rounded from sums that nothing was added to
            assert not actual.grad_query[:, outside].any()
        assert_close(actual, expected, exact)


@pytest.mark.parametrize("seed", range(10))
def test_near_and_far_keys_of_a_batch(seed: int, device: str, exact: Exact) -> None:
    rng = random.Random(seed)
    for _ in range(20 if device == "cpu" else 3):
        tensors, places, options = random_batch(rng, device, exact)
        rows = tensors[0].shape[1]
        expected = run_batch(tensors, places, **options)
        query, key, value = poisoned(tensors, places)
        kinds: dict[str, list[int]] = {"near": [], "far": []}
        for piece in pieces(rows, random_cuts(rows, rng)):
            kinds[rng.choice(["near", "far"])] += piece
        near, far = (
            torch.cat([torch.arange(0), *(torch.arange(*pair) for pair in pairs_of(x))]).to(device)
            for x in kinds.values()
        )
        out = torch.full_like(query, 7.0)
        lse = torch.full_like(expected.lse, 7.0)
        for part in ("near", "far"):
            ops.attention_block_into(
                out,
                lse,
                query,
                key[:, near],
                value[:, near],
                key[:, far],
                value[:, far],
                rows,
                [0, rows],
                kinds["near"],
                kinds["far"],
                *BRANCHES,
                rows=part,
                sequences=torch.tensor(places, dtype=torch.int64).reshape(-1, 2),
                **options,
            )
        outside = in_gaps(places, rows).to(device)
        assert (out[:, outside] == 7.0).all() and (lse[:, :, outside] == 7.0).all()
        for actual, wanted, dim in ((out, expected.out, 1), (lse, expected.lse, 2)):
            kept = (~outside).nonzero()[:, 0]
            torch.testing.assert_close(
                actual.index_select(dim, kept),
                wanted.index_select(dim, kept),
                rtol=0,
                atol=10 * exact.forward,
            )
