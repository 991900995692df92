"""Rows of the sequence on a lattice, head by head: what ranks hand each other.

A branch's keys in one segment are, for each KV head, the positions p of a stretch with p mod rate
equal to one residue or, when the query heads that read the KV head differ in their offsets, to one
of several.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import groupby
from math import gcd

from ...pattern import PatternSpec
from ...pattern.branch import clip

Span = tuple[int, int]  # positions begin <= p < end
# Of one head: begin, end and residue of a stretch's lattice.
Strand = tuple[int, int, int]


def intersection(a: Span, b: Span) -> Span:
    """What two spans share; begin >= end where nothing."""
    return max(a[0], b[0]), min(a[1], b[1])


@dataclass(frozen=True, slots=True)
class Piece:
    """For each head first_head + i: the positions p of [begin, end) with p mod rate == residues[i].

    Packed as [batch, slots, heads, head_dim]: a head with one row fewer than another has an unused
    last slot.
    """

    begin: int
    end: int
    rate: int
    first_head: int
    residues: tuple[int, ...]

    @property
    def slots(self) -> int:
        return -(-(self.end - self.begin) // self.rate)

    @property
    def heads(self) -> int:
        return len(self.residues)

    @property
    def rows(self) -> int:
        """Rows of head_dim numbers for one batch entry, unused slots included."""
        return self.slots * self.heads

    def meets(self, other: Piece) -> bool:
        """Whether a head may have a row in both; may be wrongly true for short stretches."""
        if self.begin >= other.end or other.begin >= self.end:
            return False
        first = max(self.first_head, other.first_head)
        last = min(self.first_head + self.heads, other.first_head + other.heads)
        common = gcd(self.rate, other.rate)
        return any(
            (self.residues[head - self.first_head] - other.residues[head - other.first_head])
            % common
            == 0
            for head in range(first, last)
        )


@dataclass(frozen=True, slots=True)
class Lattice:
    """A branch of a pattern: of each KV head, the distinct offsets of the query heads that read it.

    `queries` has one offset for each query head, -1 where it is not in the branch. `numbers`: first
    position and length of each sequence, flat; without a batch, of one.
    """

    numbers: Sequence[int]
    segment_length: int
    rate: int
    keys: tuple[tuple[int, ...], ...]
    queries: tuple[int, ...]

    def segment(self, position: int) -> Span:
        """The segment that holds a position; an empty one if the position is in no sequence."""
        first, end = sequence_at(self.numbers, position)
        if position >= end:
            return position, position
        length = clip(self.segment_length, end - first)
        begin = first + (position - first) // length * length
        return begin, min(begin + length, end)


def sequence_numbers(spec: PatternSpec) -> Sequence[int]:
    """First position and length of each sequence, flat; without a batch, of one."""
    if spec.sequences is None:
        return (0, spec.seq_len)
    return memoryview(spec.sequences.numbers()).cast("q")


def sequence_at(numbers: Sequence[int], position: int) -> Span:
    """The last sequence that begins at the position or before; (0, 0) if none does."""
    i = bisect_right(range(0, len(numbers), 2), position, key=numbers.__getitem__) - 1
    first, length = numbers[2 * i : 2 * i + 2] if i >= 0 else (0, 0)
    return first, first + length


@lru_cache(maxsize=128)
def lattices(spec: PatternSpec) -> tuple[Lattice, ...]:
    """One for each branch, in order."""
    group = spec.heads // spec.kv_heads
    numbers = sequence_numbers(spec)
    result = []
    for branch, offsets in zip(spec.branches, spec.offset_table(), strict=True):
        keys = tuple(
            tuple(sorted(set(offsets[head * group : (head + 1) * group]) - {-1}))
            for head in range(spec.kv_heads)
        )
        lattice = Lattice(numbers, branch.segment_length, branch.dilation_rate, keys, offsets)
        result.append(lattice)
    return tuple(result)


def strand(span: Span, rate: int, residue: int) -> Strand | None:
    """The lattice's part of a span; None if it has no position."""
    begin, end = span
    return (begin, end, residue) if begin + (residue - begin) % rate < end else None


def make_pieces(
    strands: Sequence[Sequence[Strand]], rate: int, first_head: int = 0
) -> tuple[Piece, ...]:
    """The strands of heads first_head, first_head + 1, ... as pieces.

    A piece takes the k-th strand of neighbouring heads whose k-th strands have the same stretch.
    """
    pieces = []
    for k in range(max(map(len, strands), default=0)):
        column = [head[k] if len(head) > k else None for head in strands]
        head = first_head
        for stretch, group in groupby(column, lambda strand: strand and strand[:2]):
            run = list(group)
            if stretch:
                residues = tuple(strand[2] for strand in run if strand)
                pieces.append(Piece(stretch[0], stretch[1], rate, head, residues))
            head += len(run)
    return tuple(pieces)
