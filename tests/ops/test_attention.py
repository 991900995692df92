"""attention against the dense float64 reference: outputs, log-sum-exps and all gradients."""

from __future__ import annotations

import dataclasses
import random
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.conftest import Exact, make_qkv
from tests.ops.calls import (
    HEAD_DIMS,
    assert_close,
    check_attention,
    output_gradients,
    run_operator,
)
from tests.planning import Spec, plan_tensor
from tests.reference import blocked_table, reference_attention

# name: (seq_len, segment_lengths, dilation_rates)
PATTERNS = {
    "nested": (96, [16, 32, 64], [1, 2, 4]),
    "not nested": (101, [7, 23, 60], [1, 2, 3]),
    "rate does not divide segment": (100, [10, 25], [3, 4]),
    "no rate of 1": (67, [16, 40], [2, 4]),
    "segment longer than sequence": (61, [1024, 10**12], [1, 4]),
    "rate larger than segment": (50, [4, 8], [1, 16]),
    "sequence shorter than rate": (3, [8], [5]),
    "one position": (1, [4, 8], [1, 2]),
    "the same branch twice": (48, [16, 16], [1, 1]),
    "several tiles": (300, [64, 256], [1, 2]),
    "dense": (130, [130], [1]),
    "segments of one": (20, [1, 5], [1, 2]),
}


def offset_table(kind: str, rates: list[int], heads: int) -> Tensor | None:
    if kind == "interleaved":
        return None
    if kind == "blocked":
        return blocked_table(rates, heads)
    rng = random.Random(5)
    return torch.tensor([[rng.randint(-1, r - 1) for _ in range(heads)] for r in rates])


@pytest.mark.parametrize("offsets", ["interleaved", "blocked", "table"])
@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("padding", ["masked", "zeros"])
@pytest.mark.parametrize("name", PATTERNS)
def test_equals_reference(
    name: str, padding: str, is_causal: bool, offsets: str, device: str, exact: Exact
) -> None:
    seq_len, lengths, rates = PATTERNS[name]
    tensors = make_qkv(
        seq_len, heads=6, head_dim=8, batch=2, kv_heads=3, dtype=exact.dtype, device=device
    )
    check_attention(
        tensors,
        lengths,
        rates,
        exact,
        head_offsets=offset_table(offsets, rates, 6),
        is_causal=is_causal,
        padding=padding,
    )


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("seed", range(10))
def test_random_patterns_equal_reference(
    seed: int, is_causal: bool, device: str, exact: Exact
) -> None:
    rng = random.Random(seed)
    seq_len, branches, kv_heads = rng.randint(2, 150), rng.randint(1, 4), rng.randint(1, 3)
    rates = [rng.randint(1, 9) for _ in range(branches)]
    lengths = [rng.randint(1, 200) for _ in range(branches)]
    heads = kv_heads * rng.randint(1, 3)
    tensors = make_qkv(
        seq_len, heads, 12, kv_heads=kv_heads, dtype=exact.dtype, device=device, seed=seed
    )
    table = offset_table(rng.choice(["interleaved", "blocked", "table"]), rates, heads)
    padding = rng.choice(["masked", "zeros"])
    check_attention(
        tensors, lengths, rates, exact, head_offsets=table, is_causal=is_causal, padding=padding
    )


@pytest.mark.parametrize("kv_heads", [1, 2, 4, 8])
@pytest.mark.parametrize("is_causal", [False, True])
def test_grouped_heads(kv_heads: int, is_causal: bool, device: str, exact: Exact) -> None:
    tensors = make_qkv(90, 8, 16, batch=2, kv_heads=kv_heads, dtype=exact.dtype, device=device)
    check_attention(tensors, [16, 64], [1, 4], exact, is_causal=is_causal)


@pytest.mark.parametrize("scale", [0.0, 1.0, -0.3, 2.5])
def test_scale(scale: float, device: str, exact: Exact) -> None:
    tensors = make_qkv(70, 4, 16, dtype=exact.dtype, device=device)
    check_attention(tensors, [16, 32], [1, 2], exact, scale=scale)


