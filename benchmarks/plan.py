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
from .timing import Timing
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
        replace(WORKLOADS["gigapath-10k"], causal=(False, True)),
        replace(WORKLOADS["gigapath-65k"], causal=(False, True)),
    ):
        for rule in ("blocked", "interleaved"):
            yield replace(base, name=f"{base.name}-{rule}", head_offsets=rule)


def measure(run: Run, options: argparse.Namespace) -> None:
    """From a specification to its words, and their counts."""
    for workload, causal in run.each(plan_workloads()):
        spec = workload.spec(causal)
        report = Pattern.plan(spec).report()
        times: list[float] = []
        while len(times) < _MIN_CALLS or sum(times) < options.seconds * 1e3:
            times.append(run.stopwatch.ms(lambda spec=spec: Pattern.plan(spec)))  # type: ignore[misc]
        row: Row = {"workload": workload.name, "seq_len": workload.seq_len}
        row |= {"heads": workload.heads, "causal": causal, **Timing(times).columns}
        run.rows.append({**row, "calls": len(times), **report})
        run.say(f"{workload.title(causal)}: {row['ms']:.3g} ms")


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
    document = documents[-1]
    source = f"* {document['device']}, one core; commit {document['commit'][:12]}, "
    return f"{table(map(_line, document['rows']))}\n\n{source}{document['date'][:10]}."
