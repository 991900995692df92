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
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .device_state import medians
from .peers import IMPLS, Impl, make_impls
from .peers.calls import Calls, Inputs, UnsupportedError, reason
from .results import Row, Run, names
from .timing import (
    ISOLATED_LAUNCHES,
    PAUSE_SECONDS,
    PROTOCOLS,
    SUSTAINED_SECONDS,
    Launch,
    Stopwatch,
    Timing,
    captured,
    host_times,
    isolated,
    peak_mib,
    rotation,
    sustained,
)
from .workloads import GROUPS, PASSES, WORKLOADS, Pass, Workload, nominal_flops, select

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


def measure(run: Run, options: argparse.Namespace) -> None:
    impls = [i for name, i in make_impls(options.torchscale).items() if name in options.impls]
    run.document["ceilings"] = measure_ceilings(run.stopwatch)
    isolation = {"isolated_pause_seconds": PAUSE_SECONDS, "isolated_launches": options.repeats}
    run.document["protocol"] = {"sustained_seconds": options.seconds, **isolation}
    default = ["anchors", "seed"] if run.device.type == "cuda" else ["cpu"]
    for workload, causal in run.each(select(options.workloads or default)):
        case = Case(run, options, workload, causal)
        try:
            case.measure(impls)
        finally:
            run.say(case.line())
            del case
            gc.collect()
            if run.device.type == "cuda":
                torch.cuda.empty_cache()


