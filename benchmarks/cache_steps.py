"""The steps that caches are compared on, and where a step's time goes.

A step makes one call or several, at one length or at a new length each time, and ends when the
device is idle again.
"""

from __future__ import annotations

import random
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
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
FIXED = ("seed-1024", "seed-4096", "seed-16384", "longnet-128k")
NAMES = (*FIXED, "slides")
_SLIDE_LAYERS = 12  # calls of GigaPath's slide encoder on one slide
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


def make_cache(name: str) -> BasePatternCache | None:
    if name == "none":
        return None
    return TieredPatternCache() if name == "v3" else PatternCache()


class Steps:
    """Runs a workload's steps with one of CACHES, which is new."""

    def __init__(self, workload: CacheWorkload, inputs: Inputs, name: str) -> None:
        self.workload, self.inputs, self.name = workload, inputs, name
        self.cache = make_cache(name)

    def call(self, step: int) -> Callable[[], object]:
        """One call of a step, as a user makes it."""
        base, seq_len = self.workload.base, self.workload.spec(step).seq_len
        query, key, value = (x[:, :seq_len] for x in self.inputs.qkv)
        cache = False if self.cache is None else self.cache
        options = {**base.arguments, "pattern_cache": cache}

        def attend() -> object:
            if cache is False:
                clear_planned_patterns()  # what the operators keep by themselves
            return dilated_attention(query, key, value, **options)

        return attend

    def run(self, step: int) -> None:
        """Tells V3, and V2 where it is to be told, what the next step's length is."""
        if self.cache is not None and self.workload.is_changing:
            following, device = [self.workload.spec(step + 1)], self.inputs.query.device
            if self.name == "v3":
                self.cache.prefetch(following, device)
            elif self.name == "v2-announced":
                self.cache.announce(following, device)
        call = self.call(step)
        for _ in range(self.workload.calls):
            call()

    def milliseconds(self, steps: Sequence[int], stopwatch: Stopwatch) -> float:
        """A step's, on average: from the device being idle to its being idle again."""
        return fmean(stopwatch.wall_ms(lambda step=step: self.run(step)) for step in steps)  # type: ignore[misc]


class Clock:
    """Milliseconds spent in a cache's methods, by part and thread."""

    def __init__(self, cache: BasePatternCache) -> None:
        """From now on it sees what the cache does."""
        self._running: set[tuple[str, int]] = set()
        self._ms: defaultdict[tuple[str, int], float] = defaultdict(float)
        parts = {"find": "lookup", "lookup": "lookup", "prefetch": "prefetch"}
        parts |= {"announce": "prefetch", "_make": "planning", "_send": "transfer"}
        for method, part in parts.items():
            setattr(cache, method, self._around(part, getattr(cache, method)))

    def _around(self, part: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*arguments: Any, **options: Any) -> Any:
            key = (part, threading.get_ident())
            if key in self._running:  # one such function called another: counted once
                return function(*arguments, **options)
            self._running.add(key)
            began = time.perf_counter()
            try:
                return function(*arguments, **options)
            finally:
                self._ms[key] += (time.perf_counter() - began) * 1e3
                self._running.discard(key)

        return timed

    def in_all(self, part: str) -> float:
        return sum(ms for (name, _), ms in self._ms.items() if name == part)

    def own(self, *parts: str) -> float:
        """Of the calling thread."""
        return sum(self._ms[part, threading.get_ident()] for part in parts)


def split(
    steps: Steps, numbers: Sequence[int], warm: int, stopwatch: Stopwatch
) -> dict[str, float]:
    """Milliseconds of the parts of a step, of the numbered ones, after `warm` of the first.

    planning, transfer: the host's time to plan, and to enqueue copies; what is announced, mostly on
    a thread of its own. waiting: the caller's, for a plan that this thread was making. management:
    the caller's time in the cache beyond that. kernel: the device's time for the calls.
    """
    workload = steps.workload
    known = Steps(workload, steps.inputs, "v2")
    kernels, bare = [], []
    for number in numbers:
        call = known.call(number)
        call()  # from here on its pattern is there
        bare.append(stopwatch.host_ms(call))
        stopwatch.synchronize()
        stopwatch.flush()  # meanwhile the host enqueues the calls
        kernels.append(stopwatch.ms(call, workload.calls))
    parts = dict.fromkeys(PARTS, 0.0)
    parts["kernel"] = fmean(kernels) if workload.is_changing else median(kernels)
    if steps.cache is None:
        # The operator plans and copies within the call: what planning does not explain is transfer.
        cpu = Stopwatch(torch.device("cpu"))
        plans = [cpu.ms(lambda n=n: Pattern.plan(workload.spec(n))) for n in numbers]  # type: ignore[misc]
        whole = [stopwatch.host_ms(steps.call(number)) for number in numbers]
        parts["planning"] = fmean(plans) * workload.calls
        if stopwatch.device.type == "cuda":
            rest = fmean(whole) - fmean(bare) - fmean(plans)
            parts["transfer"] = max(0.0, rest) * workload.calls
    else:
        for _ in range(warm):
            steps.run(numbers[0])
        clock, waited = Clock(steps.cache), steps.cache.statistics().waiting_seconds
        steps.milliseconds(numbers, stopwatch)
        waiting = (steps.cache.statistics().waiting_seconds - waited) * 1e3
        managing = clock.own("lookup", "prefetch") - waiting - clock.own("planning", "transfer")
        found = (clock.in_all("planning"), clock.in_all("transfer"), waiting, max(0.0, managing))
        parts |= {part: ms / len(numbers) for part, ms in zip(PARTS, found, strict=False)}
    return {f"{part}_ms": ms for part, ms in parts.items()}
