"""Attention on one device: this library and its peers, under load and on their own.

    python -m benchmarks.bench ops --torchscale ../torchscale
    python -m benchmarks.bench ops --workloads scale-N --passes fwd --tag scale
    python -m benchmarks.bench ops --workloads cpu --device cpu --threads 1

Workloads are measured in the order of their importance; when the time is up, what was measured is
in the file, and what was not is named. The library bounds and flex want runs of their own, beside
ours: docs/performance.md has the command lines.
"""

from __future__ import annotations

import argparse
import gc
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .peers import Impl, make_impls
from .peers.calls import Calls, Inputs, reason
from .results import IMPLS, PASSES, PROTOCOLS, Pass, Row, Run, check, measure_ceilings, names
from .tables import title
from .timing import (
    ISOLATED_LAUNCHES,
    PAUSE_SECONDS,
    SUSTAINED_SECONDS,
    Launch,
    Rotation,
    Timing,
    captured,
    host_times,
    isolated,
    peak_mib,
    sustained,
)
from .workloads import GROUPS, WORKLOADS, Ceilings, Workload, floor, nominal_flops, select

ON_CPU = (
    "times of the CPU kernels, for the workloads of group `cpu`; the others are made for GPUs, and "
    "take minutes."
)
BUDGET_SECONDS = 240.0
TOGETHER = ("ours", "ours-graph", "torchscale", "sdpa-views", "full-attention")  # in one process
HOST_WORKLOAD = "seed-1024"
# Rounding of 16-bit outputs, and of gradients, which pass through three products; a wrong pattern
# is off by tenths.
_TOLERANCE = {"fwd": 0.02, "bwd": 0.03, "fwd+bwd": 0.03}
_MAX_INPUT_SETS = 16


def add_options(parser: argparse.ArgumentParser) -> None:
    known = names((*GROUPS, *WORKLOADS))
    parser.add_argument("--workloads", type=known, help=f"names, or of {', '.join(GROUPS)}")
    parser.add_argument("--impls", type=names(IMPLS), default=list(TOGETHER), help=", ".join(IMPLS))
    parser.add_argument("--passes", type=names(PASSES), default=list(PASSES))
    parser.add_argument("--protocols", type=names(PROTOCOLS), default=list(PROTOCOLS))
    parser.add_argument("--torchscale", type=Path, help="a checkout of microsoft/torchscale")
    parser.add_argument("--seconds", type=float, default=SUSTAINED_SECONDS, help="sustained")
    parser.add_argument("--repeats", type=int, default=ISOLATED_LAUNCHES, help="isolated")


class BudgetExhaustedError(Exception):
    """The time is up; what was measured until now stays."""


def measure(options: argparse.Namespace) -> Path:
    known = make_impls(options.torchscale)
    impls = [impl for name, impl in known.items() if name in options.impls]
    default = ["anchors", "seed"] if options.device == "cuda" else ["cpu"]
    cases = [
        (workload, causal)
        for workload in select(options.workloads or default)
        for causal in workload.causal
    ]
    run = Run("ops", options)
    run.document["ceilings"] = measure_ceilings(run.stopwatch, run.monitor)
    run.document["protocol"] = {
        "sustained_seconds": options.seconds,
        "isolated_pause_seconds": PAUSE_SECONDS,
        "isolated_launches": options.repeats,
    }
    done = 0
    try:
        for workload, causal in cases:
            case = Case(run, options, workload, causal)
            try:
                case.measure(impls)
            finally:
                run.say(f"{done + 1}/{len(cases)}  {case.line()}")
            done += 1
            run.write()
    except BudgetExhaustedError:
        run.say("the time is up")
    finally:
        for workload, causal in cases[done:]:
            for impl in impls:
                run.skip("not finished", workload=workload.name, causal=causal, impl=impl.name)
        run.document["complete"] = done == len(cases)
        check(run.document)
        run.write()
    return run.path


