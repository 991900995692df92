"""torch.ops.dilated.decode_attend, decode_append, decode_step: a text's end over a cache.

All that they need of the present lies on the device, so a CUDA graph that captured them can be
replayed for every step.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from .typed import operator


@operator
def decode_attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    lengths: Tensor,
    lattices: Tensor,
    segment_lengths: Sequence[int],
    dilation_rates: Sequence[int],
    kv_heads: int,
    *,
    counts: Tensor | None = None,
    scale: float | None = None,
) -> tuple[Tensor, Tensor]:
    """(out like query, lse [B, H, n]) of causal queries [B, n, H, D] at the ends of texts.

    key, value: [B, rows, D], a cache that forgets, or [B, N, kv_heads, D], one that holds every
    position. lengths: int64 [B], positions of each text; query i has position lengths - counts + i.
    counts: int64 [B], how many of the n are a text's, all by default; the others have out 0 and lse
    -inf, as has a query that no branch holds. Of a cache that forgets, the n positions must lie in
    one segment of every branch. lattices: int64 [branches, H, 4], as `decoding.layout` makes them;
    of a full cache only offset and parent are read. Not differentiable; at most 16 branches.
    """
    raise NotImplementedError


@operator
def decode_append(
    key_rows: Tensor,
    value_rows: Tensor,
    lengths: Tensor,
    key: Tensor,
    value: Tensor,
    lattices: Tensor,
    segment_lengths: Sequence[int],
    dilation_rates: Sequence[int],
    *,
    counts: Tensor | None = None,
    max_seq_len: int | None = None,
) -> None:
    """Puts key and value [B, n, Hkv, D], the positions after `lengths`, into a cache that forgets,
    and adds counts, n by default, to lengths.

    Of each lattice those are kept that lie in the segment of the last. A text that would get longer
    than max_seq_len raises ValueError on the CPU, and stops a GPU.
    """
    raise NotImplementedError


@operator
def decode_step(
    key_rows: Tensor,
    value_rows: Tensor,
    lengths: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    lattices: Tensor,
    segment_lengths: Sequence[int],
    dilation_rates: Sequence[int],
    *,
    counts: Tensor | None = None,
    scale: float | None = None,
    max_seq_len: int | None = None,
) -> tuple[Tensor, Tensor]:
    """`decode_append`, then `decode_attend` from what was appended; of one position, on a GPU, at
    once."""
    raise NotImplementedError
