"""Which positions of a sequence each rank holds.

    contiguous    | 0 | 1 | 2 | 3 |
    zigzag        |0|1|2|3|3|2|1|0|     causal work is the same on all ranks

Of sequences one behind another, as a padded batch's rows are, each is divided so. Positions are
flat tuples of stretches, (begin, end, begin, end, ...), as a PatternSpec's.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import Literal, get_args

import torch
from torch import Tensor

from ...pattern.pattern import pairs_of
from .lattice import Piece, Span

ShardLayout = Literal["contiguous", "zigzag"]
LAYOUTS: tuple[str, ...] = get_args(ShardLayout)
Stretches = tuple[int, ...]


def check_layout(layout: str) -> str:
    """Raises ValueError if there is no such layout."""
    if layout not in LAYOUTS:
        raise ValueError(f"shard_layout must be one of {list(LAYOUTS)}, got {layout!r}")
    return layout


def stretches_per_rank(layout: str) -> int:
    return 2 if layout == "zigzag" else 1


def equal_lengths(rows: int, size: int, layout: str) -> tuple[int, ...]:
    """The lengths of all stretches where each rank has so many rows.

    Raises ValueError if they can't be equal.
    """
    each = stretches_per_rank(layout)
    if rows % each:
        raise ValueError(
            "shard_lengths: must be given where a rank's rows are no two equal stretches, "
            f"got {rows} rows"
        )
    return (rows // each,) * (size * each)


def spans_of(shard_lengths: Sequence[int]) -> tuple[Span, ...]:
    """The positions of all stretches: if contiguous, of each rank."""
    ends = list(accumulate(shard_lengths))
    return tuple((end - length, end) for length, end in zip(shard_lengths, ends, strict=True))


def shards(
    shard_lengths: Sequence[int], layout: str = "contiguous", size: int | None = None
) -> tuple[Stretches, ...]:
    """The positions of each rank.

    shard_lengths: of all stretches, in the sequence's order; of several sequences, the first's and
    so on. size: the number of ranks; None: as many as one sequence has.
    """
    spans = spans_of(shard_lengths)
    each = stretches_per_rank(layout)
    size = len(spans) // each if size is None else size
    held: list[Stretches] = [()] * size
    for first in range(0, len(spans), each * size):
        here = spans[first : first + each * size]
        for rank in range(size):
            held[rank] += here[rank] if each == 1 else here[rank] + here[-1 - rank]
    return tuple(held)


def count(stretches: Stretches) -> int:
    """Positions in them."""
    return sum(end - begin for begin, end in pairs_of(stretches))


def positions_of(stretches: Stretches) -> Tensor:
    """int64 [positions]"""
    return torch.cat([torch.arange(*stretch) for stretch in pairs_of(stretches)])


def halves(stretches: Stretches) -> tuple[Stretches, Stretches]:
    """The first half of the stretches and the others; a single one is cut in two."""
    if len(stretches) == 2:
        begin, end = stretches
        middle = (begin + end) // 2
        return (begin, middle), (middle, end)
    cut = len(stretches) // 4 * 2
    return stretches[:cut], stretches[cut:]


def gaps(stretches: Stretches, seq_len: int) -> list[Span]:
    """What of the sequence lies before, between and after them."""
    edges = (0, *stretches, seq_len)
    return pairs_of(edges)


def holds(stretches: Stretches, piece: Piece) -> bool:
    """Whether the piece lies in one of them."""
    pairs = pairs_of(stretches)
    return any(begin <= piece.begin and piece.end <= end for begin, end in pairs)


def place_origin(stretches: Stretches, piece: Piece) -> tuple[int, int]:
    """The position that row 0 of a tensor of these stretches would have, if all its rows followed
    those of the piece's stretch; and head 0.
    """
    before = 0
    for begin, end in pairs_of(stretches):
        if begin <= piece.begin and piece.end <= end:
            return begin - before, 0
        before += end - begin
    raise AssertionError(f"{piece} lies in none of {stretches}")
