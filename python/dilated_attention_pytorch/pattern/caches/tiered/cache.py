"""V3's cache of planned patterns: hot ones on the GPU, cold ones on the host."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ...bounds import at_least
from ...pattern import Pattern, PatternSpec
from ..base_cache import BasePatternCache, distinct_specs
from ..device_words import Copy
from ..entry import CPU, Entry, full_device
from ..statistics import TieredCacheStatistics
from ..transfers import WORD_BYTES, pack
from .hot_tier import HotTier
from .predictor import Predictor

# Packing copies on the host; above this size that costs more than a transfer of its own.
_BATCHED_BYTES = 256 * 2**10


class TieredPatternCache(BasePatternCache):
    """Patterns by specification, in page-locked host memory, and the hot ones on devices as well.

    A look-up of a cold pattern copies it for that call. From look-up number `promote_after` on, the
    copy stays on the device if there is room, or if the patterns that must make way were looked up
    less. Counts age: they are halved every `ageing_period` look-ups. Copies made ahead, by
    `prefetch` or the predictor, keep their place for as long, or until they are used.

    Announced patterns are planned on the cache's own thread and copied on its own stream, small
    ones in one transfer; a reader's stream waits for the event after the copy. Call `drain()`
    before capturing a CUDA graph: work on another thread can make a capture fail.

    Threads, streams, graphs, pickling and forks: as `PatternCache`.

    Args:
        max_entries, max_bytes: most patterns, and bytes of words, on the host.
        hot_bytes: most bytes of words on each device.
        promote_after: look-ups from which on a pattern may stay on the device, at least 1.
        pin_after: patterns looked up more often don't make way for prefetched ones, and leave the
            host only after all others. None: no pattern is pinned.
        ageing_period: look-ups, at least 1.
        predict: copies the expected next pattern ahead, where sequences of lengths repeat.
        common: patterns to plan at construction.

    Raises:
        ValueError: a number that is too small; a wrong specification.
    """

    def __init__(
        self,
        max_entries: int = 128,
        max_bytes: int = 256 * 2**20,
        hot_bytes: int = 64 * 2**20,
        *,
        promote_after: int = 3,
        pin_after: int | None = 1000,
        ageing_period: int = 4096,
        predict: bool = True,
        common: Iterable[PatternSpec] = (),
    ) -> None:
        self._hot_bytes = at_least(0, hot_bytes, "hot_bytes")
        self._promote_after = at_least(1, promote_after, "promote_after")
        self._ageing_period = at_least(1, ageing_period, "ageing_period")
        self._pin_after = None if pin_after is None else at_least(0, pin_after, "pin_after")
        self._predict = bool(predict)
        self._common = distinct_specs(common, "common")
        self._tiers: dict[torch.device, HotTier] = {}
        self._predictor: Predictor[PatternSpec] = Predictor()
        self._expected: set[tuple[PatternSpec, torch.device]] = set()  # and being copied ahead
        super().__init__(max_entries, max_bytes)
        for spec in self._common:
            self._planned(spec, CPU)

    def _reset(self) -> None:
        super()._reset()
        self._tiers.clear()
        self._predictor = Predictor()
        self._age_at = self._ageing_period
        self._hot_hits = self._cold_hits = 0

    @property
    def hot_bytes(self) -> int:
        """Most bytes of words on each device."""
        return self._hot_bytes

    def prefetch(self, specs: Iterable[PatternSpec], device: torch.device) -> None:
        """Plans the patterns and copies them to `device`, in the background; not a look-up.

        They keep their place for `ageing_period` look-ups. Those for which pinned or earlier
        prefetched ones would have to go stay on the host. `drain` raises what a wrong specification
        leads to.

        Raises:
            RuntimeError: a CUDA graph is being captured.
        """
        self.announce(specs, device)

    def statistics(self) -> TieredCacheStatistics:
        """What is held now, by tier, and the counts since the cache was made or cleared."""
        with self._lock:
            tiers = [tier.counts() for tier in (HotTier(), *self._tiers.values())]
            hot = {name: sum(tier[name] for tier in tiers) for name in tiers[0]}
            counts = {**self._counts(), **hot}
            counts["bytes"] += hot["device_bytes"]
            return TieredCacheStatistics(
                **counts, hot_hits=self._hot_hits, cold_hits=self._cold_hits
            )

    def resize(
        self,
        *,
        max_entries: int | None = None,
        max_bytes: int | None = None,
        hot_bytes: int | None = None,
    ) -> None:
        """Sets the capacities that are given, and evicts and demotes what no longer fits.

        Raises:
            ValueError: a capacity below 0.
        """
        super().resize(max_entries=max_entries, max_bytes=max_bytes)
        if hot_bytes is not None:
            with self._lock:
                self._hot_bytes = at_least(0, hot_bytes, "hot_bytes")
                for tier in self._tiers.values():
                    tier.shrink(self._hot_bytes, self._entries.values())

    def _settings(self) -> dict[str, Any]:
        return {
            "max_entries": self._max_entries,
            "max_bytes": self._max_bytes,
            "hot_bytes": self._hot_bytes,
            "promote_after": self._promote_after,
            "pin_after": self._pin_after,
            "ageing_period": self._ageing_period,
            "predict": self._predict,
            "common": self._common,
        }

    def _make(self, spec: PatternSpec, device: torch.device) -> Pattern:
        return self._page_locked(super()._make(spec, device), device)

    def _page_locked(self, pattern: Pattern, device: torch.device) -> Pattern:
        # During a capture no memory may be page-locked; what needs it there is refused later.
        if device.type != "cuda" or pattern.page_locked or self._is_captured(full_device(device)):
            return pattern
        with torch.inference_mode(False):
            words = self._transfers.pin(pattern.words, full_device(device).index)
        return replace(pattern, words=words, page_locked=True)

    def _words(self, entry: Entry, device: torch.device, hit: bool) -> Tensor:
        entry.uses += 1
        if self._hits + self._misses >= self._age_at:
            self._age()
        tier = self._tiers.get(device)
        if tier is None:
            if device.type == "cpu":
                self._cold_hits += hit
                return entry.pattern.words
            device = full_device(device)
            tier = self._tiers.setdefault(device, HotTier())
        copy = tier.copies.get(entry)
        if copy is None or not copy.is_intact:
            self._cold_hits += hit
            copy = self._bring(entry, device, tier)
        else:
            self._hot_hits += hit
            if copy in tier.promised:
                tier.redeem(copy)
        words, captured = copy.read()
        if captured:
            self._captured.add(copy)
        return words

    def _age(self) -> None:
        self._age_at = self._hits + self._misses + self._ageing_period
        for entry in self._entries.values():
            entry.uses //= 2

    def _bring(self, entry: Entry, device: torch.device, tier: HotTier) -> Copy:
        """Locked. A copy for this look-up; it stays if the pattern is hot."""
        tier.drop(entry)  # if a borrower wrote into it
        (copy,) = self._send([entry], device)
        is_hot = self._holds(entry) and entry.uses >= self._promote_after
        if is_hot and self._make_room(tier, copy.allocation.nbytes, entry.uses):
            tier.promote(entry, copy)
        return copy

    def _send(
        self, entries: Sequence[Entry], device: torch.device, blocking: bool = False
    ) -> list[Copy]:
        for entry in entries:  # the common ones, for instance, were planned for no device
            entry.pattern = self._page_locked(entry.pattern, device)
        return super()._send(entries, device, blocking)

    def _make_room(self, tier: HotTier, nbytes: int, uses: int) -> bool:
        now = self._hits + self._misses
        return tier.make_room(nbytes, self._hot_bytes, uses, now, self._entries.values())

    def _drop(self, entry: Entry) -> None:
        for tier in self._tiers.values():
            tier.drop(entry)

    def _turn_to(self, entry: Entry, device: torch.device) -> None:
        super()._turn_to(entry, device)
        if self._predict and device.type != "cpu":
            expected = self._predictor.observe(entry.pattern.spec)
            if expected is not None:
                self._expect(expected, full_device(device))

    def _victim(self) -> PatternSpec:
        """Locked. Passes over pinned patterns, which ages them."""
        if self._pin_after is not None:
            for spec, entry in self._entries.items():
                if entry.uses <= self._pin_after:
                    return spec
                entry.uses //= 2
        return super()._victim()

    def _expect(self, spec: PatternSpec, device: torch.device) -> None:
        """Locked. Has the pattern copied ahead, unless it is hot, too large or under way."""
        entry, tier = self._entries.get(spec), self._tiers.get(device)
        if entry is not None:
            is_hot = tier is not None and tier.has(entry)
            if is_hot or entry.nbytes > self._hot_bytes:
                return
        if (spec, device) not in self._expected and not self._is_captured(device):
            self._background.submit(partial(self._fetch_expected, spec, device))
            self._expected.add((spec, device))

    def _fetch_expected(self, spec: PatternSpec, device: torch.device) -> None:
        """On the background's thread."""
        try:
            self._fetch((spec,), device)
        finally:
            with self._lock:
                self._expected.discard((spec, device))

    def _fetch(self, specs: Sequence[PatternSpec], device: torch.device) -> None:
        """On the background's thread."""
        entries = []
        for spec in specs:
            if self._background.is_stopping:
                return
            entries.append(self._planned(spec, device))
        large = [entry for entry in entries if entry.nbytes > _BATCHED_BYTES]
        small = [entry for entry in entries if entry.nbytes <= _BATCHED_BYTES]
        if device.type != "cpu":
            for group in (small, *([entry] for entry in large)):
                with self._lock:
                    self._copy_ahead(group, device, self._tiers.setdefault(device, HotTier()))

    def _copy_ahead(self, entries: Sequence[Entry], device: torch.device, tier: HotTier) -> None:
        """Locked. One transfer for as many of the entries as there is room for."""
        missing = [entry for entry in entries if self._holds(entry) and not tier.has(entry)]
        uses = sys.maxsize if self._pin_after is None else self._pin_after + 1
        while missing:
            size, _ = pack([entry.pattern.words for entry in missing])
            if self._make_room(tier, size * WORD_BYTES, uses):
                break
            missing.pop()
        else:
            return
        with self._side_stream(device):
            copies = self._send(missing, device)
        tier.promise(missing, copies, self._hits + self._misses + self._ageing_period)

    def _after_fork(self) -> None:
        super()._after_fork()
        self._expected = set()
        for tier in self._tiers.values():
            self._abandoned += tier.copies.values()
        self._tiers = {}
