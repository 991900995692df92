"""attention against the dense float64 reference: outputs, log-sum-exps and all gradients, for
every option.
"""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
import torch.nn.functional as functional
from torch import Tensor

from tests.bounds import error_bounds
from tests.conftest import Exact, make_qkv
from tests.ops.calls import (
    Result,
    check_attention,
    output_gradients,
    run_operator,
    run_reference,
)
from tests.planning import Spec, plan_tensor
from tests.reference import blocked_table, interleaved_table, multiplicities

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
    from tests.reference import reference_attention

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


HEAD_DIMS = [8, 16, 24, 32, 40, 48, 64, 72, 80, 96, 100, 128, 160, 192, 256]


@pytest.mark.parametrize("head_dim", HEAD_DIMS)
@pytest.mark.parametrize("is_causal", [False, True])
def test_head_dims(head_dim: int, is_causal: bool, device: str, exact: Exact) -> None:
    tensors = make_qkv(80, 4, head_dim, kv_heads=2, dtype=exact.dtype, device=device)
    check_attention(tensors, [16, 40], [1, 2], exact, is_causal=is_causal)


def test_float32(device: str) -> None:
    for head_dim in (8, 48, 64, 128):
        tensors = make_qkv(150, 4, head_dim, kv_heads=2, dtype=torch.float32, device=device)
        check_attention(tensors, [32, 96], [1, 3], Exact(torch.float32, 1e-5, 5e-5))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
@pytest.mark.parametrize("is_causal", [False, True])
def test_16_bit_errors_stay_within_their_bounds(
    dtype: torch.dtype, head_dim: int, is_causal: bool, device: str
) -> None:
    lengths, rates = [32, 96], [1, 3]
    tensors = make_qkv(150, 4, head_dim, kv_heads=2, dtype=dtype, device=device)
    options = {"is_causal": is_causal, "with_grad_lse": False}
    actual = run_operator(tensors, lengths, rates, **options)
    expected = run_reference(tensors, lengths, rates, **options)
    for ours, given in zip(actual[2:], tensors, strict=True):
        assert ours.dtype == dtype and ours.shape == given.shape
    assert actual.out.dtype == dtype and actual.lse.dtype == torch.float32
    assert (actual.lse.cpu() - expected.lse).abs().max() <= 1e-5

    scale = head_dim**-0.5
    q, k, _ = (x.cpu().double() for x in tensors)
    counts = multiplicities(150, lengths, rates, interleaved_table(rates, 4), is_causal)
    scores = scale * torch.einsum("bqhd,bkhd->bhqk", q, k.repeat_interleave(2, dim=2))
    probabilities = counts * torch.exp(scores - expected.lse[..., None]).masked_fill(counts == 0, 0)
    bounds = error_bounds(
        dtype,
        tensors,
        probabilities,
        scale,
        output_gradients(tensors[0])[0],
        (expected.out, *expected[2:]),
    )
    for name, bound in bounds._asdict().items():
        error = (getattr(actual, name).cpu().double() - getattr(expected, name)).abs()
        worst = (error / bound).max().item()
        assert worst <= 1, f"{name}: {worst:.2f} times the bound"


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("head_dim", [48, 64, 128])
@pytest.mark.parametrize("shape", ["dense", "causal", "lattice"])
def test_16_bit_errors_are_those_of_pytorch(
    dtype: torch.dtype, head_dim: int, shape: str, device: str
) -> None:
    """Where dilated attention is ordinary attention, PyTorch's own kernel is the yardstick: at
    most 1.5x its error.
    """
    rate = 2 if shape == "lattice" else 1
    is_causal = shape == "causal"
    seq_len = 384
    tensors = make_qkv(seq_len, 4, head_dim, dtype=dtype, device=device)
    table = torch.zeros(1, 4, dtype=torch.int64)
    options: dict[str, Any] = {"is_causal": is_causal, "head_offsets": table}
    actual = run_operator(tensors, [seq_len], [rate], with_grad_lse=False, **options)
    expected = run_reference(tensors, [seq_len], [rate], with_grad_lse=False, **options)

    inputs = [x.detach()[:, ::rate].contiguous().requires_grad_() for x in tensors]
    theirs = functional.scaled_dot_product_attention(
        *(x.transpose(1, 2) for x in inputs), is_causal=is_causal
    ).transpose(1, 2)
    grad_out = output_gradients(tensors[0])[0][:, ::rate]
    yardstick = (theirs.detach(), *torch.autograd.grad(theirs, inputs, grad_out))
    names = [name for name in Result._fields if name != "lse"]
    for name, other in zip(names, yardstick, strict=True):
        exactly = getattr(expected, name)[:, ::rate]
        ours = (getattr(actual, name)[:, ::rate].cpu().double() - exactly).abs()
        other_error = (other.cpu().double() - exactly).abs()
        for measure in (torch.max, torch.mean):
            assert measure(ours) <= 1.5 * measure(other_error), f"{name}, {measure.__name__}"


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_large_scores_stay_finite(dtype: torch.dtype, device: str) -> None:
    # Logits of several thousand: exponentials that are not relative to the row's largest score
    # overflow.
    q, k, v = make_qkv(96, 4, 64, dtype=dtype, device=device)
    result = run_operator((q * 40, k * 40, v), [16, 64], [1, 4], with_grad_lse=False)
    for name, tensor in result._asdict().items():
        assert torch.isfinite(tensor).all(), name
    expected = run_reference((q * 40, k * 40, v), [16, 64], [1, 4], with_grad_lse=False)
    unit = torch.finfo(dtype).eps
    assert (result.out.cpu().double() - expected.out).abs().max() <= 4 * unit * 4 + 1e-3


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


