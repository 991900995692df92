"""Sequences of several lengths, computed by one call each: what one call for all must equal."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from dilated_attention_pytorch import dilated_attention

Stretches = Sequence[tuple[int, int]]  # first row and length of each sequence


def alone(rows: Sequence[Tensor], stretches: Stretches, *branches: Any, **options: Any) -> Iterator:
    """(out [n, H, D], lse [H, n]) of each stretch of query, key and value [T, H, D]."""
    for first, length in stretches:
        inputs = (x[None, first : first + length] for x in rows)
        out, lse = dilated_attention(*inputs, *branches, return_lse=True, **options)
        yield out[0], lse[0]


def one_by_one(
    rows: Sequence[Tensor], stretches: Stretches, *branches: Any, **options: Any
) -> tuple[Tensor, Tensor]:
    """out [T, H, D] and lse [H, T]: of each stretch, and 0 and -inf in the padding between."""
    results = alone([x.detach() for x in rows], stretches, *branches, **options)
    out = torch.zeros_like(rows[0])
    wide = torch.float64 if out.dtype is torch.float64 else torch.float32
    lse = torch.full(out.shape[1::-1], -torch.inf, dtype=wide, device=out.device)
    for (first, length), result in zip(stretches, results, strict=True):
        span = slice(first, first + length)
        out[span], lse[:, span] = result
    return out, lse


def gradients_one_by_one(
    rows: Sequence[Tensor],
    weights: tuple[Tensor, Tensor],
    stretches: Stretches,
    *branches: Any,
    **options: Any,
) -> list[Tensor]:
    """Of rows [T, H, D], for gradients [T, H, D] and [H, T] of the results: 0 in padding."""
    leaves = [x.detach().requires_grad_() for x in rows]
    loss = torch.zeros((), dtype=leaves[0].dtype, device=leaves[0].device)
    results = alone(leaves, stretches, *branches, **options)
    for (first, length), (out, lse) in zip(stretches, results, strict=True):
        span = slice(first, first + length)
        loss = loss + (out * weights[0][span]).sum() + (lse * weights[1][:, span]).sum()
    if not loss.requires_grad:
        return [torch.zeros_like(x) for x in leaves]
    return list(torch.autograd.grad(loss, leaves))


def poisoned(rows: Tensor, stretches: Stretches) -> Tensor:
    """A copy of [T, ...] with NaN in every row of no stretch."""
    poisoned = torch.full_like(rows, torch.nan)
    for first, length in stretches:
        poisoned[first : first + length] = rows[first : first + length]
    return poisoned
