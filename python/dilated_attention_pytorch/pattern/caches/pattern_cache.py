"""V2's cache of planned patterns, the default: one tier."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import chain, groupby
from typing import Any

import torch
from torch import Tensor

from ..pattern import PatternSpec
from .base_cache import BasePatternCache, distinct_specs
from .device_words import Copy, held_bytes
from .entry import CPU, Entry, full_device
from .statistics import CacheStatistics


class PatternCache(BasePatternCache):
    """Patterns by specification, least recently used evicted first.

    Patterns live on the host; each device that asks gets one copy at first use, kept with the
    entry. Methods may be called from any thread and on any CUDA stream. A pattern that a CUDA graph
    captured stays in memory until `clear()`, even when it is evicted, since the graph holds only
    its address. Pickling and copying give an empty cache with the same settings; a forked process
    keeps the patterns in ordinary host memory.

    Args:
        max_entries: most patterns held, 0 for none.
        max_bytes: most bytes of words held, copies on devices included.
        batch_transfers: `prefetch` copies patterns of similar size (within a factor of 2) at once.
        async_transfers: copies to a GPU go through page-locked memory and the host does not wait
            for them.

    Raises:
        ValueError: a number below 0.
    """

    def __init__(
        self,
        max_entries: int = 128,
        max_bytes: int = 256 * 2**20,
        *,
        batch_transfers: bool = True,
        async_transfers: bool = True,
    ) -> None:
        super().__init__(max_entries, max_bytes)
        self._batch_transfers = bool(batch_transfers)
        self._async_transfers = bool(async_transfers)

    def prefetch(self, specs: Iterable[PatternSpec], device: torch.device) -> None:
        """Plans the patterns and copies them to `device`, in the current stream's order, now.

        Does not count as a look-up.

        Raises:
            ValueError: a specification is wrong.
            RuntimeError: a CUDA graph is being captured.
        """
        device = full_device(device)
        self._refuse_capture(device)
        entries = [self._planned(spec, device) for spec in distinct_specs(specs)]
        with self._lock:
            for entry in entries:
                if self._holds(entry):
                    self._entries.move_to_end(entry.pattern.spec)
                    self._newest = None
            missing = sorted((e for e in entries if e.copy_on(device) is None), key=_size_class)
            for _, group in groupby(missing, _size_class if self._batch_transfers else id):
                self._keep([entry for entry in group if self._holds(entry)], device)

    def _fetch(self, specs: Sequence[PatternSpec], device: torch.device) -> None:
        """One by one: the first is needed first."""
        with self._side_stream(device):
            for spec in specs:
                if self._background.is_stopping:
                    return
                self.prefetch([spec], device)

    def statistics(self) -> CacheStatistics:
        with self._lock:
            return CacheStatistics(**self._counts())

    def _settings(self) -> dict[str, Any]:
        return {
            "max_entries": self._max_entries,
            "max_bytes": self._max_bytes,
            "batch_transfers": self._batch_transfers,
            "async_transfers": self._async_transfers,
        }

    def _words(self, entry: Entry, device: torch.device, hit: bool) -> Tensor:
        copy = entry.copies.get(device)
        if copy is None or copy.words._version != copy.version:  # is_intact, without a call
            copy = self._copy(entry, full_device(device))
        words, captured = copy.read()
        if captured:
            self._captured.add(copy)
        return words

    def _copy(self, entry: Entry, device: torch.device) -> Copy:
        return entry.copy_on(device) or self._keep([entry], device)[0]

    def _keep(self, entries: list[Entry], device: torch.device) -> list[Copy]:
        """Locked. Copies by one transfer and keeps the copies of entries that are held."""
        if not entries:
            return []
        copies = self._send(entries, device, blocking=not self._async_transfers)
        total = self._tally.begin()
        for entry, copy in zip(entries, copies, strict=True):
            if self._holds(entry):
                if (spoiled := entry.copies.get(device)) is not None:
                    total -= spoiled.allocation.release(spoiled)
                entry.copies[device] = copy
                total += copy.allocation.admit(copy)
        self._tally.end(total)
        self._evict()
        return copies

    def _drop(self, entry: Entry) -> None:
        total = self._tally.begin()
        for copy in entry.copies.values():
            total -= copy.allocation.release(copy)
        entry.copies = {CPU: entry.host}
        self._tally.end(total)

    def _count_bytes(self) -> int:
        copies = chain.from_iterable(e.copies.values() for e in self._entries.values())
        return super()._count_bytes() + held_bytes(copies)


def _size_class(entry: Entry) -> int:
    return entry.nbytes.bit_length()
