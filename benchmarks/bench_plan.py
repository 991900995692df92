"""Measures the planner: time, size, what it saves. Writes results/plan-<device>-<date>.json.

    python -m benchmarks.bench_plan

Planning runs on one core of the host and needs no GPU. `nominal`, `distinct` and `computed` are
pairs of a query and a key over all heads: every branch on its own, each pair once, and with the
tiles' empty corners.
"""

from __future__ import annotations

import argparse
import datetime
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from dilated_attention_pytorch.pattern import Pattern

from . import schema
from .device_state import NoMonitor
from .environment import RESULTS, describe, slug
from .timing import Stopwatch, one_core, summarize
from .workloads import WORKLOADS, Workload

_SECONDS = 0.5
_MIN_CALLS = 3
_CPU = torch.device("cpu")


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


def measure(workload: Workload, causal: bool, seconds: float) -> dict[str, Any]:
    """One row: the time of a plan from its specification to its words, and its counts."""
    spec = workload.spec(causal)
    stopwatch = Stopwatch(_CPU)
    pattern = Pattern.plan(spec)
    times: list[float] = []
    while len(times) < _MIN_CALLS or sum(times) < seconds * 1e3:
        begin = stopwatch.mark()
        pattern = Pattern.plan(spec)
        times.append(stopwatch.mark().ms_since(begin))
    timing = summarize(times, len(times))
    return {
        "workload": workload.name,
        "seq_len": workload.seq_len,
        "heads": workload.heads,
        "causal": causal,
        "ms": timing.ms,
        "ms_p10": timing.ms_p10,
        "ms_p90": timing.ms_p90,
        "calls": timing.launches,
        **pattern.report(),
    }


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Markdown."""
    lines = [
        "| pattern | causal | time | size | tiles | nominal / distinct | computed / distinct |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for row in rows:
        causal = "yes" if row["causal"] else "no"
        lines.append(
            f"| {row['workload']} | {causal} | {row['ms']:.3g} ms | {row['bytes'] / 1024:.0f} KiB "
            f"| {row['tiles']} | {row['nominal'] / row['distinct']:.2f} "
            f"| {row['computed'] / row['distinct']:.2f} |"
        )
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> Path:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.bench_plan", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--out", type=Path, default=RESULTS, help="the folder to write into")
    parser.add_argument("--commit", help="what is measured, where there is no git")
    parser.add_argument("--seconds", type=float, default=_SECONDS, help="for each pattern")
    options = parser.parse_args(arguments)
    document = describe(_CPU, NoMonitor(), options.commit)
    now = datetime.datetime.now(datetime.timezone.utc)
    document["date"] = now.isoformat(timespec="seconds")
    with one_core():
        document["rows"] = [
            measure(workload, causal, options.seconds)
            for workload in plan_workloads()
            for causal in (False, True)
        ]
    path: Path = options.out / f"plan-{slug(document['device'])}-{now:%Y-%m-%d}.json"
    schema.write(path, document)
    print(table(document["rows"]))
    print(path)
    return path


if __name__ == "__main__":
    main()
