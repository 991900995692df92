"""Which exchange to use, from the number of bytes that each would move. Pure functions."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal, get_args

from ...pattern import PatternSpec
from ...pattern.pattern import pairs_of
from .head_plan import crossing_segments
from .lattice import Lattice, Span, intersection, lattices
from .layout import Stretches, count, shards, spans_of

Strategy = Literal["auto", "ring", "gather", "all_to_all"]
STRATEGIES: tuple[str, ...] = get_args(Strategy)

# "gather" may hold this many times a rank's own keys and values, or this many bytes if more: all
# of the others' where four ranks share the longest segment.
GATHER_SHARDS = 3
GATHER_BYTES = 256 * 2**20
# Rows with other ranks' keys, which "gather" computes once all have arrived. A larger share would
# leave too little to compute meanwhile, unless all arrives in about the time of a few launches.
GATHER_FAR_SHARE = 0.5
GATHER_QUICK_BYTES = 32 * 2**20
# "all_to_all" must move at most this fraction of what the others move: it rounds each branch's
# result once more, and can't hide the return of results.
ALL_TO_ALL_FRACTION = 0.5


@dataclass(frozen=True, slots=True)
class Sizes:
    """What turns rows into bytes.

    row: numbers in a row of one head, over the batch. element: bytes of one. wide: bytes of an
    accumulator's number, in which the gradients of keys and values return.
    """

    row: int
    element: int
    wide: int


def check_strategy(strategy: str) -> str:
    """Raises ValueError if there is no such strategy."""
    if strategy not in STRATEGIES:
        raise ValueError(f"strategy must be one of {list(STRATEGIES)}, got {strategy!r}")
    return strategy


@lru_cache(maxsize=256)
def choose_strategy(
    spec: PatternSpec,
    shard_lengths: tuple[int, ...],
    sizes: Sizes,
    *,
    has_dropout: bool = False,
    layout: str = "contiguous",
    size: int | None = None,
) -> str:
    """The strategy that "auto" stands for; the same on all ranks.

    "all_to_all" where it moves at most half of the bytes, forward and backward, of the busiest
    rank; that is from four ranks to a segment on, with as many KV heads as heads. It can't have
    dropout or a batch of sequences. Else "gather" where all that a rank receives fits a budget and
    most rows have own keys alone, else "ring". shard_lengths, layout, size: as of `shards`.
    """
    if layout != "contiguous" or spec.sequences is not None:
        return _gather_or_ring(spec, shards(shard_lengths, layout, size), sizes)
    spans = spans_of(shard_lengths)
    moved = max((keys_moved(spec, span, sizes) for span in spans), default=0.0)
    most = ALL_TO_ALL_FRACTION * moved
    if moved > 0 and not has_dropout and max(heads_moved(spec, spans, sizes)) <= most:
        return "all_to_all"
    return _gather_or_ring(spec, spans, sizes)


def _gather_or_ring(spec: PatternSpec, held: Sequence[Stretches], sizes: Sizes) -> str:
    """held: the positions of each rank."""
    position = _bytes_of_keys(spec, sizes)
    budget = max(GATHER_BYTES, GATHER_SHARDS * max(map(count, held), default=0) * position)
    needed = max((_reach(spec, stretches) for stretches in held), default=0)
    is_hidden = (
        needed * position <= GATHER_QUICK_BYTES or _far_share(spec, held) <= GATHER_FAR_SHARE
    )
    return "gather" if is_hidden and needed * position <= budget else "ring"


def keys_moved(spec: PatternSpec, span: Span, sizes: Sizes) -> float:
    """Bytes that a rank receives and returns under "ring" or "gather", forward and backward.

    Counts a share of 1 / rate of every stretch, and rows that several branches need for each.
    """
    if span[0] >= span[1]:
        return 0.0
    rows = 0.0
    for lattice in lattices(spec):
        heads = sum(map(len, lattice.keys)) / lattice.rate
        rows += heads * sum(_stretches(spec, lattice, span))
    # K and V twice, their gradients once
    return 2 * rows * sizes.row * (2 * sizes.element + sizes.wide)


def heads_moved(spec: PatternSpec, spans: Sequence[Span], sizes: Sizes) -> list[float]:
    """Bytes that each rank sends or receives under "all_to_all", forward and backward.

    Infinite where a segment has more ranks than KV heads, of which some would have nothing to do.
    """
    moved = [0.0] * len(spans)
    for lattice in lattices(spec):
        queries = sum(offset >= 0 for offset in lattice.queries)
        keys = sum(map(len, lattice.keys))
        given = sizes.element * (4 * queries + 4 * keys)  # q k v out, then q k v grad_out
        returned = sizes.wide * (queries + 2 * keys)
        row = (given + returned) * sizes.row / lattice.rate
        for segment in crossing_segments(lattice, spans):
            parts = [(rank, intersection(span, segment)) for rank, span in enumerate(spans)]
            held = {rank: end - begin for rank, (begin, end) in parts if begin < end}
            if len(held) > sum(len(offsets) > 0 for offsets in lattice.keys):
                return [math.inf] * len(spans)
            for rank, rows in held.items():
                others = sum(held.values()) - rows
                moved[rank] += row * max(rows * (len(held) - 1), others) / len(held)
    return moved


def _stretches(spec: PatternSpec, lattice: Lattice, span: Span) -> tuple[int, int]:
    """How many positions before and after a shard its segments reach."""
    before = span[0] - lattice.segment(span[0])[0]
    after = lattice.segment(span[1] - 1)[1] - span[1]  # -1 behind a sequence's end
    return before, 0 if spec.is_causal else max(after, 0)


def _far_share(spec: PatternSpec, held: Sequence[Stretches]) -> float:
    """How many of a head's query rows meet other ranks' keys, about: the share of those on the
    lattices of branches that cross ranks.
    """
    cuts = {cut for stretches in held for cut in stretches if cut < spec.seq_len}
    share = 0.0
    for lattice in lattices(spec):
        if any(lattice.segment(cut)[0] < cut for cut in cuts):
            heads = sum(offset >= 0 for offset in lattice.queries)
            share += heads / len(lattice.queries) / lattice.rate
    return min(share, 1.0)


def _reach(spec: PatternSpec, held: Stretches) -> int:
    """The rows that "gather" makes room for, beside the rank's own."""
    reached = 0
    end = 0  # of what is counted, or the rank's own
    for span in pairs_of(held):
        if span[0] >= span[1]:
            continue
        sides = [_stretches(spec, lattice, span) for lattice in lattices(spec)]
        before, after = (max(side) for side in zip(*sides, strict=True))
        reached += span[0] - max(end, span[0] - before)
        end = span[1] + after
        reached += after
    return min(reached, spec.seq_len - count(held))


def _bytes_of_keys(spec: PatternSpec, sizes: Sizes) -> int:
    """Bytes of one position's keys and values."""
    return 2 * spec.kv_heads * sizes.row * sizes.element