@dataclass(slots=True)
class Prepared:
    """One peer on one workload: its calls for every input set, and what checking them found."""

    impl: Impl
    calls: list[Calls]
    errors: dict[Pass, float] = field(default_factory=dict)
    peaks: dict[Pass, float | None] = field(default_factory=dict)


def relative_error(got: Tensor, expected: Tensor) -> float:
    """||got - expected|| / ||expected||; NaN stays NaN."""
    expected = expected.float()
    return float((got.float() - expected).norm() / expected.norm())


def input_sets(workload: Workload, device: torch.device) -> list[Inputs]:
    """As many sets of inputs as it takes to be larger than twice the L2 cache."""
    first = Inputs.make(workload, device, workload.torch_dtype, seed=0)
    if device.type != "cuda":
        return [first]
    l2_bytes = torch.cuda.get_device_properties(device).L2_cache_size
    count = min(_MAX_INPUT_SETS, -(-2 * l2_bytes // first.nbytes))
    dtype = workload.torch_dtype
    return [first, *(Inputs.make(workload, device, dtype, seed) for seed in range(1, count))]


class Case:
    """All peers on one workload, causal or not."""

    def __init__(
        self, run: Run, options: argparse.Namespace, workload: Workload, causal: bool
    ) -> None:
        self._run, self._options = run, options
        self._workload, self.causal = workload, causal
        self._expected: dict[Pass, tuple[Tensor, ...]] = {}
        self._first_row = len(run.rows)

    def measure(self, impls: Sequence[Impl]) -> None:
        """Adds rows, and releases what it took. Raises BudgetExhaustedError."""
        passes = [
            pass_
            for pass_ in self._options.passes
            if pass_ != "host" or self._workload.name == HOST_WORKLOAD
        ]
        try:
            self._measure_all(impls, passes)
        finally:
            self._expected.clear()
            gc.collect()
            if self._run.device.type == "cuda":
                torch.cuda.empty_cache()

    def _measure_all(self, impls: Sequence[Impl], passes: Sequence[Pass]) -> None:
        sets = input_sets(self._workload, self._run.device)
        ready: list[Prepared] = []
        for impl in impls:
            self._check_time()
            try:
                ready.append(self._prepare(impl, sets, passes))
            except Exception as error:  # a peer that fails must not take the run with it
                self._skip(impl, error)
        for pass_ in passes:
            if pass_ == "host":
                self._measure_host(ready)
            else:
                self._measure(ready, pass_)

    def line(self) -> str:
        """What was measured, in short: milliseconds by the first protocol, of each peer all passes,
        and what ours reaches of the floor in the first.
        """
        rows = self._run.rows[self._first_row :]
        rows = [row for row in rows if row["protocol"] == rows[0]["protocol"]]
        times: dict[str, list[str]] = {}
        for row in rows:
            times.setdefault(row["impl"], []).append(f"{row['ms']:.4g}")
        peers = ", ".join(f"{impl} {' / '.join(ms)}" for impl, ms in times.items())
        said = " / ".join(dict.fromkeys(row["pass"] for row in rows))
        for row in rows[:1]:
            ceilings = Ceilings(**self._run.document["ceilings"])
            reached = floor(self._workload, self.causal, row["pass"], ceilings).ms / row["ms"]
            said += f", {row['protocol']}"
            said += f"; {row['impl']} at {reached:.0%} of the floor" if reached else ""
            said += f", {row['sm_mhz']:.0f} MHz" if row["sm_mhz"] else ""
        return f"{title(self._workload.name, self.causal)}: {peers or 'nothing'} ms ({said})"

    def _check_time(self) -> None:
        if self._run.is_late():
            raise BudgetExhaustedError

    def _skip(self, impl: Impl, error: BaseException, **pass_: str) -> None:
        what = {"workload": self._workload.name, "causal": self.causal, "impl": impl.name}
        self._run.skip(reason(error), **what, **pass_)

    def _prepare(self, impl: Impl, sets: Sequence[Inputs], passes: Sequence[Pass]) -> Prepared:
        calls = [impl.prepare(self._workload, self.causal, inputs) for inputs in sets]
        prepared = Prepared(impl, calls)
        for pass_ in passes:
            call = calls[0].get(pass_)
            if call is not None and pass_ != "host":
                self._check(prepared, pass_, call, calls[0].restore)
                prepared.peaks[pass_] = peak_mib(call, self._run.stopwatch)
        return prepared

    def _check(
        self,
        prepared: Prepared,
        pass_: Pass,
        call: Callable[[], Any],
        restore: Callable[[Tensor], Tensor],
    ) -> None:
        """Compares with this library's results. Raises RuntimeError if they are not the same."""
        result = call()
        if result is None or not prepared.impl.same_output:
            return
        results = (result,) if isinstance(result, Tensor) else tuple(result)
        results = tuple(restore(x) for x in results)
        if prepared.impl.name == "ours":
            self._expected[pass_] = results
            return
        if pass_ not in self._expected:
            return
        pairs = zip(results, self._expected[pass_], strict=True)
        error = max(relative_error(got, expected) for got, expected in pairs)
        prepared.errors[pass_] = error
        comparable = pass_ == "fwd" or prepared.impl.same_gradient
        if comparable and not error <= _TOLERANCE[pass_]:
            note = f" ({prepared.calls[0].note})" if prepared.calls[0].note else ""
            raise RuntimeError(f"{pass_} differs from ours by {error:.3g}{note}")

    def _launches(self, ready: Sequence[Prepared], pass_: Pass) -> list[tuple[Prepared, Launch]]:
        launches: list[tuple[Prepared, Launch]] = []
        for prepared in ready:
            calls = [call for calls in prepared.calls if (call := calls.get(pass_)) is not None]
            if not calls:
                continue
            self._check_time()
            try:
                if prepared.impl.graphed:
                    calls = [captured(call, self._run.device) for call in calls]
                launches.append((prepared, Rotation(calls)))
            except Exception as error:
                self._skip(prepared.impl, error, **{"pass": pass_})
        return launches

    def _measure(self, ready: Sequence[Prepared], pass_: Pass) -> None:
        run, options = self._run, self._options
        launches = self._launches(ready, pass_)
        for protocol in options.protocols:
            chosen = [(p, launch) for p, launch in launches if protocol in p.impl.protocols]
            calls = [launch for _, launch in chosen]
            self._check_time()
            if protocol == "isolated":
                timings = isolated(calls, run.stopwatch, run.monitor, options.repeats)
            else:
                timings = sustained(calls, run.stopwatch, run.monitor, options.seconds)
            for (prepared, _), timing in zip(chosen, timings, strict=True):
                self._add(prepared, pass_, protocol, timing)

    def _measure_host(self, ready: Sequence[Prepared]) -> None:
        """The host's time for one forward call, of peers that are not graphs."""
        one = torch.zeros(1, device=self._run.device)
        for prepared in ready:
            if prepared.impl.graphed or "isolated" not in prepared.impl.protocols:
                continue
            self._check_time()
            launches = (lambda: one.add_(1), prepared.calls[0].forward)
            launch, timing = host_times(launches, self._run.stopwatch)
            self._add(prepared, "host", "isolated", timing, launch_ms=launch.ms)

    def _add(
        self, prepared: Prepared, pass_: Pass, protocol: str, timing: Timing, **more: Any
    ) -> None:
        workload, causal = self._workload, self.causal
        row: Row = {"workload": workload.name, "causal": causal, "impl": prepared.impl.name}
        row |= {"pass": pass_, "protocol": protocol, **timing.columns}
        row["nominal_tflops"] = nominal_flops(workload, causal, pass_) / timing.ms * 1e-9
        row["peak_mib"] = prepared.peaks.get(pass_)
        row |= {"sm_mhz": timing.sm_mhz, "watts": timing.watts, "launches": timing.launches}
        more |= {"relative_error": prepared.errors.get(pass_)}
        more |= {"note": prepared.calls[0].note or prepared.impl.note}
        self._run.rows.append(row | {name: x for name, x in more.items() if x is not None})
