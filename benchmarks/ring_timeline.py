"""Draws when a rank computed and when it exchanged, from a profiler trace of a ring's launch.

torchrun --nproc-per-node 2 -m benchmarks.bench_ring --workloads llm-256k-whole --trace trace
python -m benchmarks.ring_timeline trace/llm-256k-whole-auto-full-rank0.json docs/figures/ring.svg
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

Interval = tuple[float, float]  # begin, end; microseconds

EXCHANGE, COMPUTE = "exchange", "compute"
DRAWN = "drawn"  # the annotation of the launch that is drawn; nothing comes after it
_EXCHANGE_NAMES = ("nccl", "gloo", "memcpy peer", "memcpy ptop")


def read(trace: Mapping[str, Any]) -> dict[str, list[Interval]]:
    """What the device did, as exchange and compute; on a trace without a GPU, what the host did."""
    events = [event for event in trace["traceEvents"] if event.get("ph") == "X"]
    start = min((float(e["ts"]) for e in events if e["name"] == DRAWN), default=0.0)
    events = [event for event in events if float(event["ts"]) >= start and event["name"] != DRAWN]
    device = [e for e in events if e.get("cat") in ("kernel", "gpu_memcpy")]
    found: dict[str, list[Interval]] = {EXCHANGE: [], COMPUTE: []}
    for event in device or [e for e in events if e.get("cat") in ("cpu_op", "user_annotation")]:
        name = str(event["name"]).lower()
        is_exchange = any(part in name for part in _EXCHANGE_NAMES)
        if not device and not is_exchange and "dilated::" not in name:
            continue
        if "dilated::ring" in name:  # contains all others
            continue
        begin = float(event["ts"])
        interval = (begin, begin + float(event["dur"]))
        found[EXCHANGE if is_exchange else COMPUTE].append(interval)
    return found


def union(intervals: Iterable[Interval]) -> list[Interval]:
    """Joined where they touch, in order."""
    joined: list[Interval] = []
    for begin, end in sorted(intervals):
        if joined and begin <= joined[-1][1]:
            joined[-1] = (joined[-1][0], max(joined[-1][1], end))
        else:
            joined.append((begin, end))
    return joined


def hidden(exchange: Sequence[Interval], compute: Sequence[Interval]) -> float:
    """The share of the exchange's time in which something was computed; 1 without exchange."""
    total = sum(end - begin for begin, end in union(exchange))
    covered = sum(
        max(0.0, min(end, stop) - max(begin, start))
        for begin, end in union(exchange)
        for start, stop in union(compute)
    )
    return covered / total if total else 1.0


def draw(intervals: Mapping[str, Sequence[Interval]], path: Path) -> None:
    import matplotlib  # type: ignore[import-not-found, import-untyped, unused-ignore]
    from matplotlib.figure import Figure

    matplotlib.rcParams["svg.hashsalt"] = "dilated"
    origin = min(begin for some in intervals.values() for begin, _ in some)
    figure = Figure(figsize=(8.0, 1.8), layout="constrained")
    axes = figure.subplots()
    for row, (name, color) in enumerate(((EXCHANGE, "tab:orange"), (COMPUTE, "tab:blue"))):
        bars = [((b - origin) / 1e3, (e - b) / 1e3) for b, e in union(intervals[name])]
        axes.broken_barh(bars, (row - 0.35, 0.7), color=color)
    share = hidden(intervals[EXCHANGE], intervals[COMPUTE])
    axes.set_yticks([0, 1], [EXCHANGE, COMPUTE])
    axes.set_xlabel(f"milliseconds; {share:.0%} of the exchange under computation")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, metadata={"Date": None})


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.ring_timeline", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("trace", type=Path)
    parser.add_argument("picture", type=Path)
    options = parser.parse_args(arguments)
    draw(read(json.loads(options.trace.read_text())), options.picture)
    return 0


if __name__ == "__main__":
    sys.exit(main())