@pytest.mark.parametrize(
    "layout", ["transposed", "packed qkv", "expanded batch", "last dim", "poison"]
)
def test_strided_inputs(layout: str, device: str, exact: Exact) -> None:
    tensors = make_qkv(75, 4, 24, batch=2, dtype=exact.dtype, device=device)
    if layout == "transposed":  # [B, H, N, D] in memory
        strided = tuple(x.transpose(1, 2).contiguous().transpose(1, 2) for x in tensors)
    elif layout == "packed qkv":
        strided = torch.stack(tensors, dim=2).unbind(2)
    elif layout == "expanded batch":
        tensors = tuple(x[:1].expand(2, -1, -1, -1).contiguous() for x in tensors)
        strided = tuple(x[:1].expand(2, -1, -1, -1) for x in tensors)
    elif layout == "last dim":  # the last dimension has a stride of 2
        strided = tuple(torch.stack((x, x + 1), dim=-1)[..., 0] for x in tensors)
    else:
        strided = make_qkv(75, 4, 24, batch=2, dtype=exact.dtype, device=device, poison=True)
    assert all(torch.equal(a, b) for a, b in zip(strided, tensors, strict=True))
    expected = run_operator(tensors, [16, 50], [1, 2])
    assert not strided[1].is_contiguous()
    actual = run_operator(strided, [16, 50], [1, 2])
    for name, ours, theirs in zip(Result._fields, actual, expected, strict=True):
        assert torch.equal(ours, theirs), name


def test_strided_output_gradient(device: str, exact: Exact) -> None:
    tensors = make_qkv(60, 4, 16, dtype=exact.dtype, device=device)
    expected = run_operator(tensors, [16], [1])
    inputs = [x.detach().requires_grad_() for x in tensors]
    out, lse = torch.ops.dilated.attention(*inputs, [16], [1])
    grad_out, grad_lse = output_gradients(tensors[0])
    strided = grad_out.transpose(1, 3).contiguous().transpose(1, 3)
    assert not strided.is_contiguous()
    grads = torch.autograd.grad((out, lse), inputs, (strided, grad_lse.mT.contiguous().mT))
    for ours, theirs in zip(grads, expected[2:], strict=True):
        assert torch.equal(ours, theirs)


