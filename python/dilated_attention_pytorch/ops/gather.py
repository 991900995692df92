"""torch.ops.dilated.gather, which packs a branch's rows, and its transpose, scatter_add.

gather_into and scatter_into write into the caller's memory.
"""

from __future__ import annotations

from torch import Tensor

from .typed import operator


@operator
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
    for h mod r. start + N < 2^31.
    """
    raise NotImplementedError


@operator
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
    raise NotImplementedError


@operator
def gather_into(
    packed: Tensor,
    input: Tensor,
    segment_length: int,
    dilation_rate: int,
    *,
    head_offsets: Tensor | None = None,
    start: int = 0,
) -> None:
    """packed [B, M, H, D] <- gather(input, ...); not differentiable.

    Raises ValueError if torch can tell that packed shares memory with input, or two of its elements
    a place.
    """
    raise NotImplementedError


@operator
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

    They replace the rows there or, with accumulate, are added to them; slots without a position are
    ignored. Not differentiable. Raises ValueError if torch can tell that rows shares memory with
    packed, or two of its elements a place.
    """
    raise NotImplementedError
