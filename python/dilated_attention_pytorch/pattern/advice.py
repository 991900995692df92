"""Warnings about patterns that are right, but seldom what was meant.

Each kind is given once a process, by `warnings.warn`, when a pattern is planned: calls whose
pattern is cached pay nothing, and compilers trace none of it.
"""

from __future__ import annotations

import sys
import warnings
from contextvars import ContextVar
from pathlib import Path
from typing import TYPE_CHECKING

from .. import _C
from .branch import clip

if TYPE_CHECKING:
    from .pattern import PatternSpec

_FEW_PAIRS = 2**24  # computed in well under a millisecond, whatever the waste
_WINDOW = 256  # positions that are checked one by one; patterns repeat
_PACKAGE = str(Path(__file__).parents[1])
_given: set[str] = set()


_is_part: ContextVar[bool] = ContextVar("_is_part", default=False)


class PartOfPattern:
    """A context in which nothing is advised: what is planned is part of a pattern, some branches
    and heads of it, that was looked at as a whole.
    """

    __slots__ = ("_token",)

    def __enter__(self) -> None:
        self._token = _is_part.set(True)

    def __exit__(self, *error: object) -> None:
        _is_part.reset(self._token)


def advise(spec: PatternSpec) -> None:
    """Warns of what is odd about the pattern, unless that kind was given before."""
    if _is_part.get():
        return
    for kind in (swapped_lists, uncovered_positions, small_segments, drifting_segments):
        if kind.__name__ not in _given and (text := kind(spec)) is not None:
            _given.add(kind.__name__)
            warnings.warn(text, UserWarning, stacklevel=level_of_caller())


def swapped_lists(spec: PatternSpec) -> str | None:
    """A rate that leaves at most one position of a segment."""
    for length, rate in spec.branches:
        if rate >= length and rate > 1:
            return (
                "dilation_rates should be below their segment lengths, got a rate of "
                f"{rate} for segments of {length}, in which a head then has at most one position, "
                "which attends only to itself: are segment_lengths and dilation_rates swapped?"
            )
    return None


def uncovered_positions(spec: PatternSpec) -> str | None:
    """A position that is in no branch for some head."""
    if not isinstance(spec.head_offsets, tuple) and any(rate == 1 for _, rate in spec.branches):
        return None
    offsets_of_head = list(zip(*spec.offset_table(), strict=True))
    for offsets in dict.fromkeys(offsets_of_head):
        lattices = [(*b, o) for b, o in zip(spec.branches, offsets, strict=True) if o >= 0]
        for p in range(min(spec.seq_len, _WINDOW)):
            if not any(p % length % rate == offset for length, rate, offset in lattices):
                return (
                    "segment_lengths, dilation_rates and head_offsets should cover every position, "
                    f"got none that holds position {p} for head {offsets_of_head.index(offsets)}: "
                    "such outputs are 0. Add a branch of dilation rate 1"
                )
    return None


def small_segments(spec: PatternSpec) -> str | None:
    """Segments that leave most of each tile empty."""
    if spec.seq_len == 0:
        return None
    lengths = [clip(length, spec.seq_len) for length, _ in spec.branches]
    cell = min(lengths)  # a tile's rows lie between two neighbouring segment ends
    rates = [rate for _, rate in spec.branches]
    sizes = [(-(-cell // r), -(-w // r)) for w, r in zip(lengths, rates, strict=True)]
    cells = spec.heads * spec.seq_len / cell
    held = cells * sum(rows * keys for rows, keys in sizes)
    computed = cells * min(_computed(sizes, tile) for tile in _C.TILES)
    if computed < _FEW_PAIRS or computed <= 4 * held:
        return None
    fewest, columns = _C.TILES[-1]
    return (
        f"segment_lengths should be at least {fewest} times their dilation rates, got "
        f"{[length for length, _ in spec.branches]} with rates {rates}: tiles of {fewest} rows and "
        f"{columns} keys stay mostly empty, and about {computed / held:.0f} times the pairs are "
        "computed"
    )


def drifting_segments(spec: PatternSpec) -> str | None:
    """Segments for which torchscale computes something else."""
    if spec.padding != "zeros":
        return None
    for length, rate in spec.branches:
        if length < spec.seq_len and length % rate != 0:
            return (
                "segment_lengths should be multiples of their dilation rates with padding='zeros', "
                f"got segments of {length} with a rate of {rate}: torchscale's own segments drift "
                "out of place there, which is not reproduced, so weights trained with it meet "
                "another pattern"
            )
    return None


def _computed(sizes: list[tuple[int, int]], tile: tuple[int, int]) -> int:
    """Pairs in such tiles, of blocks of so many (rows, keys)."""
    height, width = tile
    return sum(-(-rows // height) * height * -(-keys // width) * width for rows, keys in sizes)


def level_of_caller() -> int:
    """The stacklevel with which the caller's warn() names the first line outside this package."""
    frame, level = sys._getframe(1).f_back, 2
    while frame is not None and frame.f_code.co_filename.startswith(_PACKAGE):
        frame, level = frame.f_back, level + 1
    return level
