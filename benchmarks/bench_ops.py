"""Measures the operator and its peers, and writes benchmarks/results/ops-<device>-<date>.json.

    python -m benchmarks.bench_ops --torchscale ../torchscale
    python -m benchmarks.bench_ops --workloads scale-N --passes fwd --tag scale

Run from the repository's root, with the library installed. Workloads are measured in the order of
their importance; when the time is up, what was measured is in the file, and what was not is named.
"""

from __future__ import annotations

import argparse
import datetime
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn

import torch

from . import schema
from .device_state import make_monitor
from .environment import RESULTS, describe, measure_ceilings, slug
from .peers import Impl, make_impls
from .runner import Bench, BudgetExhaustedError, run_case
from .schema import IMPLS, PASSES, PROTOCOLS
from .timing import ISOLATED_LAUNCHES, PAUSE_SECONDS, SUSTAINED_SECONDS, Stopwatch
from .workloads import Ceilings, Workload, floor, select

_HOST_WORKLOAD = "seed-1024"
_LATE = ("flex",)  # compiles for tens of seconds: measured after everything else
_LATE_GROUPS = ("anchors", "interleaved")
_LATE_SECONDS = 40.0  # time that must be left to begin with one

Task = tuple[Workload, bool, list[Impl]]


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.bench_ops", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter

    def names(text: str) -> list[str]:
        return [name for name in text.split(",") if name]

    parser.add_argument("--workloads", type=names, default=["default"], help="names or groups")
    parser.add_argument("--impls", type=names, default=list(IMPLS))
    parser.add_argument("--passes", type=names, default=list(PASSES))
    parser.add_argument("--protocols", type=names, default=list(PROTOCOLS))
    parser.add_argument("--torchscale", type=Path, help="a checkout of microsoft/torchscale")
    parser.add_argument("--out", type=Path, default=RESULTS, help="the folder to write into")
    parser.add_argument("--tag", default="", help="appended to the file's name")
    parser.add_argument("--commit", help="what is measured, where there is no git")
    parser.add_argument("--budget-seconds", type=float, default=240.0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--seconds", type=float, default=SUSTAINED_SECONDS, help="sustained")
    parser.add_argument("--repeats", type=int, default=ISOLATED_LAUNCHES, help="isolated")
    options = parser.parse_args(arguments)
    for name, known in (("impls", IMPLS), ("passes", PASSES), ("protocols", PROTOCOLS)):
        unknown = sorted(set(getattr(options, name)) - set(known))
        if unknown:
            parser.error(f"--{name} must be among {', '.join(known)}, got {', '.join(unknown)}")
    try:
        options.workloads = select(options.workloads)
    except ValueError as error:
        parser.error(f"--{error}")
    return options


def tasks(workloads: Sequence[Workload], impls: Sequence[Impl]) -> Iterator[Task]:
    """What to measure, in order."""
    early = [impl for impl in impls if impl.name not in _LATE]
    ours = [impl for impl in impls if impl.name == "ours"]
    for workload in workloads:
        for causal in workload.causal:
            yield workload, causal, early
    for impl in impls:
        for workload in workloads:
            if impl.name in _LATE and workload.group in _LATE_GROUPS:
                for causal in workload.causal:
                    yield workload, causal, [*ours, impl]


class Run:
    """One run of the program: its document grows from task to task."""

    def __init__(self, options: argparse.Namespace) -> None:
        self._options = options
        device = torch.device(options.device)
        stopwatch, monitor = Stopwatch(device), make_monitor(device)
        started = datetime.datetime.now(datetime.timezone.utc)
        deadline = time.monotonic() + options.budget_seconds
        self._document: dict[str, Any] = describe(device, monitor, options.commit)
        self._document["device_type"] = device.type
        self._document["date"] = started.isoformat(timespec="seconds")
        self._document["ceilings"] = measure_ceilings(stopwatch, monitor)
        self._document["protocol"] = {
            "sustained_seconds": options.seconds,
            "isolated_pause_seconds": PAUSE_SECONDS,
            "isolated_launches": options.repeats,
        }
        parts = ["ops", slug(self._document["device"]), f"{started:%Y-%m-%d}", slug(options.tag)]
        self.path: Path = options.out / ("-".join(part for part in parts if part) + ".json")
        self._bench = Bench(
            stopwatch,
            monitor,
            options.passes,
            options.protocols,
            deadline,
            options.seconds,
            options.repeats,
        )

    def measure(self) -> None:
        known = make_impls(self._options.torchscale)
        impls = [known[name] for name in known if name in self._options.impls]
        waiting = list(tasks(self._options.workloads, impls))
        try:
            while waiting:
                late = any(impl.name in _LATE for impl in waiting[0][2])
                if late and self._bench.deadline - time.monotonic() < _LATE_SECONDS:
                    raise BudgetExhaustedError
                self._measure_task(*waiting[0])
                waiting.pop(0)
                self.write(complete=not waiting)
        except BudgetExhaustedError:
            print("the time is up", file=sys.stderr)
        finally:
            for workload, causal, chosen in waiting:
                entry = {"workload": workload.name, "causal": causal, "reason": "not finished"}
                self._bench.skipped += [{**entry, "impl": impl.name} for impl in chosen]
            self.write(complete=not waiting)

    def _measure_task(self, workload: Workload, causal: bool, impls: list[Impl]) -> None:
        before = len(self._bench.rows)
        passes = self._options.passes
        if workload.name != _HOST_WORKLOAD:
            passes = [pass_ for pass_ in passes if pass_ != "host"]
        self._bench.passes = passes
        known = {_key(row) for row in self._bench.rows}
        try:
            run_case(self._bench, workload, causal, impls)
        finally:
            # A late task measures ours again, next to its peer; the table keeps the first.
            added = self._bench.rows[before:]
            self._bench.rows[before:] = [row for row in added if _key(row) not in known]
            ceilings = Ceilings(**self._document["ceilings"])
            for row in self._bench.rows[before:]:
                _print(row, floor(workload, causal, row["pass"], ceilings).ms)

    def write(self, complete: bool) -> None:
        document = dict(self._document)
        document.update(complete=complete, rows=self._bench.rows, skipped=self._bench.skipped)
        schema.check(document)
        schema.write(self.path, document)


def _key(row: dict[str, Any]) -> tuple[Any, ...]:
    return tuple(row[name] for name in ("workload", "causal", "impl", "pass", "protocol"))


def _print(row: dict[str, Any], floor_ms: float) -> None:
    name = f"{row['workload']}{' causal' if row['causal'] else ''}"
    clock = "" if row["sm_mhz"] is None else f"  {row['sm_mhz']:.0f} MHz {row['watts'] or 0:.0f} W"
    print(
        f"{name:24} {row['impl']:20} {row['pass']:8}{row['protocol']:10} {row['ms']:10.4f} ms"
        f"  [{row['ms_p10']:.4f}, {row['ms_p90']:.4f}]  floor {floor_ms:.4f}"
        f"  {row['nominal_tflops']:.1f} TFLOP/s{clock}",
        flush=True,
    )


def _terminate(number: int, frame: object) -> NoReturn:
    raise SystemExit(128 + number)  # so that `finally` writes the file


def main(arguments: Sequence[str] | None = None) -> Path:
    signal.signal(signal.SIGTERM, _terminate)
    run = Run(parse(arguments))
    run.measure()
    print(run.path)
    return run.path


if __name__ == "__main__":
    main()
