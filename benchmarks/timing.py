"""The protocol: how long one launch takes, sustained and isolated, on a GPU or on the CPU.

A power-limited GPU runs slower when it is busy, so there are two numbers. *Sustained*: launches
back to back for at least half a second, of which the second half counts; there and back through the
peers, so that each also follows whom it preceded. *Isolated*: launches 40 ms apart with a flushed
L2 cache. Whoever is compared is measured in turn, in the same process; so is the time that the host
takes to launch.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import cycle, pairwise
from typing import Any

import torch

from .device_state import Monitor, Sample

Launch = Callable[[], object]
PROTOCOLS = ("sustained", "isolated")
SUSTAINED_SECONDS = 0.5
PAUSE_SECONDS = 0.04
ISOLATED_LAUNCHES = 7
HOST_LAUNCHES = 1000
HOST_WARM_UP = 50
_BATCH_SECONDS = 1e-3  # events are this far apart at least, so that recording them costs nothing
_MIN_BATCHES = 4


def percentile(values: Sequence[float], percent: float) -> float:
    """Linear interpolation between the two nearest of the sorted values."""
    ordered = sorted(values)
    place = (len(ordered) - 1) * percent / 100
    below, above = ordered[math.floor(place)], ordered[math.ceil(place)]
    # In this form two equal neighbours give exactly themselves, so percentiles stay ordered.
    return below + (above - below) * (place - math.floor(place))


@dataclass(slots=True)
class Timing:
    """Milliseconds per launch, how many launches they stand for, the device's state meanwhile."""

    values: list[float] = field(default_factory=list)
    launches: int = 0
    samples: list[Sample] = field(default_factory=list)

    @property
    def ms(self) -> float:
        return percentile(self.values, 50)

    @property
    def columns(self) -> dict[str, float]:
        """Of a row of results: the median, the 10th and the 90th percentile."""
        percents = {"ms": 50, "ms_p10": 10, "ms_p90": 90}
        return {name: percentile(self.values, percent) for name, percent in percents.items()}


class Stopwatch:
    """Marks, waits and flushes for one device, and reads its state."""

    def __init__(self, device: torch.device) -> None:
        self.device, self.monitor = device, Monitor(device)
        self._waste: torch.Tensor | None = None
        if device.type == "cuda":
            l2_bytes = torch.cuda.get_device_properties(device).L2_cache_size
            size = max(256 * 2**20, 4 * l2_bytes)
            self._waste = torch.empty(size, dtype=torch.int8, device=device)

    def mark(self) -> Any:
        """A point in the device's time; on the CPU, in the host's."""
        if self.device.type != "cuda":
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record()
        return event

    def between(self, begin: Any, end: Any) -> float:
        """Milliseconds from one mark to another, which it waits for."""
        if isinstance(end, float):
            return float(end - begin) * 1e3
        end.synchronize()
        return float(begin.elapsed_time(end))

    def synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def flush(self) -> None:
        """Overwrites the L2 cache, for long enough that the host enqueues a launch meanwhile."""
        if self._waste is not None:
            for value in range(4):
                self._waste.fill_(value)

    def ms(self, launch: Launch, count: int = 1) -> float:
        """The device's time for `count` launches, until they are done."""
        begin = self.mark()
        for _ in range(count):
            launch()
        return self.between(begin, self.mark())

    def estimate_ms(self, launch: Launch) -> float:
        """Warms up, then one launch's time, roughly."""
        launch()
        self.synchronize()
        return max(self.ms(launch), 1e-4)

    def host_ms(self, function: Launch) -> float:
        """The host's time until the function returns, the device being idle when it starts."""
        self.synchronize()
        began = time.perf_counter()
        function()
        return (time.perf_counter() - began) * 1e3

    def wall_ms(self, function: Launch) -> float:
        """The host's time from the device being idle to its being idle again."""

        def finish() -> None:
            function()
            self.synchronize()

        return self.host_ms(finish)


