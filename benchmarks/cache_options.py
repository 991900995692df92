"""The two options of V2's cache, each against its absence, where it could help."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from dilated_attention_pytorch import PatternCache

from .cache_workloads import CacheWorkload
from .timing import Stopwatch

_CPU = torch.device("cpu")


@dataclass(frozen=True, slots=True)
class Option:
    """`run(cache)` gives the milliseconds of one measurement with a new cache."""

    name: str
    setting: dict[str, Any]
    absence: dict[str, Any]
    where: str
    run: Callable[[PatternCache], float]


class Scenes:
    """What the options are measured on: patterns of the slides workload, on one device."""

    def __init__(self, slides: CacheWorkload, device: torch.device, large_seq_len: int) -> None:
        self._specs = [slides.spec(step) for step in range(len(slides.lengths))]
        self._large = self._specs[0]._replace(seq_len=large_seq_len)
        self._device = device
        self._stopwatch = Stopwatch(device)
        self._busy = torch.randn(2048, 2048, device=device) if device.type == "cuda" else None

    def announced(self, cache: PatternCache, count: int = 32) -> float:
        """The copies of many small patterns, which are planned already."""
        specs = sorted(self._specs)[:count]
        cache.prefetch(specs, _CPU)
        return self._timed(lambda: cache.prefetch(specs, self._device))

    def behind_work(self, cache: PatternCache) -> float:
        """A large pattern's first use behind work that is under way, and host work after it."""
        cache.prefetch([self._large], _CPU)
        return self._timed(lambda: self._use(cache))

    def _use(self, cache: PatternCache) -> None:
        if self._busy is not None:
            for _ in range(100):
                torch.mm(self._busy, self._busy)
        _, words = cache.lookup(self._large, self._device)
        words.sum()
        sum(range(100_000))  # some milliseconds of what a program does besides

    def _timed(self, function: Callable[[], object]) -> float:
        self._stopwatch.synchronize()
        began = time.perf_counter()
        function()
        self._stopwatch.synchronize()
        return (time.perf_counter() - began) * 1e3


def options(scenes: Scenes) -> Sequence[Option]:
    return (
        Option(
            "batched transfer",
            {"batch_transfers": True},
            {"batch_transfers": False},
            "the 32 shortest slides, planned already, announced together",
            scenes.announced,
        ),
        Option(
            "asynchronous transfer",
            {"async_transfers": True},
            {"async_transfers": False},
            "the first use of a pattern over 10 MB, behind work that is under way",
            scenes.behind_work,
        ),
    )


def measure(option: Option, rounds: int) -> dict[str, Any]:
    """Both settings in turn, after one measurement of each that does not count."""
    off: list[float] = []
    on: list[float] = []
    for index in range(rounds + 1):
        pair = ((off, option.absence), (on, option.setting))
        for samples, setting in pair if index % 2 else reversed(pair):
            samples.append(option.run(PatternCache(**setting)))
    return {
        "option": option.name,
        "setting": option.setting,
        "absence": option.absence,
        "where": option.where,
        "off_ms": off[1:],
        "on_ms": on[1:],
    }