@pytest.mark.parametrize("with_grad_lse", [False, True])
def test_gradient_with_and_without_lse_in_the_loss(
    with_grad_lse: bool, device: str, exact: Exact
) -> None:
    tensors = make_qkv(70, 4, 16, dtype=exact.dtype, device=device)
    check_attention(tensors, [16, 32], [1, 2], exact, with_grad_lse=with_grad_lse)


def test_gradient_of_lse_alone(device: str, exact: Exact) -> None:
    q, k, v = make_qkv(70, 4, 16, dtype=exact.dtype, device=device, requires_grad=True)
    _, lse = torch.ops.dilated.attention(q, k, v, [16, 32], [2, 2])
    lse[torch.isfinite(lse)].sum().backward()
    assert v.grad is None or not v.grad.any()
    q64, k64, v64 = (x.detach().to("cpu", torch.float64).requires_grad_() for x in (q, k, v))
    expected = run_reference_lse_gradients(q64, k64, v64)
    for ours, theirs in zip((q.grad, k.grad), expected, strict=True):
        assert ours is not None
        assert (ours.cpu().double() - theirs).abs().max() <= exact.backward


def run_reference_lse_gradients(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, ...]:
    _, lse = reference_attention(q, k, v, [16, 32], [2, 2])
    return torch.autograd.grad(lse[torch.isfinite(lse)].sum(), (q, k))


@pytest.mark.parametrize("needed", [(0,), (1,), (2,), (0, 2)])
def test_gradients_of_some_inputs_only(needed: tuple[int, ...], device: str, exact: Exact) -> None:
    tensors = make_qkv(40, 4, 16, dtype=exact.dtype, device=device)
    everything = run_operator(tensors, [8, 16], [1, 2])
    inputs = [x.detach().requires_grad_(i in needed) for i, x in enumerate(tensors)]
    outputs = torch.ops.dilated.attention(*inputs, [8, 16], [1, 2])
    torch.autograd.backward(outputs, output_gradients(tensors[0]))
    for i, x in enumerate(inputs):
        if i in needed:
            assert x.grad is not None and torch.equal(x.grad, everything[2 + i])
        else:
            assert x.grad is None


@pytest.mark.parametrize("head_dim", HEAD_DIMS)
@pytest.mark.parametrize("is_causal", [False, True])
def test_head_dims(head_dim: int, is_causal: bool, device: str, exact: Exact) -> None:
    tensors = make_qkv(80, 4, head_dim, kv_heads=2, dtype=exact.dtype, device=device)
    check_attention(tensors, [16, 40], [1, 2], exact, is_causal=is_causal)


def test_uncovered_rows_give_zero_and_receive_nothing(device: str, exact: Exact) -> None:
    # Rate 4 and one head of offset 1, another in no branch at all.
    table = torch.tensor([[1, -1]])
    tensors = make_qkv(64, 2, 16, dtype=exact.dtype, device=device)
    result = check_attention(tensors, [32], [4], exact, head_offsets=table)
    covered = torch.zeros(64, 2, dtype=torch.bool, device=device)
    covered[1::4, 0] = True
    assert torch.isneginf(result.lse[0].T[~covered]).all()
    assert torch.isfinite(result.lse[0].T[covered]).all()
    for tensor in (result.out, *result[2:]):
        assert not tensor[0][~covered].any()
        assert tensor[0][covered].abs().amax(-1).min() > 0


def test_one_key_is_copied(device: str, exact: Exact) -> None:
    # Segments of one: out is v itself, lse the score, whatever the score is.
    q, k, v = make_qkv(33, 4, 16, dtype=exact.dtype, device=device)
    out, lse = torch.ops.dilated.attention(q, k, v, [1], [1])
    torch.testing.assert_close(out, v, rtol=exact.forward, atol=0)
    score = (q * k).sum(-1).transpose(1, 2) / 4
    torch.testing.assert_close(lse, score.to(lse.dtype), rtol=0, atol=exact.forward)


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("padding", ["masked", "zeros"])
def test_given_pattern_equals_own_planning(
    padding: str, is_causal: bool, device: str, exact: Exact
) -> None:
    tensors = make_qkv(120, 6, 16, kv_heads=2, dtype=exact.dtype, device=device)
    options: dict[str, Any] = {"is_causal": is_causal, "padding": padding}
    spec = Spec(120, [32, 50], [1, 3], 6, 2, None, is_causal, padding == "zeros")
    pattern = plan_tensor(spec, device)
    own = run_operator(tensors, [32, 50], [1, 3], **options)
    given = run_operator(tensors, [32, 50], [1, 3], pattern=pattern, **options)
    assert all(torch.equal(a, b) for a, b in zip(own, given, strict=True))


