"""The steps that caches are compared on, and where a step's time goes.

A step makes one call or several, at one length or at a new length each time, and ends when the
device is idle again.
"""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from statistics import fmean, median
from typing import Any

from dilated_attention_pytorch import PatternCache, TieredPatternCache, dilated_attention
from dilated_attention_pytorch.pattern import (
    BasePatternCache,
    Pattern,
    PatternSpec,
    clear_planned_patterns,
)

from .peers.calls import Inputs
from .timing import Stopwatch
from .workloads import WORKLOADS, Workload

CACHES = ("none", "v2", "v2-announced", "v3")
OPTIONS = {"batched transfer": "batch_transfers", "asynchronous transfer": "async_transfers"}
PARTS = ("planning", "transfer", "waiting", "management", "kernel")
FIXED = ("seed-1024", "seed-4096", "seed-16384", "longnet-128k")
NAMES = (*FIXED, "slides")
_SLIDE_LAYERS = 12  # calls of GigaPath's slide encoder on one slide
_SHORTEST, _LONGEST, _MEDIAN, _SPREAD = 500, 70_000, 6_000, 1.1
_WARM_STEPS = 5  # more than it takes V3 to make a pattern hot


@dataclass(frozen=True, slots=True)
class CacheWorkload:
    """Each step makes `calls` calls at the next of the lengths."""

    name: str
    base: Workload
    calls: int
    lengths: tuple[int, ...]

    @property
    def is_changing(self) -> bool:
        return len(self.lengths) > 1

    @property
    def caches(self) -> tuple[str, ...]:
        """Where the length stays, nothing is announced."""
        return CACHES if self.is_changing else tuple(c for c in CACHES if c != "v2-announced")

    def spec(self, step: int) -> PatternSpec:
        seq_len = self.lengths[step % len(self.lengths)]
        return self.base.spec(False)._replace(seq_len=seq_len)


def slide_lengths(count: int) -> tuple[int, ...]:
    """Distinct numbers of tiles, log-normal within 500 and 70,000, in random order."""
    rng, found = random.Random(0), dict[int, None]()
    while len(found) < count:
        length = round(_MEDIAN * rng.lognormvariate(0.0, _SPREAD))
        if _SHORTEST <= length <= _LONGEST:
            found[length] = None
    return tuple(found)


def cache_workloads(slides: int) -> list[CacheWorkload]:
    """What NAMES names; the last one's lengths are `slides` many."""
    lengths = slide_lengths(slides)
    base = replace(WORKLOADS["gigapath-10k"], name="slides", seq_len=max(lengths))
    fixed = [CacheWorkload(n, WORKLOADS[n], 1, (WORKLOADS[n].seq_len,)) for n in FIXED]
    return [*fixed, CacheWorkload("slides", base, _SLIDE_LAYERS, lengths)]


class Steps:
    """A workload's steps with one of CACHES, which is new."""

    def __init__(self, workload: CacheWorkload, inputs: Inputs, name: str) -> None:
        self._workload, self._inputs = workload, inputs
        self._is_told = workload.is_changing and name in ("v2-announced", "v3")
        self.cache: BasePatternCache | None = None
        if name != "none":
            self.cache = TieredPatternCache() if name == "v3" else PatternCache()

    def call(self, step: int) -> Callable[[], object]:
        """One call of a step, as a user makes it."""
        base, seq_len = self._workload.base, self._workload.spec(step).seq_len
        query, key, value = (x[:, :seq_len] for x in self._inputs.qkv)
        cache = False if self.cache is None else self.cache
        options = {**base.arguments, "pattern_cache": cache}

        def attend() -> object:
            if cache is False:
                clear_planned_patterns()  # what the operators keep by themselves
            return dilated_attention(query, key, value, **options)

        return attend

    def run(self, step: int) -> None:
        """Tells a cache that is to be told what the next step's length is."""
        if self.cache is not None and self._is_told:
            self.cache.announce([self._workload.spec(step + 1)], self._inputs.query.device)
        call = self.call(step)
        for _ in range(self._workload.calls):
            call()

    def warm_up(self) -> None:
        for _ in range(_WARM_STEPS):
            self.run(0)

    def milliseconds(self, steps: Sequence[int], stopwatch: Stopwatch) -> float:
        """A step's, on average: from the device being idle to its being idle again."""
        return fmean(stopwatch.wall_ms(lambda step=step: self.run(step)) for step in steps)  # type: ignore[misc]


class Clock:
    """Milliseconds that the thread which makes it spends in methods that don't call one another."""

    def __init__(self, cache: BasePatternCache, *methods: str) -> None:
        self.ms, self._thread = 0.0, threading.get_ident()
        for method in methods:
            setattr(cache, method, self._timed(getattr(cache, method)))

    def _timed(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*arguments: Any, **options: Any) -> Any:
            began = time.perf_counter()
            try:
                return function(*arguments, **options)
            finally:
                if threading.get_ident() == self._thread:
                    self.ms += (time.perf_counter() - began) * 1e3

        return timed


def split(
    workload: CacheWorkload, inputs: Inputs, name: str, stopwatch: Stopwatch
) -> dict[str, float]:
    """Milliseconds of the parts of a step.

    planning, transfer: the host's time to plan, and to enqueue copies; of what is announced, on a
    thread of its own. waiting: the caller's, for a plan that this thread was making. management:
    the caller's time in the cache beyond that. kernel: the device's time for the calls.
    """
    steps, known, numbers = Steps(workload, inputs, name), Steps(workload, inputs, "v2"), range(100)
    kernels, bare = [], []
    for number in numbers:
        call = known.call(number)
        call()  # from here on its pattern is there
        bare.append(stopwatch.host_ms(call))
        stopwatch.synchronize()
        stopwatch.flush()  # meanwhile the host enqueues the calls
        kernels.append(stopwatch.ms(call, workload.calls))
    parts = {f"{part}_ms": 0.0 for part in PARTS}
    parts["kernel_ms"] = fmean(kernels) if workload.is_changing else median(kernels)
    if steps.cache is None:
        # The operator plans and copies within the call: what planning does not explain is transfer.
        plans = [stopwatch.host_ms(lambda n=n: Pattern.plan(workload.spec(n))) for n in numbers]  # type: ignore[misc]
        whole = [stopwatch.host_ms(steps.call(number)) for number in numbers]
        rest = fmean(whole) - fmean(bare) - fmean(plans)
        parts["planning_ms"] = fmean(plans) * workload.calls
        parts["transfer_ms"] = max(0.0, rest) * workload.calls
        return parts
    if not workload.is_changing:
        steps.warm_up()
    inside = Clock(steps.cache, "find", "lookup_missing", "announce")
    making = Clock(steps.cache, "_make", "_send")
    before = steps.cache.statistics()
    steps.milliseconds(numbers, stopwatch)
    after = steps.cache.statistics()
    for part in ("planning", "transfer", "waiting"):
        seconds = getattr(after, f"{part}_seconds") - getattr(before, f"{part}_seconds")
        parts[f"{part}_ms"] = seconds * 1e3 / len(numbers)
    managing = (inside.ms - making.ms) / len(numbers) - parts["waiting_ms"]
    return parts | {"management_ms": max(0.0, managing)}
