"""The steps that caches are compared on, and where a step's time goes.

A step makes one call or several, at one length or at a new length each time, and ends when the
device is idle again.
"""

from __future__ import annotations

import random
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from statistics import fmean, median
from typing import Any

import torch

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
SLIDE_LAYERS = 12  # calls of GigaPath's slide encoder on one slide
_SHORTEST, _LONGEST, _MEDIAN, _SPREAD = 500, 70_000, 6_000, 1.1


@dataclass(frozen=True, slots=True)
class CacheWorkload:
    """Each step makes `calls` calls at the next of the lengths and waits until they are done."""

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


def slide_lengths(count: int, seed: int = 0) -> tuple[int, ...]:
    """Distinct numbers of tiles, log-normal within 500 and 70,000, in random order."""
    rng, found = random.Random(seed), dict[int, None]()
    while len(found) < count:
        length = round(_MEDIAN * rng.lognormvariate(0.0, _SPREAD))
        if _SHORTEST <= length <= _LONGEST:
            found[length] = None
    return tuple(found)


FIXED = ("seed-1024", "seed-4096", "seed-16384", "longnet-128k")
NAMES = (*FIXED, "slides")


def cache_workloads(slides: int) -> list[CacheWorkload]:
    """What NAMES names; the last one's lengths are `slides` many."""
    lengths = slide_lengths(slides)
    base = replace(WORKLOADS["gigapath-10k"], name="slides", seq_len=max(lengths))
    return [
        *(CacheWorkload(n, WORKLOADS[n], 1, (WORKLOADS[n].seq_len,)) for n in FIXED),
        CacheWorkload("slides", base, SLIDE_LAYERS, lengths),
    ]


def make_cache(name: str) -> BasePatternCache | None:
    if name == "none":
        return None
    return TieredPatternCache() if name == "v3" else PatternCache()


class Steps:
    """Runs a workload's steps with one of CACHES, which is new."""

    def __init__(self, workload: CacheWorkload, inputs: Inputs, name: str) -> None:
        self.workload, self.name, self.cache = workload, name, make_cache(name)
        self._inputs = inputs

    def renewed(self, name: str | None = None) -> Steps:
        return Steps(self.workload, self._inputs, name or self.name)

    def call(self, step: int) -> Callable[[], object]:
        """One call of a step, as a user makes it."""
        base, seq_len = self.workload.base, self.workload.spec(step).seq_len
        query, key, value = (x[:, :seq_len] for x in self._inputs.qkv)

        def attend() -> object:
            if self.cache is None:
                clear_planned_patterns()  # what the operators keep by themselves
            return dilated_attention(
                query,
                key,
                value,
                base.segment_lengths,
                base.dilation_rates,
                head_offsets=base.head_offsets,
                padding=base.padding,
                pattern_cache=False if self.cache is None else self.cache,
            )

        return attend

    def run(self, step: int) -> None:
        """Tells V3, and V2 where it is to be told, what the next step's length is."""
        if self.cache is not None and self.workload.is_changing:
            following = [self.workload.spec(step + 1)]
            if self.name == "v3":
                self.cache.prefetch(following, self._inputs.query.device)
            elif self.name == "v2-announced":
                self.cache.announce(following, self._inputs.query.device)
        call = self.call(step)
        for _ in range(self.workload.calls):
            call()

    def forget(self) -> None:
        if self.cache is not None:
            self.cache.drain()
            self.cache.clear()

    def milliseconds(self, steps: Sequence[int], stopwatch: Stopwatch) -> float:
        """A step's, on average: from the device being idle to its being idle again."""

        def run_all() -> None:
            for step in steps:
                self.run(step)
                stopwatch.synchronize()

        return stopwatch.wall_ms(run_all) / len(steps)


class Clock:
    """Seconds spent in a cache's methods, by name and by whether the caller's thread spent them."""

    def __init__(self, cache: BasePatternCache) -> None:
        """From now on it sees what the cache does."""
        self._caller = threading.get_ident()
        self._running: set[tuple[str, bool]] = set()
        self.seconds: defaultdict[tuple[str, bool], float] = defaultdict(float)
        parts = {"find": "lookup", "lookup": "lookup", "prefetch": "prefetch"}
        parts |= {"announce": "prefetch", "_make": "planning", "_send": "transfer"}
        for method, name in parts.items():
            setattr(cache, method, self._around(name, getattr(cache, method)))

    def _around(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
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


def split(
    steps: Steps, numbers: Sequence[int], warm: int, stopwatch: Stopwatch
) -> dict[str, float]:
    """Milliseconds of the parts of a step, of the numbered ones, after `warm` of the first.

    planning, transfer: the host's time to plan, and to enqueue copies; what is announced, mostly on
    a thread of its own. waiting: the caller's, for a plan that this thread was making. management:
    the caller's time in the cache beyond that. kernel: the device's time for the calls.
    """
    known = steps.renewed("v2")
    kernels = [_kernel_ms(known, number, stopwatch) for number in numbers]
    kernel = fmean(kernels) if steps.workload.is_changing else median(kernels)
    if steps.cache is None:
        parts = _parts_without_cache(steps, known, numbers, stopwatch)
    else:
        for _ in range(warm):
            steps.run(numbers[0])
        parts = _parts(steps, steps.cache, numbers, stopwatch)
    return {f"{name}_ms": value for name, value in zip(PARTS, (*parts, kernel), strict=True)}


def _parts(
    steps: Steps, cache: BasePatternCache, numbers: Sequence[int], stopwatch: Stopwatch
) -> Iterator[float]:
    clock = Clock(cache)
    waited = cache.statistics().waiting_seconds
    steps.milliseconds(numbers, stopwatch)
    waiting = cache.statistics().waiting_seconds - waited
    own = clock.seconds
    managing = own["lookup", True] + own["prefetch", True] - waiting
    managing -= own["planning", True] + own["transfer", True]
    planning, transfer = (own[name, True] + own[name, False] for name in ("planning", "transfer"))
    for seconds in (planning, transfer, waiting, max(0.0, managing)):
        yield seconds * 1e3 / len(numbers)


def _kernel_ms(known: Steps, number: int, stopwatch: Stopwatch) -> float:
    """The device's time for one step's calls, whose patterns are there already."""
    call = known.call(number)
    call()
    stopwatch.synchronize()
    stopwatch.flush()  # meanwhile the host enqueues the calls
    return stopwatch.ms(call, known.workload.calls)


def _parts_without_cache(
    steps: Steps, known: Steps, numbers: Sequence[int], stopwatch: Stopwatch
) -> Iterator[float]:
    """The operator plans and copies within the call: what planning does not explain is transfer."""

    def host_ms(each: Steps, number: int) -> float:
        call = each.call(number)
        call()
        return stopwatch.host_ms(call)

    cpu = Stopwatch(torch.device("cpu"))
    specs = [steps.workload.spec(number) for number in numbers]
    planning = fmean(cpu.ms(lambda spec=spec: Pattern.plan(spec)) for spec in specs)  # type: ignore[misc]
    bare, whole = (fmean(host_ms(each, number) for number in numbers) for each in (known, steps))
    transfer = max(0.0, whole - bare - planning) if stopwatch.device.type == "cuda" else 0.0
    for part in (planning, transfer, 0.0, 0.0):
        yield part * steps.workload.calls
