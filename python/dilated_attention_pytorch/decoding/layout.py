"""Which rows a cache that forgets keeps, and where: pure arithmetic, no tensors.

    branch w = 8, r = 2; a KV head whose query heads have the offsets 0 and 1; 11 positions so far

    positions of the open segment   8 9 10 | 11 12 13 14 15
    rows of offset 0                8 10  .  .
    rows of offset 1                9  .  .  .

A row is overwritten when the next segment's same place arrives. Rows past the open segment's, the
dots, are old ones, and never read.

A lattice that nests in another of its KV head, of shorter segments, has that one as its parent:
there its rows of the parent's open segment are, so it reads its own before that segment alone, and
keeps none of the last such segment within its own.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from ..pattern import Branch, Scheme
from ..pattern.bounds import SEQ_LEN_END

_WHOLE_TEXT = 2**62  # a segment that no text ends


class Lattice(NamedTuple):
    """Positions of one offset that query heads of one KV head have in common.

    parent: the branch of the lattice that it nests in, or -1. kept: positions of a segment below
    this are kept, in rows from `first` on.
    """

    branch: int
    offset: int
    heads: tuple[int, ...]
    parent: int
    kept: int
    first: int
    rows: int


@dataclass(frozen=True)
class Layout:
    """Of texts of at most `capacity` positions. `table` [branches, heads] is what the operators
    take: offset (-1 for none), first, parent, kept."""

    capacity: int
    segment_lengths: tuple[int, ...]
    dilation_rates: tuple[int, ...]
    lattices: tuple[Lattice, ...]
    rows: int
    table: tuple[tuple[tuple[int, int, int, int], ...], ...]


def grows(scheme: Scheme) -> bool:
    """Whether a segment is the whole text, so that its rows grow with it."""
    return max(scheme.segment_lengths) >= SEQ_LEN_END


def make_layout(scheme: Scheme, heads: int, kv_heads: int, capacity: int, grown: bool) -> Layout:
    """grown: the capacity will grow, so no segment ends at it: one that is the whole text keeps all
    of it, and the others what they keep at any capacity, as far as it goes."""
    branches = [Branch(w if w < SEQ_LEN_END else _WHOLE_TEXT, rate) for w, rate in scheme.branches]
    members = _members(branches, scheme.offset_table(heads), heads // kv_heads)
    lattices: list[Lattice] = []
    table = [[(-1, 0, -1, 0)] * heads for _ in branches]
    first = 0
    for (branch, kv_head, offset), its_heads in members.items():
        parent = _parent(branches, members, branch, kv_head, offset)
        length, rate = branches[branch]
        kept = length if grown else min(length, capacity)
        if parent >= 0 and kept != _WHOLE_TEXT:
            inner = branches[parent].segment_length
            kept = max(0, kept - 1) // inner * inner
        kept = min(kept, capacity)
        rows = max(0, -((offset - kept) // rate))
        lattices.append(Lattice(branch, offset, its_heads, parent, kept, first, rows))
        for head in its_heads:
            table[branch][head] = (offset, first, parent, kept)
        first += rows
    lengths, rates = zip(*branches, strict=True)
    return Layout(capacity, lengths, rates, tuple(lattices), first, tuple(map(tuple, table)))


Members = Mapping[tuple[int, int, int], tuple[int, ...]]  # (branch, KV head, offset) -> query heads


def _members(
    branches: Sequence[Branch], table: Sequence[Sequence[int]], group: int
) -> dict[tuple[int, int, int], tuple[int, ...]]:
    members: dict[tuple[int, int, int], tuple[int, ...]] = {}
    for branch, offsets in enumerate(table):
        for head, offset in enumerate(offsets):
            if 0 <= offset < branches[branch].segment_length:
                lattice = (branch, head // group, offset)
                members[lattice] = (*members.get(lattice, ()), head)
    return members


def _parent(
    branches: Sequence[Branch], members: Members, branch: int, kv_head: int, offset: int
) -> int:
    """The branch of longest segments whose lattice holds this one's positions for all its heads,
    in segments that this one's are made of; -1 if there is none."""
    length, rate = branches[branch]

    def order(other: int) -> tuple[int, int, int]:
        return (*branches[other], other)

    heads = set(members[branch, kv_head, offset])
    candidates = [
        other
        for other, (inner, step) in enumerate(branches)
        if order(other) < order(branch)
        and (length == _WHOLE_TEXT or length % inner == 0)
        and rate % step == 0
        and (inner % step == 0 or inner == length)  # so that lattices agree in every segment
        and heads <= set(members.get((other, kv_head, offset % step), ()))
    ]
    return max(candidates, key=order, default=-1)


def cuts(segment_lengths: Sequence[int], begins: Sequence[int], size: int) -> list[int]:
    """Where to cut `size` positions of texts that had begins, so that no piece crosses a segment:
    from 0 to size."""
    inner = {
        place
        for begin in set(begins)
        for length in segment_lengths
        for place in range(-begin % length, size, length)
    }
    return sorted({0, *inner, size})