def measure_ceilings(stopwatch: Stopwatch) -> dict[str, float]:
    """A large matrix product (bf16; float32 on the CPU), and a copy, bytes read plus written."""
    device = stopwatch.device
    is_cuda = device.type == "cuda"
    size, copied = (8192, 2**31) if is_cuda else (1024, 2**27)
    dtype = torch.bfloat16 if is_cuda else torch.float32
    left, right = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    product = torch.empty_like(left)
    source = torch.empty(copied // 4, device=device).normal_()
    target = torch.empty_like(source)
    launches = (lambda: torch.mm(left, right, out=product), lambda: target.copy_(source))
    matmul, copy = sustained(launches, stopwatch)
    tflops, gbps = 2 * size**3 / matmul.ms * 1e-9, 2 * copied / copy.ms * 1e-6
    return {"matmul_tflops": tflops, "copy_gbps": gbps}


@dataclass(slots=True)
class Prepared:
    """One peer on one workload: its calls for every input set, and what its first calls gave."""

    impl: Impl
    calls: list[Calls]
    columns: dict[Pass, Row] = field(default_factory=dict)


def relative_error(got: Tensor, expected: Tensor) -> float:
    """||got - expected|| / ||expected||; NaN stays NaN."""
    expected = expected.float()
    return float((got.float() - expected).norm() / expected.norm())


def input_sets(workload: Workload, device: torch.device) -> list[Inputs]:
    """As many sets of inputs as it takes to be larger than twice the L2 cache."""
    sets = [Inputs.make(workload, device)]
    if device.type == "cuda":
        l2_bytes = torch.cuda.get_device_properties(device).L2_cache_size
        count = min(_MAX_INPUT_SETS, -(-2 * l2_bytes // sum(x.nbytes for x in sets[0].all)))
        sets += [Inputs.make(workload, device, seed) for seed in range(1, count)]
    return sets


class Case:
    """All peers on one workload, causal or not."""

    def __init__(
        self, run: Run, options: argparse.Namespace, workload: Workload, causal: bool
    ) -> None:
        self._run, self._options = run, options
        self._workload, self.causal = workload, causal
        self._what = {"workload": workload.name, "causal": causal}
        self._expected: dict[Pass, tuple[Tensor, ...]] = {}
        self._first_row = len(run.rows)

    def measure(self, impls: Sequence[Impl]) -> None:
        """Adds rows. Raises OutOfTimeError."""
        sets = input_sets(self._workload, self._run.device)
        ready: list[Prepared] = []
        for impl in impls:
            self._run.check_time()
            try:
                ready.append(self._prepare(impl, sets))
            except Exception as error:  # a peer that fails must not take the run with it
                self._skip(impl, error)
        for pass_ in self._options.passes:
            if pass_ != "host":
                self._measure(ready, pass_)
            elif self._workload.name == HOST_WORKLOAD:
                self._measure_host(ready)

    def line(self) -> str:
        """Milliseconds by the first protocol, of each peer all passes."""
        rows = self._run.rows[self._first_row :]
        times: dict[str, list[str]] = {}
        for row in rows:
            if row["protocol"] == rows[0]["protocol"]:
                times.setdefault(row["impl"], []).append(f"{row['ms']:.4g}")
        peers = ", ".join(f"{impl} {' / '.join(ms)}" for impl, ms in times.items())
        return f"{self._workload.title(self.causal)}: {peers or 'nothing'} ms"

    def _skip(self, impl: Impl, error: BaseException, **pass_: str) -> None:
        self._run.skip(reason(error), **self._what, impl=impl.name, **pass_)

    def _prepare(self, impl: Impl, sets: Sequence[Inputs]) -> Prepared:
        if self._workload.lengths and not impl.takes_batches:
            raise UnsupportedError("it takes one sequence at a time")
        calls = [impl.prepare(self._workload, self.causal, inputs) for inputs in sets]
        prepared = Prepared(impl, calls)
        for pass_ in self._options.passes:
            if (call := calls[0].get(pass_)) is not None:
                error = self._check(impl, calls[0], pass_, call())
                columns = {"peak_mib": peak_mib(call, self._run.stopwatch), **error}
                prepared.columns[pass_] = columns
        return prepared

    def _check(self, impl: Impl, calls: Calls, pass_: Pass, result: Any) -> Row:
        """The error against this library's results; RuntimeError if they are not the same."""
        if not impl.same_output:
            return {}
        results = (result,) if isinstance(result, Tensor) else result
        results = tuple(map(calls.restore, results))
        if impl.name == "ours":
            self._expected[pass_] = results
        if impl.name == "ours" or pass_ not in self._expected:
            return {}
        error = max(map(relative_error, results, self._expected[pass_]))
        is_same = pass_ == "fwd" or impl.same_gradient
        if is_same and not error <= _TOLERANCE[pass_]:
            note = f" ({calls.note})" if calls.note else ""
            raise RuntimeError(f"{pass_} differs from ours by {error:.3g}{note}")
        return {"relative_error": error}

    def _measure(self, ready: Sequence[Prepared], pass_: Pass) -> None:
        run, options = self._run, self._options
        launches: list[tuple[Prepared, Launch]] = []
        for prepared in ready:
            calls = [call for calls in prepared.calls if (call := calls.get(pass_)) is not None]
            run.check_time()
            try:
                if prepared.impl.graphed:
                    calls = [captured(call, run.device) for call in calls]
            except Exception as error:
                self._skip(prepared.impl, error, **{"pass": pass_})
                continue
            launches += [(prepared, rotation(calls))] if calls else []
        for protocol in options.protocols:
            chosen = [(p, launch) for p, launch in launches if protocol in p.impl.protocols]
            calls = [launch for _, launch in chosen]
            run.check_time()
            if protocol == "isolated":
                timings = isolated(calls, run.stopwatch, options.repeats)
            else:
                timings = sustained(calls, run.stopwatch, options.seconds)
            for (prepared, _), timing in zip(chosen, timings, strict=True):
                self._add(prepared, pass_, protocol, timing)

    def _measure_host(self, ready: Sequence[Prepared]) -> None:
        """The host's time for one forward call, of peers that are not graphs."""
        one = torch.zeros(1, device=self._run.device)
        for prepared in ready:
            if prepared.impl.graphed or "isolated" not in prepared.impl.protocols:
                continue
            self._run.check_time()
            launches = (lambda: one.add_(1), prepared.calls[0].forward)
            launch, timing = host_times(launches, self._run.stopwatch)
            self._add(prepared, "host", "isolated", timing, launch_ms=launch.ms)

    def _add(
        self, prepared: Prepared, pass_: Pass, protocol: str, timing: Timing, **more: Any
    ) -> None:
        flops = nominal_flops(self._workload, self.causal, pass_)
        if note := prepared.calls[0].note:
            more["note"] = note
        row = {**self._what, "impl": prepared.impl.name, "pass": pass_, "protocol": protocol}
        row |= {**timing.columns, "nominal_tflops": flops / timing.ms * 1e-9}
        sm_mhz, watts = medians(timing.samples)
        row |= {"sm_mhz": sm_mhz, "watts": watts, "launches": timing.launches}
        self._run.rows.append({**row, **prepared.columns.get(pass_, {}), **more})
