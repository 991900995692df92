"""Gradients where scores are large but finite: the backward's weights are the forward's."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
import torch.nn.functional as functional
from torch import Tensor

from tests.conftest import make_qkv
from tests.ops.calls import Tensors, deterministic_mode, run_operator

SIZES = [91.0, 728.0, 8210.0, 32814.0, 46356.0]  # of q and k, whose product is the score
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def gradients(tensors: Tensors, lengths: list[int], rates: list[int], **options: Any) -> Any:
    return run_operator(tensors, lengths, rates, with_grad_lse=False, **options)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("head_dim", [8, 64, 128, 256])
@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("branches", [1, 3])
def test_a_lone_key_has_a_weight_of_one(
    dtype: torch.dtype, head_dim: int, deterministic: bool, branches: int, device: str
) -> None:
    """However often branches count it. Segments of one position, so that every key is alone."""
    for size, scale in itertools.product(SIZES, [1.0, head_dim**-0.5, 0.37]):
        q, _, v = make_qkv(70, 2, head_dim, dtype=dtype, device=device)
        q = torch.zeros_like(q)
        q[..., 0] = min(size, torch.finfo(dtype).max / 4)
        with deterministic_mode(deterministic):
            result = gradients((q, q, v), [1] * branches, [1] * branches, scale=scale)
        grad_out = gradients((q * 0, q * 0, v), [1], [1]).grad_value  # then exactly grad_out
        error = (result.grad_value.float() - grad_out.float()).abs().max() / grad_out.abs().max()
        assert error <= 2 * torch.finfo(dtype).eps, (size, scale, float(error))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("options", [{}, {"dropout_p": 0.3}])
@pytest.mark.parametrize("kv_heads", [1, 4])
def test_gradients_of_large_scores_are_finite_and_bounded(
    dtype: torch.dtype, is_causal: bool, options: dict[str, Any], kv_heads: int, device: str
) -> None:
    """A column of P sums to at most the queries that meet the key, whatever the scores."""
    seq_len, heads = 150, 4
    if options:
        options = options | {"dropout_seed": torch.tensor([3], device=device)}
    # Sums of float16's gradients must stay within the type.
    for size in (30.0, 300.0) if dtype == torch.float16 else (30.0, 1e3, 3e4):
        q, k, v = make_qkv(seq_len, heads, 48, kv_heads=kv_heads, dtype=dtype, device=device)
        q, k = q * size, k[:, :1].expand_as(k).contiguous() * size  # ties, at which lse rounds most
        result = gradients((q, k, v), [32, 150], [1, 3], is_causal=is_causal, **options)
        largest = gradients((q * 0, k * 0, v), [1], [1]).grad_value.float().abs().max()
        for name, tensor in result._asdict().items():
            assert torch.isfinite(tensor).all(), (name, size)
        meets = heads // kv_heads * seq_len / (1 - options.get("dropout_p", 0))
        assert result.grad_value.float().abs().max() <= meets * largest


def relative_errors(actual: Any, expected: Any) -> list[float]:
    pairs = zip(actual, expected, strict=True)
    return [float((a.double().cpu() - b).norm() / b.norm().clamp(min=1e-3)) for a, b in pairs]


def differentiated(function: Any, tensors: Any, grad_out: Tensor) -> tuple[Tensor, ...]:
    inputs = [x.detach().requires_grad_() for x in tensors]
    return torch.autograd.grad(function(*inputs), inputs, grad_out)


def dense(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    scores = torch.einsum("bqhd,bkhd->bhqk", q, k) * q.size(-1) ** -0.5
    return torch.einsum("bhqk,bkhd->bqhd", scores.softmax(-1), v)


def pytorch(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    rows = (x.transpose(1, 2) for x in (q, k, v))
    return functional.scaled_dot_product_attention(*rows).transpose(1, 2)


def ours(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    out: Tensor = torch.ops.dilated.attention(q, k, v, [q.size(1)], [1])[0]
    return out


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ["random", "near ties", "pairs of equal keys", "constant"])
@pytest.mark.parametrize("size", [1.0, 10.0, 100.0, 400.0])  # scores up to about 1e6
def test_errors_are_at_most_twice_those_of_pytorch(
    dtype: torch.dtype, kind: str, size: float, device: str
) -> None:
    """In the root mean square over several draws, as one draw's rounding can be lucky."""
    squares = torch.zeros(2, 3, dtype=torch.float64)
    for seed in range(6):
        q, k, v = make_qkv(64, 2, 32, dtype=dtype, device=device, seed=seed)
        if kind == "near ties":
            k = k[:, :1] + k / size**2
        elif kind == "pairs of equal keys":
            k = k[:, :32].repeat(1, 2, 1, 1)
        elif kind == "constant":
            q, k = torch.ones_like(q), torch.ones_like(k)
        tensors = [(q * size).to(dtype), (k * size).to(dtype), v]
        grad_out = make_qkv(64, 2, 32, dtype=dtype, device=device, seed=100 + seed)[0]
        exact = differentiated(dense, [x.double().cpu() for x in tensors], grad_out.double().cpu())
        for row, function in zip(squares, (ours, pytorch), strict=True):
            errors = relative_errors(differentiated(function, tensors, grad_out), exact)
            row += torch.tensor(errors, dtype=torch.float64).nan_to_num(1e9, 1e9) ** 2 / 6
    mine, other = squares.sqrt()
    assert (mine <= 2 * other + 2 * torch.finfo(dtype).eps).all(), (mine, other)


@pytest.mark.parametrize("dtype", DTYPES)
def test_blocks_keep_a_dominating_key_at_one(dtype: torch.dtype, device: str) -> None:
    """Over three blocks of keys, merged through lse: one key of each row is far above the rest."""
    ops, n = torch.ops.dilated, 96
    for size in (4.0, 300.0, 900.0):
        generator = torch.Generator().manual_seed(1)
        q = torch.nn.functional.one_hot(torch.randperm(n, generator=generator), n)
        q = (q[None, :, None] * size).to(device, dtype)
        k = (torch.eye(n, device=device)[None, :, None] * size).to(dtype)
        _, _, v = make_qkv(n, 1, n, dtype=dtype, device=device)
        grad_out = make_qkv(n, 1, n, dtype=dtype, device=device, seed=5)[0]
        branches, options = ([n], [1]), {"scale": 20.0 / size if size < 10 else 1.0}
        out = lse = None
        blocks = [(0, 30), (64, n), (30, 64)]
        for begin, end in blocks:
            keys, values = k[:, begin:end], v[:, begin:end]
            out, lse = ops.attention_block(
                q, keys, values, n, 0, begin, *branches, out=out, lse=lse, partial=True, **options
            )
        parts = [
            ops.attention_block_backward(
                grad_out,
                None,
                q,
                k[:, begin:end],
                v[:, begin:end],
                out.to(dtype),
                lse,
                n,
                0,
                begin,
                *branches,
                partial=True,
                **options,
            )
            for begin, end in blocks
        ]
        grad_value = torch.cat([parts[0][2], parts[2][2], parts[1][2]], 1)
        weights = q[0, :, 0].double().T / size  # row t: the query that key t dominates
        right = weights @ grad_out[0, :, 0].double()
        error = (grad_value[0, :, 0].double() - right).abs().max() / right.abs().max()
        assert error <= 2 * torch.finfo(dtype).eps, (size, float(error))
