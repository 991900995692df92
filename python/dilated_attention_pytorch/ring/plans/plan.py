"""Which ranks need which rows of which others: the exchange of keys and values, as data.

Pure functions of the pattern and of the shards' lengths, the same on all ranks, without processes.
A rank holds stretches of the sequence, one or two, or as many of each sequence of a batch; they may
differ in length and be empty. If a
segment reaches from another rank's stretch into this one's, this rank needs the keys there that its
queries in the segment attend to. Stretches do not overlap, so that is one range for each pair of
stretches and branch, at the end of the other that faces this one:

    rank 0          rank 1          rank 2
    |---------------|---------------|---------------|
          [ segment of branch 0 : ]     <- what rank 1 needs of rank 0 is [...:)
    [         segment of branch 1         ]

A lattice that lies within another, their rates dividing, travels once, and so does what both
stretches of a rank need.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache

from ...pattern import PatternSpec
from ...pattern.pattern import pairs_of
from .lattice import (
    Lattice,
    Piece,
    Span,
    Strand,
    intersection,
    lattices,
    make_pieces,
    sequence_at,
    sequence_numbers,
    strand,
)
from .layout import Stretches, gaps, halves, shards


@dataclass(frozen=True, slots=True)
class Parcel:
    """Rows that travel between this rank and a peer, keys and values alike.

    repeated[i]: a later piece may hold rows of piece i too.
    """

    peer: int
    pieces: tuple[Piece, ...]
    repeated: tuple[bool, ...]

    @property
    def rows(self) -> int:
        """Rows of head_dim numbers for one batch entry and one of keys and values."""
        return sum(piece.rows for piece in self.pieces)

    @property
    def span(self) -> Span:
        return min(p.begin for p in self.pieces), max(p.end for p in self.pieces)


@dataclass(frozen=True, slots=True)
class Block:
    """Key rows at positions `keys`, of which `parcels` bring those that are needed."""

    keys: Stretches
    parcels: tuple[Parcel, ...]


@dataclass(frozen=True, slots=True)
class Round:
    """What a rank sends and receives at once, and what it computes with that."""

    sends: tuple[Parcel, ...]
    blocks: tuple[Block, ...]

    @property
    def receives(self) -> tuple[Parcel, ...]:
        return tuple(parcel for block in self.blocks for parcel in block.parcels)


@dataclass(frozen=True, slots=True)
class Plan:
    """A rank's share of the exchange. `queries`: its shard.

    rounds: as many on every rank; a rank may have no part in some. All ranks go through them in
    this order, so they never wait for each other in a circle.

    rows_sent, rows_received: of keys; as many of values, for each batch entry.
    """

    queries: Stretches
    rounds: tuple[Round, ...]

    @property
    def is_alone(self) -> bool:
        """Whether nothing is sent or received."""
        return not any(r.sends or r.blocks for r in self.rounds)

    @property
    def rows_sent(self) -> int:
        return sum(parcel.rows for r in self.rounds for parcel in r.sends)

    @property
    def rows_received(self) -> int:
        return sum(parcel.rows for r in self.rounds for parcel in r.receives)


@lru_cache(maxsize=256)
def make_plan(
    spec: PatternSpec,
    shard_lengths: tuple[int, ...],
    rank: int,
    strategy: str,
    layout: str = "contiguous",
    size: int | None = None,
) -> Plan:
    """The rounds of strategy "ring" (one peer each way at a time) or "gather" (all at once).

    shard_lengths, layout, size: as of `shards`.
    """
    held = shards(shard_lengths, layout, size)
    size = len(held)

    def parts(stretches: Stretches) -> list[Span]:
        # Under "gather" no piece lies in both halves of its rank's keys, whose gradients are apart.
        return pairs_of(sum(halves(stretches), ()) if strategy == "gather" else stretches)

    rounds = []
    for step in range(1, size):
        to, source = peers(rank, step, size)
        sends = _parcel(spec, to, parts(held[rank]), held[to])
        receives = _parcel(spec, source, parts(held[source]), held[rank])
        rooms = pairs_of(held[source])
        blocks = tuple(Block(_reach((parcel,), rooms), (parcel,)) for parcel in receives)
        rounds.append(Round(sends, blocks))
    if strategy == "gather":
        rounds = [_gather(rounds, gaps(held[rank], spec.seq_len))]
    return Plan(held[rank], tuple(rounds))


def peers(rank: int, step: int, size: int) -> tuple[int, int]:
    """Whom a rank sends to and receives from at a step 1 <= step < size.

    Each step pairs every rank with one peer in each direction. Where the number of ranks is a power
    of two, both are the same peer, and a group of 2^k neighbours is done after 2^k - 1 steps.
    """
    if size & (size - 1) == 0:
        return rank ^ step, rank ^ step
    return (rank + step) % size, (rank - step) % size


def _gather(rounds: Sequence[Round], rooms: Sequence[Span]) -> Round:
    """All rounds as one, with one block."""
    sends = sorted((m for r in rounds for m in r.sends), key=lambda m: m.peer)
    receives = sorted((m for r in rounds for m in r.receives), key=lambda m: m.peer)
    blocks = (Block(_reach(receives, rooms), tuple(receives)),) if receives else ()
    return Round(tuple(sends), blocks)


def _reach(parcels: Sequence[Parcel], rooms: Sequence[Span]) -> Stretches:
    """From the first to the last row of the parcels, in each of the rooms that has any."""
    pieces = [piece for parcel in parcels for piece in parcel.pieces]
    reach: Stretches = ()
    for begin, end in rooms:
        here = [piece for piece in pieces if begin <= piece.begin and piece.end <= end]
        if here:
            reach += (min(piece.begin for piece in here), max(piece.end for piece in here))
    return reach


def _parcel(
    spec: PatternSpec, peer: int, source: Sequence[Span], target: Stretches
) -> tuple[Parcel, ...]:
    """What the rank at `source` sends to the one at `target`; empty if nothing."""
    targets = [span for span in pairs_of(target) if span[0] < span[1]]
    pieces = [piece for span in source for piece in parcel_pieces(spec, span, targets)]
    if not pieces:
        return ()
    repeated = tuple(
        any(piece.meets(later) for later in pieces[i + 1 :]) for i, piece in enumerate(pieces)
    )
    return (Parcel(peer, tuple(pieces), repeated),)


def parcel_pieces(spec: PatternSpec, source: Span, targets: Sequence[Span]) -> tuple[Piece, ...]:
    """The rows of `source` that queries of `targets`, on another rank, attend to.

    targets: not empty, in the sequence's order.
    """
    if source[0] >= source[1]:
        return ()
    asked = list(_asked(spec, source, _in_reach(spec, source, targets)))
    if not asked:
        return ()
    # KV heads with the same offsets in every branch have the same strands.
    columns = list(zip(*(one.lattice.keys for one in asked), strict=True))
    strands = {column: _strands(column, asked) for column in set(columns)}
    pieces: list[Piece] = []
    for i, one in enumerate(asked):
        pieces += make_pieces([strands[column][i] for column in columns], one.lattice.rate)
    return tuple(pieces)


def _in_reach(spec: PatternSpec, source: Span, targets: Sequence[Span]) -> Sequence[Span]:
    """Those of the targets that a sequence joins with the source."""
    numbers = sequence_numbers(spec)
    begin = source[0] if spec.is_causal else sequence_at(numbers, source[0])[0]
    end = sequence_at(numbers, source[1] - 1)[1]
    first = bisect_right(targets, begin, key=lambda span: span[1])
    last = bisect_left(targets, end, key=lambda span: span[0])
    return targets[first:last]


@dataclass(frozen=True, slots=True)
class _Asked:
    """A segment of a branch that reaches from `stretch`, all of it in the source, to `queries`."""

    lattice: Lattice
    segment: Span
    stretch: Span
    queries: tuple[Span, ...]

    def is_asked(self, residue: int) -> bool:
        """Whether some query is on the lattice."""
        rate = self.lattice.rate
        return any(
            end - begin >= rate or strand((begin, end), rate, residue) is not None
            for begin, end in self.queries
        )


def _asked(spec: PatternSpec, source: Span, targets: Sequence[Span]) -> Iterator[_Asked]:
    """In order of rate, so that a lattice comes after those that it may lie in."""
    for lattice in sorted(lattices(spec), key=lambda lattice: lattice.rate):
        queries: dict[Span, list[Span]] = {}  # by segment
        for target in targets:
            nearest = target[0] if source[0] < target[0] else target[1] - 1
            segment = lattice.segment(nearest)
            queries.setdefault(segment, []).append(intersection(target, segment))
        for segment, here in queries.items():
            begin, end = intersection(source, segment)
            if begin < end:
                yield _Asked(lattice, segment, (begin, end), tuple(here))


def _strands(column: Sequence[tuple[int, ...]], asked: Sequence[_Asked]) -> list[list[Strand]]:
    """For each of `asked` the strands of a KV head, given its offsets in each; nested ones cut."""
    held: list[tuple[int, int, Span]] = []  # rate, residue, stretch
    result = []
    for offsets, one in zip(column, asked, strict=True):
        rate = one.lattice.rate
        here = []
        for offset in offsets:
            residue = (one.segment[0] + offset) % rate
            if not one.is_asked(residue):
                continue  # no query to attend to these keys
            rest = [one.stretch]
            for other_rate, other_residue, other in held:
                if rate % other_rate == 0 and residue % other_rate == other_residue:
                    rest = [part for span in rest for part in _without(span, other)]
            held.append((rate, residue, one.stretch))
            strands = (strand(span, rate, residue) for span in rest)
            here += [one for one in strands if one is not None]
        result.append(here)
    return result


def _without(span: Span, other: Span) -> list[Span]:
    """What of a span another leaves."""
    before = (span[0], min(span[1], other[0]))
    after = (max(span[0], other[1]), span[1])
    return [(begin, end) for begin, end in (before, after) if begin < end]
