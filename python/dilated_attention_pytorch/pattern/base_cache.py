"""What every cache of patterns is: patterns on the host by specification, bounded, locked, counted.

Subclasses say when a pattern is copied to a device and how long it stays there.
"""

from __future__ import annotations

import os
import threading
import time
import weakref
from abc import ABC, abstractmethod
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from concurrent.futures import Future
from typing import Any

import torch
from torch import Tensor

from .bounds import at_least
from .device_words import Copy, send
from .entry import CPU, Entry
from .pattern import Pattern, PatternSpec
from .statistics import CacheStatistics
from .transfers import CudaTransfers, Transfers


class BasePatternCache(ABC):
    """Patterns by specification; the least recently used goes first.

    Methods may be called from any thread and on any CUDA stream; a pattern that two threads miss
    at once is planned once. A pattern that a CUDA graph captured stays in memory until `clear()`,
    even when it is evicted, since the graph holds only its address. Pickling and copying give an
    empty cache with the same settings. A forked process keeps the patterns of the host's ordinary
    memory; page-locked ones and copies on devices stay the parent's.

    Methods that begin with one underscore are for subclasses; those with "Locked." in their text
    are called with the lock held.
    """

    def __init__(self, max_entries: int, max_bytes: int, pin_after: int | None) -> None:
        self._lock = threading.Lock()
        self._transfers: Transfers = CudaTransfers()
        self._entries: OrderedDict[PatternSpec, Entry] = OrderedDict()
        self._newest: Entry | None = None
        self._planning: dict[PatternSpec, Future[Entry | None]] = {}
        self._captured: set[Copy] = set()
        self._abandoned: list[Copy | Entry] = []
        self._max_entries = at_least(0, max_entries, "max_entries")
        self._max_bytes = at_least(0, max_bytes, "max_bytes")
        self._pin_after = None if pin_after is None else at_least(0, pin_after, "pin_after")
        self._reset()
        _caches.add(self)

    def _reset(self) -> None:
        """Forgets all counts, and what else an empty cache should not know."""
        self._bytes = self._hits = self._misses = self._evictions = 0
        self._transfers_made = self._bytes_transferred = 0
        self._planning_seconds = self._transfer_seconds = self._waiting_seconds = 0.0

    @property
    def max_entries(self) -> int:
        return self._max_entries

    @property
    def max_bytes(self) -> int:
        return self._max_bytes

    def lookup(self, spec: PatternSpec, device: torch.device = CPU) -> tuple[Pattern, Tensor]:
        """The pattern, planned if need be, and its words on `device` for the current stream.

        Raises:
            ValueError: the specification is wrong.
            RuntimeError: the words are not on the device and a CUDA graph is being captured.
        """
        with self._lock:
            entry = self._entries.get(spec)
            if entry is not None:
                self._hits += 1
                entry.uses += 1
                if entry is not self._newest:
                    self._turn_to(entry, device)
                return entry.pattern, self._words(entry, device, True)
            self._misses += 1
        entry = self._planned(spec, device)
        with self._lock:
            entry.uses += 1
            self._turn_to(entry, device)
            words = self._words(entry, device, False)
            self._evict()
            return entry.pattern, words

    @abstractmethod
    def prefetch(self, specs: Iterable[PatternSpec], device: torch.device) -> None:
        """Announces patterns that `device` will need soon; counts as no look-up.

        Raises:
            ValueError: a specification is wrong.
            RuntimeError: a CUDA graph is being captured.
        """

    @abstractmethod
    def statistics(self) -> CacheStatistics: ...

    def _counts(self) -> dict[str, Any]:
        """Locked. The fields of CacheStatistics."""
        return {
            "size": len(self._entries),
            "bytes": self._bytes,
            "device_bytes": self._bytes - sum(e.pattern.nbytes for e in self._entries.values()),
            "hits": self._hits,
            "misses": self._misses,
            "evictions": self._evictions,
            "transfers": self._transfers_made,
            "bytes_transferred": self._bytes_transferred,
            "planning_seconds": self._planning_seconds,
            "transfer_seconds": self._transfer_seconds,
            "waiting_seconds": self._waiting_seconds,
        }

    @abstractmethod
    def _settings(self) -> dict[str, Any]:
        """The constructor's arguments."""

    @abstractmethod
    def _words(self, entry: Entry, device: torch.device, hit: bool) -> Tensor:
        """Locked. The words for the current stream, copied if need be; `hit` is for counting."""

    @abstractmethod
    def _drop(self, entry: Entry) -> None:
        """Locked. The entry is no longer held: releases its copies on devices."""

    def _turn_to(self, entry: Entry, device: torch.device) -> None:
        """Locked. The look-up is of another pattern than the one before."""
        if entry.held:
            self._entries.move_to_end(entry.pattern.spec)
            self._newest = entry

    def _make(self, spec: PatternSpec, device: torch.device) -> Pattern:
        """Plans, for use on `device`; not locked, so that other look-ups need not wait."""
        return Pattern.plan(spec)

    def _planned(self, spec: PatternSpec, device: torch.device) -> Entry:
        """The entry, planned by this thread unless another one is at it."""
        while True:
            with self._lock:
                if (held := self._entries.get(spec)) is not None:
                    return held
                pending = self._planning.get(spec)
                if pending is None:
                    mine = self._planning[spec] = Future()
                    break
            began = time.perf_counter()
            entry = pending.result()
            with self._lock:
                self._waiting_seconds += time.perf_counter() - began
            if entry is not None:  # else it failed, and this thread finds out why
                return entry
        made: Entry | None = None
        began = time.perf_counter()
        try:
            made = Entry(self._make(spec, device))
            return made
        finally:
            with self._lock:
                self._planning.pop(spec, None)
                if made is not None:
                    self._hold(spec, made, time.perf_counter() - began)
            mine.set_result(made)

    def _hold(self, spec: PatternSpec, entry: Entry, seconds: float) -> None:
        """Locked."""
        self._planning_seconds += seconds
        entry.held = True
        self._entries[spec] = entry
        self._newest = None
        self._bytes += entry.pattern.nbytes
        self._evict()

    def _send(
        self, entries: Sequence[Entry], device: torch.device, blocking: bool = False
    ) -> tuple[list[Copy], int]:
        """Locked. Copies of the entries by one transfer, and the bytes that they take."""
        self._refuse_capture(device)
        began = time.perf_counter()
        sources = [entry.pattern.words for entry in entries]
        copies, nbytes = send(sources, device, self._transfers, blocking)
        self._transfers_made += 1
        self._bytes_transferred += sum(source.nbytes for source in sources)
        self._transfer_seconds += time.perf_counter() - began
        return copies, nbytes

    def _is_captured(self, device: torch.device) -> bool:
        """Whether a graph captures what is enqueued on the current stream."""
        return device.type == "cuda" and self._transfers.capturing(device.index)

    def _refuse_capture(self, device: torch.device) -> None:
        if self._is_captured(device):
            raise RuntimeError(
                "patterns can't be copied to the GPU while a CUDA graph is captured: put them "
                "there before the capture, by prefetch() or by calls with the same shapes"
            )

    def _evict(self) -> None:
        """Locked. Until what is held is within the bounds."""
        while len(self._entries) > self._max_entries or self._bytes > self._max_bytes:
            entry = self._entries.pop(self._victim())
            if entry is self._newest:
                self._newest = None
            entry.held = False
            self._bytes -= entry.pattern.nbytes
            self._evictions += 1
            self._drop(entry)

    def _victim(self) -> PatternSpec:
        """Locked. The least recently used; one that is pinned is passed over, and ages by that."""
        if self._pin_after is not None:
            for spec, entry in self._entries.items():
                if entry.uses <= self._pin_after:
                    return spec
                entry.uses //= 2
        return next(iter(self._entries))

    def clear(self) -> None:
        """Drops all patterns and counts. Graphs that captured one must not be replayed after."""
        with self._lock:
            for entry in self._entries.values():
                entry.held = False
                self._drop(entry)
            self._entries.clear()
            self._captured.clear()
            self._newest = None
            self._reset()

    def resize(self, *, max_entries: int | None = None, max_bytes: int | None = None) -> None:
        """Sets the capacities that are given and evicts what no longer fits.

        Raises:
            ValueError: a capacity below 0.
        """
        with self._lock:
            if max_entries is not None:
                self._max_entries = at_least(0, max_entries, "max_entries")
            if max_bytes is not None:
                self._max_bytes = at_least(0, max_bytes, "max_bytes")
            self._evict()

    def __len__(self) -> int:
        with self._lock:
            return len(self._entries)

    def __contains__(self, spec: object) -> bool:
        with self._lock:
            return spec in self._entries

    def __reduce__(self) -> tuple[Any, ...]:
        return _remake, (type(self), self._settings())

    def __repr__(self) -> str:
        settings = ", ".join(f"{name}={value}" for name, value in self._settings().items())
        return f"{type(self).__name__}({settings}): {self.statistics()}"

    def _after_fork(self) -> None:
        """In the child, where no other thread lives on and no device memory may be touched."""
        self._lock = threading.Lock()
        self._planning = {}
        self._abandoned += self._captured  # never released: that would call the device
        self._captured = set()
        self._newest = None
        locked = [spec for spec, entry in self._entries.items() if entry.pattern.page_locked]
        self._abandoned += [self._entries.pop(spec) for spec in locked]
        for entry in self._entries.values():
            self._abandoned += [copy for device, copy in entry.copies.items() if device != CPU]
            entry.copies = {CPU: entry.host}
        self._bytes = sum(entry.pattern.nbytes for entry in self._entries.values())


def _remake(cache: type[BasePatternCache], settings: dict[str, Any]) -> BasePatternCache:
    return cache(**settings)


_caches: weakref.WeakSet[BasePatternCache] = weakref.WeakSet()


def _after_fork_in_child() -> None:
    for cache in list(_caches):
        cache._after_fork()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork_in_child)