def sustained(
    launches: Sequence[Launch], stopwatch: Stopwatch, seconds: float = SUSTAINED_SECONDS
) -> list[Timing]:
    """Two turns each, in this order and then in the opposite one; what counts of both together."""
    timings = [Timing() for _ in launches]
    there = list(zip(launches, timings, strict=True))
    for launch, timing in there + there[::-1]:
        _take_turn(launch, timing, stopwatch, seconds)
    return timings


def _take_turn(launch: Launch, timing: Timing, stopwatch: Stopwatch, seconds: float) -> None:
    """At least `seconds` of back-to-back launches, in batches; their second half is recorded."""
    estimate = stopwatch.estimate_ms(launch)
    batch = max(1, round(_BATCH_SECONDS * 1e3 / estimate))
    ahead = 4 if estimate < 10 else 1  # batches that the host enqueues beyond the one it waits for
    stopwatch.synchronize()
    started = time.perf_counter()
    with stopwatch.monitor.sampling() as samples:
        marks = [stopwatch.mark()]
        elapsed = 0.0
        while elapsed < seconds * 1e3 or len(marks) <= _MIN_BATCHES:
            for _ in range(batch):
                launch()
            marks.append(stopwatch.mark())
            elapsed = stopwatch.between(marks[0], marks[max(0, len(marks) - 1 - ahead)])
        at = [stopwatch.between(marks[0], mark) for mark in marks]
    halfway = (started + time.perf_counter()) / 2
    timing.samples += [sample for sample in samples if sample.at >= halfway]
    values = [(b - a) / batch for a, b in pairwise(at) if b > at[-1] / 2]
    timing.values += values
    timing.launches += batch * len(values)


def isolated(launches: Sequence[Launch], stopwatch: Stopwatch, repeats: int) -> list[Timing]:
    """Single launches PAUSE_SECONDS apart, the caches flushed before each, the peers in turn."""
    for launch in launches:
        launch()
    timings = [Timing() for _ in launches]
    for _ in range(repeats):
        for launch, timing in zip(launches, timings, strict=True):
            stopwatch.synchronize()
            time.sleep(PAUSE_SECONDS)
            stopwatch.flush()
            begin = stopwatch.mark()
            launch()
            end = stopwatch.mark()
            stopwatch.monitor.read(timing.samples)
            timing.values.append(stopwatch.between(begin, end))
            timing.launches += 1
    return timings


def host_times(launches: Sequence[Launch], stopwatch: Stopwatch) -> list[Timing]:
    """The host's time until each call returns, the device being idle when it starts; in turn.

    On the CPU that includes the work itself.
    """
    timings = [Timing(launches=HOST_LAUNCHES) for _ in launches]
    for index in range(HOST_WARM_UP + HOST_LAUNCHES):
        for launch, timing in zip(launches, timings, strict=True):
            ms = stopwatch.host_ms(launch)
            if index >= HOST_WARM_UP:
                timing.values.append(ms)
    return timings


def peak_mib(launch: Launch, stopwatch: Stopwatch) -> float | None:
    """Most memory that one launch holds beyond what was allocated before it; None on the CPU."""
    device = stopwatch.device
    if device.type != "cuda":
        return None
    stopwatch.synchronize()
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    result = launch()
    stopwatch.synchronize()
    del result
    return (torch.cuda.max_memory_allocated(device) - before) / 2**20


def captured(launch: Launch, device: torch.device) -> Launch:
    """The launch as a CUDA graph, so that many small calls cost no host time; itself on the CPU."""
    if device.type != "cuda":
        return launch
    side = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
    side.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(side):
        launch()
        launch()
    torch.cuda.current_stream(device).wait_stream(side)
    torch.cuda.synchronize(device)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        launch()
    return graph.replay


def rotation(launches: Sequence[Launch]) -> Launch:
    """Calls one launch after the other, so that none finds its inputs in the cache."""
    following = cycle(launches)
    return lambda: next(following)()
