"""Rings of many ranks on paper, from their plans alone: writes a table into docs/ring.md.

    python -m benchmarks.simulate

The workload is llm-256k-whole with 65,536 positions a rank: 32 heads of 128, bfloat16, segments of
2048 to 131072 and of the whole, rates 1 to 16. Nothing runs. A rank computes its pairs at
FLOPS; a message takes LATENCY and its bytes at the link's speed; an exchange is hidden under what
the strategy computes meanwhile. Ranks are a sample, of which the slowest counts.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache, cached_property
from typing import Any

from dilated_attention_pytorch.pattern import Pattern, PatternSpec, make_branches
from dilated_attention_pytorch.ring.plans.choose_strategy import Sizes, heads_moved
from dilated_attention_pytorch.ring.plans.layout import equal_lengths, shards, spans_of
from dilated_attention_pytorch.ring.plans.plan import Plan, make_plan

from .report import replace_section
from .results import ROOT
from .tables import Line, table

ROWS, HEADS, HEAD_DIM = 65536, 32, 128  # of a rank
SEGMENTS, RATES = (2048, 8192, 32768, 131072), (1, 2, 4, 8, 16)
FLOPS = 5e14  # a second, of one GPU
LINKS = {"NVLink": 360e9, "400 Gbit/s": 50e9, "50 Gbit/s": 6.25e9}  # bytes a second, each way
LATENCY = 20e-6
BACKWARD = 2.5  # products, over those of the forward
NODE = 8
TWO_LEVELS = "gather, once a node"  # not implemented


@dataclass(frozen=True)
class Setting:
    """So many ranks in a layout."""

    size: int
    is_causal: bool
    layout: str

    @cached_property
    def lengths(self) -> tuple[int, ...]:
        return equal_lengths(ROWS, self.size, self.layout)

    @cached_property
    def spec(self) -> PatternSpec:
        branches = make_branches((*SEGMENTS, ROWS * self.size), RATES)
        return PatternSpec(
            ROWS * self.size,
            branches,
            "interleaved",
            HEADS,
            HEADS,
            self.is_causal,
            directions="forward",
        )

    @property
    def sample(self) -> tuple[int, ...]:
        return tuple(sorted({0, self.size // 2, self.size - 1}))

    def plan(self, rank: int, strategy: str) -> Plan:
        return make_plan(self.spec, self.lengths, rank, strategy, self.layout)

    def seconds(self, rank: int, rows: str) -> float:
        """Of the forward's products of a rank: its own keys', those of near rows, or all."""
        own = shards(self.lengths, self.layout)[rank]
        (r,) = self.plan(rank, "gather").rounds
        far = r.blocks[0].keys if r.blocks else ()
        changes: dict[str, dict[str, Any]] = {
            "own": {},
            "near": {"far_keys": far, "rows": "near"},
            "all": {"far_keys": far},
        }
        return _seconds(self.spec._replace(queries=own, keys=own, **changes[rows]))


@cache
def _seconds(spec: PatternSpec) -> float:
    return 4.0 * HEAD_DIM * Pattern.plan(spec).report()["distinct"] / FLOPS


def bytes_of(rows: int) -> float:
    """Of keys and values, in 16 bit."""
    return rows * 2.0 * HEAD_DIM * 2


def gather(setting: Setting, rank: int, speed: float, factor: float, levels: int = 1) -> float:
    """Seconds. factor: 1 forward; backward, in which gradients return in float32, 2.5."""
    plan = setting.plan(rank, "gather")
    messages = max(len(plan.rounds[0].sends), len(plan.rounds[0].receives))
    moved = (
        bytes_of(max(plan.rows_sent, plan.rows_received)) if levels == 1 else two_levels(setting)
    )
    wire = moved / speed + messages * LATENCY
    if levels == 2:
        wire += bytes_of(plan.rows_received) / LINKS["NVLink"]
    whole = setting.seconds(rank, "all")
    if factor == 1.0:
        meanwhile = setting.seconds(rank, "near")
        return max(meanwhile, wire) + whole - meanwhile
    meanwhile = setting.seconds(rank, "own")
    half = factor * meanwhile / 2  # of own keys, before the others' and after
    return factor * (whole - meanwhile) + max(half, wire) + max(half, 2 * wire)


def ring(setting: Setting, rank: int, speed: float, factor: float) -> float:
    """A round's exchange is hidden under the block before, gradients' return under the next."""
    plan = setting.plan(rank, "ring")
    own, whole = (setting.seconds(rank, rows) for rows in ("own", "all"))
    received = max(plan.rows_received, 1)
    total, block = 0.0, factor * own
    returning = 0.0
    for r in plan.rounds:
        rows = [sum(parcel.rows for parcel in parcels) for parcels in (r.sends, r.receives)]
        wire = bytes_of(max(rows)) / speed + LATENCY if max(rows) else 0.0
        total += max(block, wire + returning)
        block = factor * (whole - own) * rows[1] / received
        returning = 2 * wire if factor > 1 else 0.0
    return total + block + returning


def all_to_all(setting: Setting, speed: float, factor: float) -> float:
    """Branches that cross ranks are divided evenly; the return of their results is not hidden."""
    forward = max(heads_moved(setting.spec, spans_of(setting.lengths), Sizes(HEAD_DIM, 2, 0)))
    every = max(heads_moved(setting.spec, spans_of(setting.lengths), Sizes(HEAD_DIM, 2, 4)))
    moved = forward / 2 if factor == 1.0 else every - forward / 2
    local = setting.spec._replace(branches=setting.spec.branches[:3])
    ranks = setting.sample
    inside = max(
        _seconds(local._replace(queries=own, keys=own))
        for own in (shards(setting.lengths)[rank] for rank in ranks)
    )
    crossing = ideal(setting) - inside
    wire = moved / speed + 2 * setting.size * LATENCY
    return max(factor * inside, 0.6 * wire) + factor * max(crossing, 0.0) + 0.4 * wire


@cache
def ideal(setting: Setting) -> float:
    """A rank's share of the whole: of equal ranks the mean, by rank causal work grows evenly."""
    first, *_, last = setting.sample
    return (setting.seconds(first, "all") + setting.seconds(last, "all")) / 2


