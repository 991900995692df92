"""torch.ops.dilated.gather and its transpose, scatter_add: a branch's rows, packed. And both into
memory that the caller has."""

from __future__ import annotations

import torch
from torch import Tensor

_gather = torch.ops.dilated.gather.default
_scatter_add = torch.ops.dilated.scatter_add.default
_gather_into = torch.ops.dilated.gather_into.default
_scatter_into = torch.ops.dilated.scatter_into.default


def gather(
    input: Tensor,
    segment_length: int,
    dilation_rate: int,
    *,
    head_offsets: Tensor | None = None,
    start: int = 0,
) -> Tensor:
    """[B, N, H, D] -> [B, M, H, D]: the rows of the branch, segment by segment.

    Row n of the input has position start + n. A piece of a segment, len long, gives ceil(len / r)
    slots: head h's positions on its lattice, then zeros. head_offsets: int64 [H] on the CPU, None
    for h mod r.
    """
    result: Tensor = _gather(
        input, segment_length, dilation_rate, head_offsets=head_offsets, start=start
    )
    return result


def scatter_add(
    input: Tensor,
    packed: Tensor,
    segment_length: int,
    dilation_rate: int,
    *,
    head_offsets: Tensor | None = None,
    start: int = 0,
) -> Tensor:
    """input [B, N, H, D] plus the rows of packed [B, M, H, D], put where gather takes them from."""
    result: Tensor = _scatter_add(
        input, packed, segment_length, dilation_rate, head_offsets=head_offsets, start=start
    )
    return result


def gather_into(
    packed: Tensor,
    input: Tensor,
    segment_length: int,
    dilation_rate: int,
    *,
    head_offsets: Tensor | None = None,
    start: int = 0,
) -> None:
    """packed [B, M, H, D] <- gather(input, ...); not differentiable."""
    _gather_into(
        packed, input, segment_length, dilation_rate, head_offsets=head_offsets, start=start
    )


def scatter_into(
    rows: Tensor,
    packed: Tensor,
    segment_length: int,
    dilation_rate: int,
    *,
    head_offsets: Tensor | None = None,
    start: int = 0,
    accumulate: bool = False,
) -> None:
    """Puts the rows of packed [B, M, H, D] where gather takes them from rows [B, N, H, D].

    They replace what is there, or are added to it; slots without a position are ignored. Not
    differentiable.
    """
    _scatter_into(
        rows,
        packed,
        segment_length,
        dilation_rate,
        head_offsets=head_offsets,
        start=start,
        accumulate=accumulate,
    )
