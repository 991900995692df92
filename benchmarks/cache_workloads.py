"""What the caches are compared on: steps of calls at one length, or at a new length each time."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch

from dilated_attention_pytorch import PatternCache, TieredPatternCache, dilated_attention
from dilated_attention_pytorch.pattern import BasePatternCache, PatternSpec, clear_planned_patterns

from .calls import Inputs
from .timing import Stopwatch
from .workloads import WORKLOADS, Workload

CACHES = ("none", "v2", "v3")
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


def cache_workloads(slides: int) -> list[CacheWorkload]:
    fixed = [
        CacheWorkload(name, WORKLOADS[name], 1, (WORKLOADS[name].seq_len,))
        for name in ("seed-1024", "seed-4096", "seed-16384", "longnet-128k")
    ]
    lengths = slide_lengths(slides)
    base = replace(WORKLOADS["gigapath-10k"], name="slides", seq_len=max(lengths))
    return [*fixed, CacheWorkload("slides", base, SLIDE_LAYERS, lengths)]


def make_cache(name: str) -> BasePatternCache | None:
    if name == "none":
        return None
    return PatternCache() if name == "v2" else TieredPatternCache()


class Steps:
    """Runs a workload's steps with one cache, or with none. V3 is told the next length."""

    def __init__(
        self, workload: CacheWorkload, inputs: Inputs, cache: BasePatternCache | None
    ) -> None:
        self.workload = workload
        self.cache = cache
        self.device = inputs.query.device
        self._inputs = inputs
        self._announces = workload.is_changing and isinstance(cache, TieredPatternCache)

    def with_cache(self, cache: BasePatternCache | None) -> Steps:
        return Steps(self.workload, self._inputs, cache)

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
        if self._announces and self.cache is not None:
            self.cache.prefetch([self.workload.spec(step + 1)], self.device)
        call = self.call(step)
        for _ in range(self.workload.calls):
            call()

    def milliseconds(self, steps: Sequence[int], stopwatch: Stopwatch) -> float:
        """A step's, on average: from the device being idle to its being idle again."""
        stopwatch.synchronize()
        begin = time.perf_counter()
        for step in steps:
            self.run(step)
            stopwatch.synchronize()
        return (time.perf_counter() - begin) * 1e3 / len(steps)


def make_inputs(workload: CacheWorkload, device: torch.device) -> Inputs:
    dtype = workload.base.torch_dtype if device.type == "cuda" else torch.float32
    return Inputs.make(workload.base, device, dtype, seed=0)