def share(setting: Setting, strategy: str, speed: float) -> str:
    """Per cent of ideal, forward / backward."""
    best = ideal(setting)
    found = []
    for factor in (1.0, BACKWARD):
        if strategy == "all_to_all":
            seconds = all_to_all(setting, speed, factor)
        elif strategy == "ring":
            seconds = max(ring(setting, rank, speed, factor) for rank in setting.sample)
        else:
            levels = 2 if strategy == TWO_LEVELS else 1
            seconds = max(gather(setting, rank, speed, factor, levels) for rank in setting.sample)
        found.append(100 * factor * best / seconds)
    return " / ".join(f"{value:.0f}" for value in found)


@cache
def two_levels(setting: Setting) -> float:
    """Bytes that a rank fetches from other nodes if each row comes once to a node of eight."""
    node = range(setting.size // 2, setting.size // 2 + NODE)
    most: dict[int, int] = {}
    for rank in node:
        for parcel in setting.plan(rank, "gather").rounds[0].receives:
            if parcel.peer not in node:
                most[parcel.peer] = max(most.get(parcel.peer, 0), parcel.rows)
    return bytes_of(sum(most.values())) / NODE


def lines() -> Iterator[Line]:
    for size in (8, 64, 512):
        for is_causal, layout in ((False, "contiguous"), (True, "contiguous"), (True, "zigzag")):
            setting = Setting(size, is_causal, layout)
            yield from (line(setting, strategy) for strategy in strategies(setting))


def strategies(setting: Setting) -> Iterator[str]:
    yield from ("gather", "ring")
    if setting.size > NODE:
        yield TWO_LEVELS
    if setting.layout == "contiguous" and setting.size <= HEADS:
        yield "all_to_all"


def line(setting: Setting, strategy: str) -> Line:
    plans = [setting.plan(rank, "gather") for rank in setting.sample]
    moved = bytes_of(max(max(plan.rows_sent, plan.rows_received) for plan in plans))
    messages = max(len(plan.rounds[0].sends) for plan in plans)
    if strategy == TWO_LEVELS:
        moved = two_levels(setting)
    elif strategy == "all_to_all":
        sizes = Sizes(HEAD_DIM, 2, 0)
        moved = max(heads_moved(setting.spec, spans_of(setting.lengths), sizes)) / 2
        messages = 2 * (setting.size - 1)
    shares = {name: share(setting, strategy, speed) for name, speed in LINKS.items()}
    if strategy == TWO_LEVELS:
        del shares["NVLink"]
        shares = {"NVLink": "-", **shares}
    what = setting.layout + (", causal" if setting.is_causal else "")
    return {
        "ranks": str(setting.size),
        "layout": what,
        "strategy": strategy,
        "MiB": f"{moved / 2**20:.0f}",
        "messages": str(messages),
    } | shares


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.simulate", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.parse_args()
    path = ROOT / "docs" / "ring.md"
    path.write_text(replace_section(path.read_text(), "simulation", table(lines())))


if __name__ == "__main__":
    main()
