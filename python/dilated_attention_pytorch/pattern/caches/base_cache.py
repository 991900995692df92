"""The base of the pattern caches: patterns on the host by specification, bounded, locked, counted.

Subclasses say when a pattern is copied to a device and how long it stays there.
"""

from __future__ import annotations

import os
import threading
import time
import warnings
import weakref
from abc import ABC, abstractmethod
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..advice import level_of_caller
from ..bounds import at_least
from ..pattern import Pattern, PatternSpec, check_spec
from .background import Background
from .device_words import Copy, send
from .entry import CPU, Entry, full_device
from .statistics import CacheStatistics
from .tally import Tally
from .transfers import CudaTransfers, Transfers
from .turn import Turn


class BasePatternCache(ABC):
    """Patterns by specification; the least recently used goes first.

    Methods may be called from any thread and on any CUDA stream; a pattern that two threads miss
    at once is planned once. A pattern that a CUDA graph captured stays in memory until `clear()`,
    even when it is evicted, since the graph holds only its address. Pickling and copying give an
    empty cache with the same settings. A forked process keeps the patterns in ordinary host memory;
    page-locked ones and copies on devices stay with the parent.

    Methods with one leading underscore are for subclasses. "Locked." means that the caller holds
    the lock.
    """

    def __init__(self, max_entries: int, max_bytes: int) -> None:
        self._lock = threading.Lock()
        self._transfers: Transfers = CudaTransfers()
        self._entries: OrderedDict[PatternSpec, Entry] = OrderedDict()
        self._newest: Entry | None = None
        self._tally = Tally(self._count_bytes)
        self._planning: dict[PatternSpec, Turn] = {}
        self._captured: set[Copy] = set()
        self._abandoned: list[Copy | Entry] = []
        self._background = Background()
        self._max_entries = at_least(0, max_entries, "max_entries")
        self._max_bytes = at_least(0, max_bytes, "max_bytes")
        self._reset()
        _caches.add(self)

    def _reset(self) -> None:
        """Resets the counters and what subclasses have learnt."""
        self._hits = self._misses = self._evictions = 0
        self._transfers_made = self._bytes_transferred = 0
        self._planning_seconds = self._transfer_seconds = self._waiting_seconds = 0.0

    @property
    def max_entries(self) -> int:
        """Most patterns held."""
        return self._max_entries

    @property
    def max_bytes(self) -> int:
        """Most bytes of words held."""
        return self._max_bytes

    def lookup(self, spec: PatternSpec, device: torch.device = CPU) -> tuple[Pattern, Tensor]:
        """The pattern, planned if necessary, and its words on `device` for the current stream.

        Returns:
            (pattern, words), words being int32 [words] on `device`: the cache's own, not to be
            written to.

        Raises:
            ValueError: the specification is wrong.
            RuntimeError: the words are not on the device and a CUDA graph is being captured.
        """
        return self.find(spec, device) or self.lookup_missing(spec, device)

    def lookup_missing(self, spec: PatternSpec, device: torch.device) -> tuple[Pattern, Tensor]:
        """The rest of `lookup`, where `find` has just given None."""
        with self._lock:
            self._misses += 1
        entry = self._planned(spec, device)
        with self._lock:
            self._turn_to(entry, device)
            words = self._words(entry, device, False)
            self._evict()
            # The newest is the last to be evicted.
            is_too_large = not self._entries and min(self._max_entries, self._max_bytes) > 0
        if is_too_large:
            _warn_of_size(entry.nbytes, self._max_bytes)
        return entry.pattern, words

    def find(self, spec: PatternSpec, device: torch.device = CPU) -> tuple[Pattern, Tensor] | None:
        """As `lookup` if the pattern is planned; else None, which does not count as a look-up.

        Raises:
            RuntimeError: as `lookup` does.
        """
        try:
            with self._lock:
                entry = self._entries.get(spec)
                if entry is None or not entry.pattern.is_intact:  # lookup() plans it again
                    return None
                self._hits += 1
                if entry is not self._newest:
                    self._turn_to(entry, device)
                return entry.pattern, self._words(entry, device, True)
        except TypeError:
            check_spec(spec)  # names the field that can't be hashed
            raise

    @abstractmethod
    def prefetch(self, specs: Iterable[PatternSpec], device: torch.device) -> None:
        """Announces patterns that `device` will need soon; does not count as a look-up.

        Raises:
            ValueError: a specification is wrong.
            RuntimeError: a CUDA graph is being captured.
        """

    def announce(self, specs: Iterable[PatternSpec], device: torch.device) -> None:
        """Plans the patterns and copies them to `device`, in the background.

        A look-up that comes earlier waits only for its own pattern. `drain` raises what a wrong
        specification leads to.

        Raises:
            RuntimeError: a CUDA graph is being captured.
        """
        device = full_device(device)
        self._refuse_capture(device)
        self._background.submit(partial(self._fetch, distinct_specs(specs), device))

    def drain(self) -> None:
        """Waits until what was announced is planned and its copies are enqueued.

        Raises:
            Exception: the first that was raised in the background since the last drain.
        """
        self._background.drain()

    @abstractmethod
    def _fetch(self, specs: Sequence[PatternSpec], device: torch.device) -> None:
        """Does what `announce` promises, on the background's thread, until that is stopping."""

    @abstractmethod
    def statistics(self) -> CacheStatistics:
        """What is held now, and the counts since the cache was made or cleared."""

    def _counts(self) -> dict[str, Any]:
        """Locked. The fields of CacheStatistics."""
        return {
            "size": len(self._entries),
            "bytes": self._bytes,
            "device_bytes": self._bytes - sum(e.nbytes for e in self._entries.values()),
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
        """Locked. The words for the current stream, copied if necessary; `hit` is for counting."""

    @abstractmethod
    def _drop(self, entry: Entry) -> None:
        """Locked. Releases the copies on devices of an entry that is about to go."""

    @property
    def _bytes(self) -> int:
        return self._tally.read()

    def _count_bytes(self) -> int:
        """Counts the bytes of all that is held, entry by entry."""
        return sum(entry.nbytes for entry in self._entries.values())

    def _find(self, spec: PatternSpec) -> Entry | None:
        """Locked. The entry if it is held. Drops one that a borrower wrote into."""
        entry = self._entries.get(spec)
        if entry is None or entry.pattern.is_intact:
            return entry
        self._forget(spec)
        return None

    def _holds(self, entry: Entry) -> bool:
        """Locked. False for an entry that was evicted while a caller works with it."""
        return self._entries.get(entry.pattern.spec) is entry

    def _turn_to(self, entry: Entry, device: torch.device) -> None:
        """Locked. Notes a look-up of another pattern than the last: it is now the newest."""
        if self._holds(entry):
            self._entries.move_to_end(entry.pattern.spec)
            self._newest = entry

    def _make(self, spec: PatternSpec, device: torch.device) -> Pattern:
        """Plans, for use on `device`; not locked, so that other look-ups need not wait."""
        check_spec(spec)
        parts = spec.parts()
        return Pattern.join(spec, self._parts(spec, parts)) if parts else Pattern.plan(spec)

    def _parts(self, spec: PatternSpec, parts: Sequence[PatternSpec]) -> list[Pattern]:
        """Patterns of a batch's lengths, which many batches share; the missing ones are planned."""
        held: dict[PatternSpec, Pattern] = {}
        missing: list[PatternSpec] = []
        with self._lock:
            for part in parts:
                if (entry := self._find(part)) is None:
                    missing.append(part)
                else:
                    held[part] = entry.pattern
                    self._entries.move_to_end(part)
                    self._newest = None
        planned = Pattern.plan_parts(spec, missing) if missing else []
        with self._lock:
            for pattern in planned:
                self._hold(pattern.spec, Entry(pattern))
        held.update((pattern.spec, pattern) for pattern in planned)
        return [held[part] for part in parts]

    def _planned(self, spec: PatternSpec, device: torch.device) -> Entry:
        """The entry, planned by this thread unless another one is already planning it."""
        turn = Turn()
        began = time.perf_counter()
        try:
            with self._lock:
                if (held := self._find(spec)) is not None:
                    return held
                turn = self._planning.setdefault(spec, turn)
            with turn.lock:
                if turn.made is None:  # this thread is the first, or those before it failed
                    return self._plan(spec, device, turn)
            with self._lock:
                self._waiting_seconds += time.perf_counter() - began
            return turn.made
        finally:  # a single call, before which no signal handler runs
            self._planning.pop(spec, None)

    def _plan(self, spec: PatternSpec, device: torch.device, turn: Turn) -> Entry:
        began = time.perf_counter()
        entry = Entry(self._make(spec, device))
        with self._lock:
            self._planning_seconds += time.perf_counter() - began
            self._hold(spec, entry)
            turn.made = entry
        return entry

    def _hold(self, spec: PatternSpec, entry: Entry) -> None:
        """Locked."""
        if spec in self._entries:
            self._forget(spec)
        self._newest = None
        total = self._tally.begin()
        self._entries[spec] = entry
        self._tally.end(total + entry.nbytes)
        self._evict()

    def _forget(self, spec: PatternSpec) -> None:
        """Locked. Drops the entry and its copies on devices."""
        self._newest = None
        entry = self._entries[spec]
        self._drop(entry)
        total = self._tally.begin()
        del self._entries[spec]
        self._tally.end(total - entry.nbytes)

    def _send(
        self, entries: Sequence[Entry], device: torch.device, blocking: bool = False
    ) -> list[Copy]:
        """Locked. Copies the entries to the device by one transfer."""
        self._refuse_capture(device)
        began = time.perf_counter()
        sources = [entry.pattern.words for entry in entries]
        copies = send(sources, device, self._transfers, blocking)
        self._transfers_made += 1
        self._bytes_transferred += sum(source.nbytes for source in sources)
        self._transfer_seconds += time.perf_counter() - began
        return copies

    def _side_stream(self, device: torch.device) -> AbstractContextManager[object]:
        """A context in which copies to a GPU wait for no other work on it."""
        is_cuda = device.type == "cuda"
        return self._transfers.side_stream(device.index) if is_cuda else nullcontext()

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
        """Locked. Evicts until what is held is within the bounds."""
        while len(self._entries) > self._max_entries or self._bytes > self._max_bytes:
            self._forget(self._victim())
            self._evictions += 1

    def _victim(self) -> PatternSpec:
        """Locked. The least recently used."""
        return next(iter(self._entries))

    def clear(self) -> None:
        """Drops all patterns and counts. Graphs that captured one must not be replayed after."""
        with self._lock:
            for spec in list(self._entries):
                self._forget(spec)
            self._captured.clear()
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
        """In the child, where no other thread exists and no device memory may be touched."""
        self._lock = threading.Lock()
        self._planning = {}
        self._background.abandon()
        self._abandoned += self._captured  # never released: that would call the device
        self._captured = set()
        self._newest = None
        locked = [spec for spec, entry in self._entries.items() if entry.pattern.page_locked]
        self._abandoned += [self._entries.pop(spec) for spec in locked]
        for entry in self._entries.values():
            self._abandoned += [copy for device, copy in entry.copies.items() if device != CPU]
            entry.copies = {CPU: entry.host}
        self._tally.forget()


def distinct_specs(specs: Iterable[PatternSpec], name: str = "specs") -> tuple[PatternSpec, ...]:
    """The specs, each once. Raises TypeError for anything else, or a list where a tuple must be."""
    given = tuple(specs)
    for spec in given:
        if not isinstance(spec, PatternSpec):
            raise TypeError(f"{name} must hold PatternSpecs, got {spec!r}")
    try:
        return tuple(dict.fromkeys(given))
    except TypeError:
        for spec in given:
            spec.check()
        raise


_has_warned = False


def _warn_of_size(nbytes: int, max_bytes: int) -> None:
    """Once a process."""
    global _has_warned
    if not _has_warned:
        _has_warned = True
        warnings.warn(
            f"a pattern of {nbytes} bytes, with its copies, is above its cache's max_bytes of "
            f"{max_bytes}, so every call plans it again: call the cache's resize(max_bytes=...), "
            "which is default_pattern_cache().resize(max_bytes=...) where no cache is given",
            RuntimeWarning,
            stacklevel=level_of_caller(),
        )


def _remake(cache: type[BasePatternCache], settings: dict[str, Any]) -> BasePatternCache:
    return cache(**settings)


_caches: weakref.WeakSet[BasePatternCache] = weakref.WeakSet()


def _after_fork_in_child() -> None:
    for cache in list(_caches):
        cache._after_fork()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork_in_child)
