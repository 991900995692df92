"""Runs peers over workloads under a time budget, and makes the rows of a results file."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from .calls import Calls, Inputs, reason
from .device_state import Monitor
from .peers import Impl
from .schema import Pass, Protocol, Row
from .timing import (
    Launch,
    Rotation,
    Stopwatch,
    Timing,
    captured,
    host_times,
    isolated,
    peak_mib,
    sustained,
)
from .workloads import Workload, nominal_flops

# Rounding of 16-bit outputs, and of gradients, which pass through three products; a wrong pattern
# is off by tenths.
_TOLERANCE: dict[Pass, float] = {"fwd": 0.02, "bwd": 0.03, "fwd+bwd": 0.03}
_MAX_INPUT_SETS = 16


class BudgetExhaustedError(Exception):
    """The time is up; what was measured until now stays."""


@dataclass(slots=True)
class Bench:
    """What all measurements of a run share, and what they add up to."""

    stopwatch: Stopwatch
    monitor: Monitor
    passes: Sequence[Pass]
    protocols: Sequence[Protocol]
    deadline: float  # time.monotonic()
    seconds: float  # of a sustained measurement
    repeats: int  # of an isolated one
    rows: list[dict[str, Any]] = field(default_factory=list)
    skipped: list[dict[str, Any]] = field(default_factory=list)

    def check_time(self) -> None:
        if time.monotonic() >= self.deadline:
            raise BudgetExhaustedError


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


class CaseRun:
    """All peers on one workload, causal or not."""

    def __init__(self, bench: Bench, workload: Workload, causal: bool) -> None:
        self._bench = bench
        self._workload = workload
        self._causal = causal
        self._expected: dict[Pass, tuple[Tensor, ...]] = {}

    def run(self, impls: Sequence[Impl]) -> None:
        """Adds rows. Raises BudgetExhaustedError."""
        try:
            sets = input_sets(self._workload, self._bench.stopwatch.device)
            ready = list(self._prepare_all(impls, sets))
            for pass_ in self._bench.passes:
                if pass_ == "host":
                    self._measure_host(ready)
                else:
                    self._measure(ready, pass_)
        finally:
            self._expected.clear()

    def _skip(self, impl: Impl, error: BaseException, pass_: Pass | None = None) -> None:
        entry: dict[str, Any] = {"workload": self._workload.name, "causal": self._causal}
        entry.update(impl=impl.name, reason=reason(error))
        if pass_ is not None:
            entry["pass"] = pass_
        self._bench.skipped.append(entry)

    def _prepare_all(self, impls: Sequence[Impl], sets: Sequence[Inputs]) -> Iterator[Prepared]:
        for impl in impls:
            self._bench.check_time()
            prepared = None
            try:
                prepared = self._prepare(impl, sets)
            except Exception as error:  # a peer that fails must not take the run with it
                self._skip(impl, error)
            if prepared is not None:
                yield prepared

    def _prepare(self, impl: Impl, sets: Sequence[Inputs]) -> Prepared:
        calls = [impl.prepare(self._workload, self._causal, inputs) for inputs in sets]
        prepared = Prepared(impl, calls)
        for pass_ in self._bench.passes:
            call = calls[0].get(pass_)
            if call is not None and pass_ != "host":
                self._check(prepared, pass_, call, calls[0].restore)
                prepared.peaks[pass_] = peak_mib(call, self._bench.stopwatch)
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
            self._bench.check_time()
            try:
                if prepared.impl.graphed:
                    device = self._bench.stopwatch.device
                    launches.append((prepared, Rotation([captured(c, device) for c in calls])))
                else:
                    launches.append((prepared, Rotation(calls)))
            except Exception as error:
                self._skip(prepared.impl, error, pass_)
        return launches

    def _measure(self, ready: Sequence[Prepared], pass_: Pass) -> None:
        bench = self._bench
        launches = self._launches(ready, pass_)
        for protocol in bench.protocols:
            chosen = [(p, launch) for p, launch in launches if protocol in p.impl.protocols]
            calls = [launch for _, launch in chosen]
            bench.check_time()
            if protocol == "isolated":
                timings = isolated(calls, bench.stopwatch, bench.monitor, bench.repeats)
            else:
                timings = sustained(calls, bench.stopwatch, bench.monitor, bench.seconds)
            for (prepared, _), timing in zip(chosen, timings, strict=True):
                self._add(prepared, pass_, protocol, timing)

    def _measure_host(self, ready: Sequence[Prepared]) -> None:
        """The host's time for one forward call, of peers that are not graphs."""
        one = torch.zeros(1, device=self._bench.stopwatch.device)
        for prepared in ready:
            if prepared.impl.graphed or "isolated" not in prepared.impl.protocols:
                continue
            self._bench.check_time()
            launches = (lambda: one.add_(1), prepared.calls[0].forward)
            launch, timing = host_times(launches, self._bench.stopwatch)
            self._add(prepared, "host", "isolated", timing, launch.ms)

    def _add(
        self,
        prepared: Prepared,
        pass_: Pass,
        protocol: Protocol,
        timing: Timing,
        launch_ms: float | None = None,
    ) -> None:
        workload, causal = self._workload, self._causal
        row = Row(
            workload=workload.name,
            causal=causal,
            impl=prepared.impl.name,
            pass_=pass_,
            protocol=protocol,
            ms=timing.ms,
            ms_p10=timing.ms_p10,
            ms_p90=timing.ms_p90,
            nominal_tflops=nominal_flops(workload, causal, pass_) / timing.ms * 1e-9,
            peak_mib=prepared.peaks.get(pass_),
            sm_mhz=timing.sm_mhz,
            watts=timing.watts,
            launches=timing.launches,
            relative_error=prepared.errors.get(pass_),
            launch_ms=launch_ms,
            note=prepared.calls[0].note or prepared.impl.note,
        )
        self._bench.rows.append(row.to_json())


def run_case(bench: Bench, workload: Workload, causal: bool, impls: Sequence[Impl]) -> None:
    """Measures one workload and releases what it took. Raises BudgetExhaustedError."""
    try:
        CaseRun(bench, workload, causal).run(impls)
    finally:
        gc.collect()
        if bench.stopwatch.device.type == "cuda":
            torch.cuda.empty_cache()