@pytest.mark.parametrize(
    "change",
    [
        {"seq_len": 119},
        {"segment_lengths": [32, 51]},
        {"dilation_rates": [1, 2]},
        {"heads": 12},
        {"kv_heads": 6},
        {"offsets": [[0] * 6, [0] * 6]},
        {"is_causal": True},
        {"zero_padding": True},
        {"queries": ((0, 60),)},
    ],
)
def test_pattern_of_another_call_is_refused(change: dict[str, Any]) -> None:
    tensors = make_qkv(120, 6, 16, kv_heads=2)
    right = Spec(120, [32, 50], [1, 3], 6, 2)
    torch.ops.dilated.attention(*tensors, [32, 50], [1, 3], pattern=plan_tensor(right))
    wrong = plan_tensor(dataclasses.replace(right, **change))
    with pytest.raises(ValueError, match="pattern"):
        torch.ops.dilated.attention(*tensors, [32, 50], [1, 3], pattern=wrong)


@pytest.mark.parametrize("row_tile", [16, 64])
@pytest.mark.parametrize("name", PATTERNS)
def test_tiles_of_either_height_give_the_same(
    name: str, row_tile: int, device: str, exact: Exact
) -> None:
    seq_len, lengths, rates = PATTERNS[name]
    tensors = make_qkv(seq_len, 4, 16, kv_heads=2, dtype=exact.dtype, device=device)
    spec = Spec(seq_len, lengths, rates, 4, 2, row_tile=row_tile)
    own = run_operator(tensors, lengths, rates)
    given = run_operator(tensors, lengths, rates, pattern=plan_tensor(spec, device))
    assert_close(given, own, exact)


def test_tiles_of_other_heights_are_refused(device: str, exact: Exact) -> None:
    tensors = make_qkv(120, 6, 16, kv_heads=2, dtype=exact.dtype, device=device)
    wrong = plan_tensor(Spec(120, [32, 50], [1, 3], 6, 2, row_tile=48), device)
    with pytest.raises(ValueError, match=r"pattern: .* 64 or 16 rows \(row_tile\), got 48"):
        torch.ops.dilated.attention(*tensors, [32, 50], [1, 3], pattern=wrong)


def test_a_pattern_for_the_forward_pass_alone_is_refused_by_the_backward(device: str) -> None:
    dtype = torch.float32
    q, k, v = make_qkv(50, 4, 16, kv_heads=2, dtype=dtype, device=device, requires_grad=True)
    spec = Spec(50, [32, 50], [1, 3], 4, 2)
    words, forward = (
        plan_tensor(dataclasses.replace(spec, directions=name), device)
        for name in ("both", "forward")
    )
    assert len(forward) < len(words)
    attention = torch.ops.dilated.attention
    out, lse = attention(q, k, v, [32, 50], [1, 3], pattern=words)
    same, same_lse = attention(q, k, v, [32, 50], [1, 3], pattern=forward)
    assert torch.equal(out, same) and torch.equal(lse, same_lse)
    out.sum().backward()
    with pytest.raises(ValueError, match="pattern: must have both tables .* got the forward table"):
        same.sum().backward()
    transposed = plan_tensor(dataclasses.replace(spec, directions="transposed"), device)
    with pytest.raises(ValueError, match="pattern: must have the forward table .* got the transp"):
        attention(q, k, v, [32, 50], [1, 3], pattern=transposed)


def test_second_derivatives_are_refused(device: str, exact: Exact) -> None:
    # There is no double backward; what must not happen is a wrong number.
    q, k, v = make_qkv(20, 2, 16, dtype=exact.dtype, device=device, requires_grad=True)
    out, _ = torch.ops.dilated.attention(q, k, v, [8], [1])
    (grad,) = torch.autograd.grad(out.square().sum(), q, create_graph=True)
    with pytest.raises(RuntimeError):
        (grad.square().sum() + q.sum()).backward()
