"""Where a step's time goes: planning, transfers, managing the cache, kernels."""

from __future__ import annotations

import threading
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from statistics import fmean, median
from typing import Any

from dilated_attention_pytorch import PatternCache
from dilated_attention_pytorch.pattern import BasePatternCache, Pattern

from .cache_workloads import Steps
from .timing import Stopwatch


@dataclass(frozen=True, slots=True)
class Split:
    """Milliseconds of a step, on average (of like steps' kernels, the median).

    planning, transfer: the host's time to plan, and to enqueue copies; V3's are mostly on a thread
    of its own. waiting: the caller's, for a plan that this thread was making. management: the
    caller's time in the cache beyond that. kernel: the device's time for the calls.
    """

    planning_ms: float
    transfer_ms: float
    waiting_ms: float
    management_ms: float
    kernel_ms: float

    def to_json(self) -> dict[str, float]:
        return asdict(self)


class Clock:
    """Seconds spent in functions, by name and by whether the caller's thread spent them."""

    def __init__(self) -> None:
        self._caller = threading.get_ident()
        self._running: set[tuple[str, bool]] = set()
        self.seconds: defaultdict[tuple[str, bool], float] = defaultdict(float)

    def around(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*arguments: Any, **options: Any) -> Any:
            key = (name, threading.get_ident() == self._caller)
            if key in self._running:  # one such function called another: counted once
                return function(*arguments, **options)
            self._running.add(key)
            began = time.perf_counter()
            try:
                return function(*arguments, **options)
            finally:
                self.seconds[key] += time.perf_counter() - began
                self._running.discard(key)

        return timed

    def everywhere(self, name: str) -> float:
        return self.seconds[name, True] + self.seconds[name, False]


def attach(clock: Clock, cache: BasePatternCache) -> None:
    """From now on the clock sees what the cache does."""
    parts = {"find": "lookup", "lookup": "lookup", "prefetch": "prefetch"}
    parts |= {"_make": "planning", "_send": "transfer"}
    for method, name in parts.items():
        setattr(cache, method, clock.around(name, getattr(cache, method)))


def split(steps: Steps, numbers: Sequence[int], warm: int, stopwatch: Stopwatch) -> Split:
    """Of the numbered steps, after `warm` repetitions of the first one."""
    known = steps.with_cache(PatternCache())
    kernels = [kernel_ms(known, number, stopwatch) for number in numbers]
    kernel = fmean(kernels) if steps.workload.is_changing else median(kernels)
    if steps.cache is None:
        return _split_without_cache(steps, known, numbers, kernel, stopwatch)
    for _ in range(warm):
        steps.run(numbers[0])
    clock = Clock()
    attach(clock, steps.cache)
    waited = steps.cache.statistics().waiting_seconds
    steps.milliseconds(numbers, stopwatch)
    waiting = steps.cache.statistics().waiting_seconds - waited
    own = clock.seconds
    managing = own["lookup", True] + own["prefetch", True] - waiting
    managing -= own["planning", True] + own["transfer", True]
    per_step = 1e3 / len(numbers)
    return Split(
        clock.everywhere("planning") * per_step,
        clock.everywhere("transfer") * per_step,
        waiting * per_step,
        max(0.0, managing) * per_step,
        kernel,
    )


def kernel_ms(known: Steps, number: int, stopwatch: Stopwatch) -> float:
    """The device's time for one step's calls, whose patterns are there already."""
    call = known.call(number)
    call()
    stopwatch.synchronize()
    stopwatch.flush()  # meanwhile the host enqueues the calls
    begin = stopwatch.mark()
    for _ in range(known.workload.calls):
        call()
    end = stopwatch.mark()
    end.wait()
    return end.ms_since(begin)


def _split_without_cache(
    steps: Steps, known: Steps, numbers: Sequence[int], kernel: float, stopwatch: Stopwatch
) -> Split:
    """The operator plans and copies within the call: what planning does not explain is transfer."""
    planning = fmean(_plan_ms(steps, number) for number in numbers)
    bare, whole = (
        fmean(_host_ms(each, number, stopwatch) for number in numbers) for each in (known, steps)
    )
    transfer = max(0.0, whole - bare - planning) if steps.device.type == "cuda" else 0.0
    calls = steps.workload.calls
    return Split(planning * calls, transfer * calls, 0.0, 0.0, kernel)


def _plan_ms(steps: Steps, number: int) -> float:
    began = time.perf_counter()
    Pattern.plan(steps.workload.spec(number))
    return (time.perf_counter() - began) * 1e3


def _host_ms(steps: Steps, number: int, stopwatch: Stopwatch) -> float:
    """The host's time until one call returns, the device being idle."""
    call = steps.call(number)
    call()
    stopwatch.synchronize()
    began = time.perf_counter()
    call()
    return (time.perf_counter() - began) * 1e3
