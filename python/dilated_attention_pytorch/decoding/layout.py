"""Which rows a cache keeps of one branch, and where: pure arithmetic, no tensors.

    branch w = 8, r = 2; a KV head whose query heads have the offsets 0 and 1; 11 positions so far

    positions of the open segment   8 9 10 | 11 12 13 14 15
    rows of offset 0                8 10  .  .
    rows of offset 1                9  .  .  .

A row is overwritten when the next segment's same place arrives. Rows past the open segment's, the
dots, are old ones, and never read.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from ..pattern import Branch, Scheme


class Lattice(NamedTuple):
    """Query heads of one offset, the same number of them for each of some KV heads.

    heads: query heads, those of a KV head side by side. first: the place of the first KV head's
    rows in the branch's buffer; the others' follow.
    """

    offset: int
    heads: tuple[int, ...]
    kv_heads: tuple[int, ...]
    first: int


class Places(NamedTuple):
    """Positions of a lattice: the index of the first, the row that it has, and how many."""

    first: int
    row: int
    size: int


@dataclass(frozen=True)
class BranchLayout:
    """A branch's lattices, those that some query head takes."""

    segment_length: int
    dilation_rate: int
    lattices: tuple[Lattice, ...]

    @property
    def buffers(self) -> int:
        """Pairs of a KV head and an offset, each with rows of its own."""
        return sum(len(lattice.kv_heads) for lattice in self.lattices)

    def rows(self, length: int) -> int:
        """Rows of each of them while a text has at most `length` positions."""
        return -(-min(self.segment_length, length) // self.dilation_rate)

    def places(self, offset: int, begin: int, end: int) -> Places:
        """Of the positions begin to end, all in one segment; their indices count from begin."""
        first = begin % self.segment_length
        before = self._before(offset, first)
        count = self._before(offset, first + end - begin) - before
        return Places(offset + before * self.dilation_rate - first, before, count)

    def _before(self, offset: int, position: int) -> int:
        return max(0, -((offset - position) // self.dilation_rate))


def branch_layouts(scheme: Scheme, heads: int, kv_heads: int) -> tuple[BranchLayout, ...]:
    """Each branch's; a KV head keeps the union of its query heads' lattices, each of them once."""
    table = scheme.offset_table(heads)
    return tuple(
        _branch_layout(branch, offsets, heads // kv_heads)
        for branch, offsets in zip(scheme.branches, table, strict=True)
    )


def _branch_layout(branch: Branch, offsets: Sequence[int], group: int) -> BranchLayout:
    heads_of: dict[tuple[int, int], list[int]] = {}  # (offset, KV head) -> query heads
    for head, offset in enumerate(offsets):
        if 0 <= offset < branch.segment_length:
            heads_of.setdefault((offset, head // group), []).append(head)
    alike: dict[tuple[int, int], list[int]] = {}  # (offset, query heads of a KV head) -> KV heads
    for (offset, kv_head), heads in heads_of.items():
        alike.setdefault((offset, len(heads)), []).append(kv_head)
    lattices: list[Lattice] = []
    first = 0
    for (offset, _), kv_heads in sorted(alike.items()):
        members = tuple(head for kv_head in kv_heads for head in heads_of[offset, kv_head])
        lattices.append(Lattice(offset, members, tuple(kv_heads), first))
        first += len(kv_heads)
    return BranchLayout(*branch, tuple(lattices))


def pieces(layouts: Sequence[BranchLayout], begin: int, end: int, most: int) -> list[int]:
    """Where to cut begin to end so that no piece crosses a segment or exceeds `most` positions."""
    cuts = [begin]
    while cuts[-1] < end:
        at = cuts[-1]
        ends = (at // w * w + w for w in (layout.segment_length for layout in layouts))
        cuts.append(min(at + most, end, *ends))
    return cuts