def test_expanded_output_gradient(device: str, exact: Exact) -> None:
    # sum() sends a gradient of strides 0.
    tensors = make_qkv(60, 4, 16, dtype=exact.dtype, device=device, requires_grad=True)
    out, _ = torch.ops.dilated.attention(*tensors, [16], [1])
    expected = torch.autograd.grad(out, tensors, torch.ones_like(out), retain_graph=True)
    for ours, theirs in zip(torch.autograd.grad(out.sum(), tensors), expected, strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("shape", [(0, 16), (2, 0), (0, 0)])
def test_empty_batch_and_empty_sequence(shape: tuple[int, int], device: str, exact: Exact) -> None:
    batch, seq_len = shape
    tensors = make_qkv(seq_len, 4, 16, batch=batch, kv_heads=2, dtype=exact.dtype, device=device)
    result = run_operator(tensors, [8, 16], [1, 2])
    assert result.out.shape == (batch, seq_len, 4, 16)
    assert result.lse.shape == (batch, 4, seq_len)
    assert result.grad_query.shape == tensors[0].shape
    assert result.grad_key.shape == result.grad_value.shape == tensors[1].shape


def test_one_key_is_copied(device: str, exact: Exact) -> None:
    # Segments of one: out is v itself, lse the score, whatever the score is.
    q, k, v = make_qkv(33, 4, 16, dtype=exact.dtype, device=device)
    out, lse = torch.ops.dilated.attention(q, k, v, [1], [1])
    assert torch.equal(out, v)
    score = (q * k).sum(-1).transpose(1, 2) / 4
    torch.testing.assert_close(lse, score.to(lse.dtype), rtol=0, atol=exact.forward)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("is_causal", [False, True])
def test_repeated_calls_are_equal_bit_for_bit(
    dtype: torch.dtype, is_causal: bool, device: str
) -> None:
    tensors = make_qkv(500, 6, 32, batch=2, kv_heads=3, dtype=dtype, device=device)
    first = run_operator(tensors, [64, 200], [1, 3], is_causal=is_causal)
    for _ in range(3):
        again = run_operator(tensors, [64, 200], [1, 3], is_causal=is_causal)
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


def test_every_row_is_written(device: str, exact: Exact) -> None:
    # Uninitialised memory holds NaN in this mode, so a row that no kernel writes shows.
    tensors = make_qkv(130, 4, 24, batch=2, kv_heads=2, dtype=exact.dtype, device=device)
    torch.use_deterministic_algorithms(True)
    try:
        assert torch.utils.deterministic.fill_uninitialized_memory
        assert torch.empty(4, device=device).isnan().all()
        result = run_operator(tensors, [16, 48], [2, 4])
    finally:
        torch.use_deterministic_algorithms(False)
    assert not any(tensor.isnan().any() for tensor in result)


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
        {"queries": (0, 60)},
    ],
)
def test_pattern_of_another_call_is_refused(change: dict[str, Any]) -> None:
    import dataclasses

    tensors = make_qkv(120, 6, 16, kv_heads=2)
    right = Spec(120, [32, 50], [1, 3], 6, 2)
    torch.ops.dilated.attention(*tensors, [32, 50], [1, 3], pattern=plan_tensor(right))
    wrong = plan_tensor(dataclasses.replace(right, **change))
    with pytest.raises(ValueError, match="pattern"):
        torch.ops.dilated.attention(*tensors, [32, 50], [1, 3], pattern=wrong)


def test_second_derivatives_are_refused(device: str, exact: Exact) -> None:
    # There is no double backward; what must not happen is a wrong number.
    q, k, v = make_qkv(20, 2, 16, dtype=exact.dtype, device=device, requires_grad=True)
    out, _ = torch.ops.dilated.attention(q, k, v, [8], [1])
    (grad,) = torch.autograd.grad(out.square().sum(), q, create_graph=True)
    with pytest.raises(RuntimeError):
        (grad.square().sum() + q.sum()).backward()


def test_inputs_are_left_alone(device: str, exact: Exact) -> None:
    tensors = make_qkv(50, 4, 16, dtype=exact.dtype, device=device)
    before = [x.clone() for x in tensors]
    run_operator(tensors, [8, 32], [1, 2])
    assert all(torch.equal(a, b) for a, b in zip(tensors, before, strict=True))
