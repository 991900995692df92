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
from dataclasses import dataclass
from itertools import cycle
from typing import Any

import torch

from .device_state import Monitor, Sample, medians

Launch = Callable[[], object]

SUSTAINED_SECONDS = 0.5
PAUSE_SECONDS = 0.04
ISOLATED_LAUNCHES = 7
HOST_LAUNCHES = 1000
HOST_WARM_UP = 50
_BATCH_SECONDS = 1e-3  # events are this far apart at least, so that recording them costs nothing
_MIN_BATCHES = 4


@dataclass(frozen=True, slots=True)
class Timing:
    """Milliseconds per launch (median, 10th, 90th percentile), and the device's state meanwhile."""

    ms: float
    ms_p10: float
    ms_p90: float
    launches: int
    sm_mhz: float | None = None
    watts: float | None = None

    @property
    def columns(self) -> dict[str, float]:
        """The times of a row of results."""
        return {"ms": self.ms, "ms_p10": self.ms_p10, "ms_p90": self.ms_p90}


def percentile(values: Sequence[float], percent: float) -> float:
    """Linear interpolation between the two nearest of the sorted values."""
    ordered = sorted(values)
    place = (len(ordered) - 1) * percent / 100
    below, above = ordered[math.floor(place)], ordered[math.ceil(place)]
    # In this form two equal neighbours give exactly themselves, so percentiles stay ordered.
    return below + (above - below) * (place - math.floor(place))


def summarize(values: Sequence[float], launches: int, samples: Sequence[Sample] = ()) -> Timing:
    """`values` are milliseconds per launch, at least one; `launches` is how many they stand for."""
    p10, middle, p90 = (percentile(values, percent) for percent in (10, 50, 90))
    return Timing(middle, p10, p90, launches, *medians(samples))


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
    there = [_turn(launch, stopwatch, seconds) for launch in launches]
    back = [_turn(launch, stopwatch, seconds) for launch in reversed(launches)]
    timings = []
    for (values, batch, samples), (more, other, rest) in zip(there, reversed(back), strict=True):
        count = batch * len(values) + other * len(more)
        timings.append(summarize(values + more, count, samples + rest))
    return timings


def _turn(
    launch: Launch, stopwatch: Stopwatch, seconds: float
) -> tuple[list[float], int, list[Sample]]:
    """At least `seconds` of back-to-back launches. Of their second half: milliseconds per launch,
    each the mean of a batch, how many are a batch, the device's state.
    """
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
    values = [value / batch for value in second_half(at)]
    return values, batch, [sample for sample in samples if sample.at >= halfway]


def second_half(at: Sequence[float]) -> list[float]:
    """Durations between consecutive times, of those that end in the second half; at least one."""
    return [end - begin for begin, end in zip(at, at[1:], strict=False) if end > at[-1] / 2]


def isolated(
    launches: Sequence[Launch],
    stopwatch: Stopwatch,
    repeats: int = ISOLATED_LAUNCHES,
    pause: float = PAUSE_SECONDS,
) -> list[Timing]:
    """Single launches `pause` seconds apart, the caches flushed before each, the peers in turn."""
    for launch in launches:
        launch()
    times: list[list[float]] = [[] for _ in launches]
    states: list[list[Sample]] = [[] for _ in launches]
    for _ in range(repeats):
        for launch, values, samples in zip(launches, times, states, strict=True):
            stopwatch.synchronize()
            time.sleep(pause)
            stopwatch.flush()
            begin = stopwatch.mark()
            launch()
            end = stopwatch.mark()
            stopwatch.monitor.read(samples)
            values.append(stopwatch.between(begin, end))
    return [summarize(v, len(v), s) for v, s in zip(times, states, strict=True)]


def host_times(
    launches: Sequence[Launch], stopwatch: Stopwatch, repeats: int = HOST_LAUNCHES
) -> list[Timing]:
    """The host's time until each call returns, the device being idle when it starts; in turn.

    On the CPU that includes the work itself.
    """
    values: list[list[float]] = [[] for _ in launches]
    for _ in range(HOST_WARM_UP + repeats):
        for launch, mine in zip(launches, values, strict=True):
            mine.append(stopwatch.host_ms(launch))
    return [summarize(mine[HOST_WARM_UP:], repeats) for mine in values]


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
