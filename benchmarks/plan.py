"""Planning patterns: its time, their size, and what a plan saves.

    python -m benchmarks.bench plan

`nominal`, `distinct` and `computed` are pairs of a query and a key over all heads: every branch on
its own, each pair once, and with the tiles' empty corners.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from dataclasses import replace

from dilated_attention_pytorch.pattern import Pattern

from .results import Document, Row, Run
from .tables import Line, ratios, table
from .timing import Stopwatch, Timing
from .workloads import WORKLOADS, Workload

ON_CPU = "all there is: planning runs on one core of the host."
BUDGET_SECONDS = 60.0
_MIN_CALLS = 3


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


def measure(run: Run, options: argparse.Namespace) -> None:
    workloads = {workload.name: workload for workload in plan_workloads()}
    for case in run.each([{"workload": name} for name in workloads]):
        workload = workloads[case["workload"]]
        rows = [_measure(workload, causal, run.stopwatch, options) for causal in (False, True)]
        times = " / ".join(f"{row['ms']:.3g}" for row in rows)
        run.say(f"{workload.name}: {times} ms (not causal / causal)")
        run.rows.extend(rows)


def _measure(
    workload: Workload, causal: bool, stopwatch: Stopwatch, options: argparse.Namespace
) -> Row:
    """The time of a plan from its specification to its words, and its counts."""
    spec = workload.spec(causal)
    pattern = Pattern.plan(spec)
    times: list[float] = []
    while len(times) < _MIN_CALLS or sum(times) < options.seconds * 1e3:
        times.append(stopwatch.ms(lambda: Pattern.plan(spec)))
    row: Row = {"workload": workload.name, "seq_len": workload.seq_len, "heads": workload.heads}
    row |= {"causal": causal, **Timing(times).columns, "calls": len(times)}
    return row | pattern.report()


def _line(row: Row) -> Line:
    return {
        "pattern": row["workload"],
        "causal": "yes" if row["causal"] else "no",
        "time": f"{row['ms']:.3g} ms",
        "size": f"{row['bytes'] / 1024:.0f} KiB",
        "tiles": str(row["tiles"]),
        **ratios(row),
    }


def planning_section(documents: Sequence[Document]) -> str:
    """The newest run of `bench plan`."""
    if not documents:
        return ""
    document = documents[-1]
    source = f"* {document['device']}, one core; commit {document['commit'][:12]}, "
    return f"{table(map(_line, document['rows']))}\n\n{source}{document['date'][:10]}."
