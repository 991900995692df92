"""Planning patterns: its time, their size, and what a plan saves.

    python -m benchmarks.bench plan

`nominal`, `distinct` and `computed` are pairs of a query and a key over all heads: every branch on
its own, each pair once, and with the tiles' empty corners.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import torch

from dilated_attention_pytorch.pattern import Pattern

from .results import Row, Run
from .timing import Stopwatch, one_core, summarize
from .workloads import WORKLOADS, Workload

ON_CPU = "all there is: planning runs on one core of the host."
BUDGET_SECONDS = 60.0
_MIN_CALLS = 3
_CPU = torch.device("cpu")


def add_options(parser: argparse.ArgumentParser) -> None:
    parser.set_defaults(device="cpu")
    parser.add_argument("--seconds", type=float, default=0.5, help="for each pattern")


def plan_workloads() -> Iterator[Workload]:
    """LongNet's branches on 16 heads at 128K and at 1M positions, and GigaPath's, by both rules."""
    longnet = replace(WORKLOADS["longnet-128k"], heads=16)
    for base in (
        replace(longnet, name="plan-128k"),
        replace(longnet, name="plan-1m", seq_len=1048576),
        WORKLOADS["gigapath-10k"],
        WORKLOADS["gigapath-65k"],
    ):
        for rule in ("blocked", "interleaved"):
            yield replace(base, name=f"{base.name}-{rule}", head_offsets=rule)


def measure(options: argparse.Namespace) -> Path:
    run = Run("plan", options, _CPU)
    with one_core():
        for workload in plan_workloads():
            rows = [measure_one(workload, causal, options.seconds) for causal in (False, True)]
            times = " / ".join(f"{row['ms']:.3g}" for row in rows)
            run.say(f"{workload.name}: {times} ms (not causal / causal)")
            run.rows.extend(rows)
            run.write()
    return run.path


def measure_one(workload: Workload, causal: bool, seconds: float) -> Row:
    """The time of a plan from its specification to its words, and its counts."""
    spec, stopwatch = workload.spec(causal), Stopwatch(_CPU)
    pattern = Pattern.plan(spec)
    times: list[float] = []
    while len(times) < _MIN_CALLS or sum(times) < seconds * 1e3:
        times.append(stopwatch.ms(lambda: Pattern.plan(spec)))
    timing = summarize(times, len(times))
    row: Row = {"workload": workload.name, "seq_len": workload.seq_len, "heads": workload.heads}
    row |= {"causal": causal, **timing.columns, "calls": timing.launches}
    return row | pattern.report()
