"""Which ranks need which rows of which others: the exchange of keys and values, as data.

Pure functions of the pattern and of the shards' lengths, the same on all ranks, without processes.
Shards are contiguous; they may differ in length and be empty. If a segment reaches from another
rank's shard into this one's, this rank needs the keys there that its queries in the segment attend
to. Shards do not overlap, so that is one stretch for each pair of ranks and branch, at the end of
the other shard that faces this one:

    rank 0          rank 1          rank 2
    |---------------|---------------|---------------|
          [ segment of branch 0 : ]     <- the stretch of rank 0 that rank 1 needs is [...:)
    [         segment of branch 1         ]

A lattice that lies within another, their rates dividing, travels once.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate

from ...pattern import PatternSpec
from .lattice import (
    Lattice,
    Piece,
    Span,
    Strand,
    intersection,
    lattices,
    make_pieces,
    strand,
)


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
    """The key rows at positions `keys`, of which `parcels` bring those that are needed."""

    keys: Span
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

    queries: Span
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


def shards(shard_lengths: Sequence[int]) -> tuple[Span, ...]:
    """The positions of each rank."""
    ends = list(accumulate(shard_lengths))
    return tuple((end - length, end) for length, end in zip(shard_lengths, ends, strict=True))


@lru_cache(maxsize=256)
def make_plan(spec: PatternSpec, shard_lengths: tuple[int, ...], rank: int, strategy: str) -> Plan:
    """The rounds of strategy "ring" (one peer each way at a time) or "gather" (all at once)."""
    spans = shards(shard_lengths)
    size = len(spans)
    rounds = []
    for step in range(1, size):
        to, source = peers(rank, step, size)
        sends = _parcel(spec, to, spans[rank], spans[to])
        receives = _parcel(spec, source, spans[source], spans[rank])
        blocks = tuple(Block(parcel.span, (parcel,)) for parcel in receives)
        rounds.append(Round(sends, blocks))
    if strategy == "gather":
        rounds = [_gather(rounds, rank)]
    return Plan(spans[rank], tuple(rounds))


def peers(rank: int, step: int, size: int) -> tuple[int, int]:
    """Whom a rank sends to and receives from at a step 1 <= step < size.

    Each step pairs every rank with one peer in each direction. Where the number of ranks is a power
    of two, both are the same peer, and a group of 2^k neighbours is done after 2^k - 1 steps.
    """
    if size & (size - 1) == 0:
        return rank ^ step, rank ^ step
    return (rank + step) % size, (rank - step) % size


def _gather(rounds: Sequence[Round], rank: int) -> Round:
    """All rounds as one, with a block for the keys before this rank's and one for those after."""
    sends = sorted((m for r in rounds for m in r.sends), key=lambda m: m.peer)
    receives = sorted((m for r in rounds for m in r.receives), key=lambda m: m.peer)
    blocks = []
    for side in (
        tuple(m for m in receives if m.peer < rank),
        tuple(m for m in receives if m.peer > rank),
    ):
        if side:
            begins, ends = zip(*(parcel.span for parcel in side), strict=True)
            blocks.append(Block((min(begins), max(ends)), side))
    return Round(tuple(sends), tuple(blocks))


def _parcel(spec: PatternSpec, peer: int, source: Span, target: Span) -> tuple[Parcel, ...]:
    """What the rank at `source` sends to the one at `target`; empty if nothing."""
    pieces = parcel_pieces(spec, source, target)
    if not pieces:
        return ()
    repeated = tuple(
        any(piece.meets(later) for later in pieces[i + 1 :]) for i, piece in enumerate(pieces)
    )
    return (Parcel(peer, pieces, repeated),)


def parcel_pieces(spec: PatternSpec, source: Span, target: Span) -> tuple[Piece, ...]:
    """The rows of `source` that queries of `target`, another shard, attend to."""
    if source[0] >= source[1] or target[0] >= target[1]:
        return ()
    if spec.is_causal and source[0] > target[0]:
        return ()
    stretches = list(_stretches(spec, source, target))
    if not stretches:
        return ()
    # KV heads with the same offsets in every branch have the same strands.
    columns = list(zip(*(lattice.keys for lattice, _, _ in stretches), strict=True))
    strands = {column: _strands(column, stretches, source, target) for column in set(columns)}
    pieces: list[Piece] = []
    for i, (lattice, _, _) in enumerate(stretches):
        pieces += make_pieces([strands[column][i] for column in columns], lattice.rate)
    return tuple(pieces)


def _stretches(
    spec: PatternSpec, source: Span, target: Span
) -> Iterator[tuple[Lattice, Span, Span]]:
    """(branch, segment, its part of the source) where a segment reaches from source into target.

    In order of rate, so that a lattice comes after those that it may lie in.
    """
    nearest = target[0] if source[0] < target[0] else target[1] - 1
    for lattice in sorted(lattices(spec), key=lambda lattice: lattice.rate):
        segment = lattice.segment(nearest)
        begin, end = intersection(source, segment)
        if begin < end:
            yield lattice, segment, (begin, end)


def _strands(
    column: Sequence[tuple[int, ...]],
    stretches: Sequence[tuple[Lattice, Span, Span]],
    source: Span,
    target: Span,
) -> list[list[Strand]]:
    """For each stretch the strands of a KV head, given its offsets in each; nested ones cut."""
    is_before = source[0] < target[0]
    held: list[tuple[int, int, Span]] = []  # rate, residue, stretch
    result = []
    for offsets, (lattice, segment, stretch) in zip(column, stretches, strict=True):
        rate = lattice.rate
        wanted = intersection(target, segment)
        here = []
        for offset in offsets:
            residue = (segment[0] + offset) % rate
            if wanted[1] - wanted[0] < rate and strand(wanted, rate, residue) is None:
                continue  # no query to attend to these keys
            begin, end = stretch
            for other_rate, other_residue, other in held:
                if rate % other_rate == 0 and residue % other_rate == other_residue:
                    # All stretches meet at the edge of the source that faces the target.
                    begin, end = (
                        (begin, min(end, other[0]))
                        if is_before
                        else (
                            max(begin, other[1]),
                            end,
                        )
                    )
            held.append((rate, residue, stretch))
            rest = strand((begin, end), rate, residue)
            if rest is not None:
                here.append(rest)
        result.append(here)
    return result
