"""Heads for sequence: the exchange of strategy "all_to_all", as data.

Of a branch that crosses ranks, the ranks that share a segment divide its KV heads among
themselves. Each gets all rows of the segment for its heads, computes, and hands the result back:

    segment, by ranks and heads           the same, as it is computed

             rank 0  rank 1                        rank 0    rank 1
    head 0  |  0   |  1   |               head 0  | all of |
    head 1  |  0   |  1   |       ->      head 1  | it     |
    head 2  |  0   |  1   |               head 2           | all of |
    head 3  |  0   |  1   |               head 3           | it     |

Pure functions, the same on all ranks, without processes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache

from ...pattern import PatternSpec
from .lattice import Lattice, Piece, Span, Strand, intersection, lattices, make_pieces, strand
from .layout import spans_of


@dataclass(frozen=True, slots=True)
class Part:
    """A rank's rows of a share: the positions `rows`, of which those in the pieces travel."""

    rank: int
    rows: Span
    queries: tuple[Piece, ...]
    keys: tuple[Piece, ...]


@dataclass(frozen=True, slots=True)
class Share:
    """Some heads of one branch at the positions `rows`, whole segments, computed by one rank.

    parts: who holds the rows. With a single part, the owner's, nothing travels and there may be
    several segments.
    """

    branch: int
    rows: Span
    owner: int
    kv_heads: Span
    query_heads: Span
    parts: tuple[Part, ...]

    def part_of(self, rank: int) -> Part | None:
        return next((part for part in self.parts if part.rank == rank), None)


@dataclass(frozen=True, slots=True)
class HeadPlan:
    """A rank's part in the exchange.

    whole: the branches that cross no ranks anywhere. shares: what it computes or has rows of, in an
    order that all ranks agree on.
    """

    rank: int
    rows: Span
    whole: tuple[int, ...]
    shares: tuple[Share, ...]

    @property
    def own(self) -> tuple[Share, ...]:
        """What this rank computes."""
        return tuple(share for share in self.shares if share.owner == self.rank)

    @property
    def inner(self) -> tuple[Share, ...]:
        """The shares of `own` that have only this rank's rows."""
        return tuple(share for share in self.own if len(share.parts) == 1)

    @property
    def divided(self) -> tuple[Share, ...]:
        """The shares of `own` that have rows of other ranks too."""
        return tuple(share for share in self.own if len(share.parts) > 1)

    @property
    def mine(self) -> tuple[tuple[Share, Part], ...]:
        """The shares that are divided among ranks, with this rank's rows."""
        divided = ((s, s.part_of(self.rank)) for s in self.shares if len(s.parts) > 1)
        return tuple((share, part) for share, part in divided if part is not None)

    def outgoing(self, peer: int) -> list[tuple[Share, Part]]:
        """The shares that the peer computes, with this rank's rows of them."""
        if peer == self.rank:
            return []
        parts = ((s, s.part_of(self.rank)) for s in self.shares if s.owner == peer)
        return [(share, part) for share, part in parts if part is not None]

    def incoming(self, peer: int) -> list[tuple[Share, Part]]:
        """The shares that this rank computes, with the peer's rows of them."""
        if peer == self.rank:
            return []
        parts = ((s, s.part_of(peer)) for s in self.own)
        return [(share, part) for share, part in parts if part is not None]


@lru_cache(maxsize=256)
def make_head_plan(spec: PatternSpec, shard_lengths: tuple[int, ...], rank: int) -> HeadPlan:
    spans = spans_of(shard_lengths)
    whole: list[int] = []
    shares: list[Share] = []
    for index, lattice in enumerate(lattices(spec)):
        segments = crossing_segments(lattice, spans)
        if not segments:
            whole.append(index)
            continue
        here = [s for s in segments if _overlap(spans[rank], s)]
        for segment in here:
            shares += _divide(spec, index, lattice, segment, spans, rank)
        inner = inner_rows(lattice, spans[rank])
        if inner[0] < inner[1]:
            heads = ((0, spec.kv_heads), (0, spec.heads))
            shares.append(Share(index, inner, rank, *heads, (Part(rank, inner, (), ()),)))
    return HeadPlan(rank, spans[rank], tuple(whole), tuple(shares))


def crossing_segments(lattice: Lattice, spans: Sequence[Span]) -> list[Span]:
    """The segments that have rows on more than one rank."""
    found: list[Span] = []
    for _, cut in spans:
        segment = lattice.segment(cut)
        if segment[0] < cut < segment[1] and segment not in found[-1:]:
            found.append(segment)
    return found


def inner_rows(lattice: Lattice, span: Span) -> Span:
    """The rows of a rank's whole segments; begin >= end if it has none."""
    first, last = lattice.segment(span[0]), lattice.segment(span[1])
    begin = span[0] if first[0] == span[0] else first[1]
    return begin, last[0]


def divide_heads(lattice: Lattice, members: int) -> list[Span]:
    """The KV heads that are in the branch, divided as evenly as whole heads allow."""
    heads = [head for head, offsets in enumerate(lattice.keys) if offsets]
    cuts = [len(heads) * i // members for i in range(members + 1)]
    return [
        (heads[a], heads[b - 1] + 1) if a < b else (0, 0)
        for a, b in zip(cuts, cuts[1:], strict=False)
    ]


def _divide(
    spec: PatternSpec,
    index: int,
    lattice: Lattice,
    segment: Span,
    spans: Sequence[Span],
    rank: int,
) -> Iterator[Share]:
    """All shares of a segment that has rows of the rank; pieces only where the rank sends or
    receives them."""
    members = [(i, intersection(span, segment)) for i, span in enumerate(spans)]
    members = [(i, rows) for i, rows in members if rows[0] < rows[1]]
    group = spec.heads // spec.kv_heads
    heads_of = divide_heads(lattice, len(members))
    for (owner, _), kv_heads in zip(members, heads_of, strict=True):
        if kv_heads[0] == kv_heads[1]:
            continue
        query_heads = (kv_heads[0] * group, kv_heads[1] * group)
        parts = tuple(
            Part(
                member,
                rows,
                _pieces(lattice.queries, lattice, segment[0], rows, query_heads),
                _pieces(lattice.keys, lattice, segment[0], rows, kv_heads),
            )
            if rank in (owner, member)
            else Part(member, rows, (), ())
            for member, rows in members
        )
        yield Share(index, segment, owner, kv_heads, query_heads, parts)


def _pieces(
    offsets: Sequence[int] | Sequence[tuple[int, ...]],
    lattice: Lattice,
    segment_begin: int,
    rows: Span,
    heads: Span,
) -> tuple[Piece, ...]:
    strands: list[list[Strand]] = []
    for offset in offsets[heads[0] : heads[1]]:
        each = offset if isinstance(offset, tuple) else (offset,)
        found = (
            strand(rows, lattice.rate, (segment_begin + o) % lattice.rate) for o in each if o >= 0
        )
        strands.append([s for s in found if s is not None])
    return make_pieces(strands, lattice.rate, heads[0])


def _overlap(a: Span, b: Span) -> bool:
    begin, end = intersection(a, b)
    return begin < end
