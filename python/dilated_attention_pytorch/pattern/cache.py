"""The cache of planned patterns: bounded, locked, counted."""

from __future__ import annotations

import operator
import threading
from collections import OrderedDict
from dataclasses import dataclass

import torch
from torch import Tensor

from .device_words import DeviceWords, PlainWords
from .pattern import Pattern, PatternSpec
from .transfers import CudaTransfers, Transfers

_CPU = torch.device("cpu")


@dataclass(frozen=True, slots=True)
class CacheStatistics:
    """A snapshot. `size` counts patterns; `bytes` their words on the host and on all devices.

    A look-up is a hit if the pattern was planned already, else a miss. `transfers` counts copies
    to devices: one per pattern and device until the pattern is evicted.
    """

    size: int
    bytes: int
    hits: int
    misses: int
    evictions: int
    transfers: int

    @property
    def hit_rate(self) -> float:
        """hits / look-ups, 0 before the first."""
        lookups = self.hits + self.misses
        return self.hits / lookups if lookups else 0.0


_Words = DeviceWords | PlainWords


class _Entry:
    __slots__ = ("copies", "nbytes", "pattern")

    def __init__(self, pattern: Pattern) -> None:
        self.pattern = pattern
        self.copies: dict[torch.device, _Words] = {_CPU: PlainWords(pattern.words, _CPU)}
        self.nbytes = pattern.nbytes


class PatternCache:
    """Patterns by specification, least recently used evicted first.

    Patterns live on the host; each device that asks gets one copy at first use, kept with the
    entry. Methods may be called from any thread and on any CUDA stream. A pattern that a CUDA graph
    captured stays in memory until `clear()`, even when it is evicted, since the graph holds only
    its address. Pickling and copying give an empty cache of the same capacity.

    Args:
        max_entries: most patterns held, 0 for none.
        max_bytes: most bytes of words held, copies on devices included.

    Raises:
        ValueError: a capacity below 0.
    """

    _transfers: Transfers = CudaTransfers()

    def __init__(self, max_entries: int = 128, max_bytes: int = 256 * 2**20) -> None:
        self._lock = threading.Lock()
        self._entries: OrderedDict[PatternSpec, _Entry] = OrderedDict()
        self._newest: _Entry | None = None
        self._captured: set[_Words] = set()
        self._max_entries = _capacity(max_entries, "max_entries")
        self._max_bytes = _capacity(max_bytes, "max_bytes")
        self._bytes = self._hits = self._misses = self._evictions = self._copies_made = 0

    @property
    def max_entries(self) -> int:
        return self._max_entries

    @property
    def max_bytes(self) -> int:
        return self._max_bytes

    def lookup(self, spec: PatternSpec, device: torch.device = _CPU) -> tuple[Pattern, Tensor]:
        """The pattern, planned if need be, and its words on `device` for the current stream.

        Raises:
            ValueError: the specification is wrong.
            RuntimeError: the words are not on the device and a CUDA graph is being captured.
        """
        with self._lock:
            entry = self._entries.get(spec)
            if entry is not None:
                self._hits += 1
                if entry is not self._newest:
                    self._entries.move_to_end(spec)
                    self._newest = entry
                return entry.pattern, self._words(entry, device)
            self._misses += 1
        # Planned outside the lock, so that look-ups of other patterns need not wait.
        pattern = Pattern.plan(spec)
        with self._lock:
            entry = self._entries.get(spec)
            if entry is None:
                entry = self._entries[spec] = self._newest = _Entry(pattern)
                self._bytes += entry.nbytes
            words = self._words(entry, device)
            self._evict()
            return entry.pattern, words

    def _words(self, entry: _Entry, device: torch.device) -> Tensor:
        copy = entry.copies.get(device) or self._copy(entry, device)
        words, captured = copy.read()
        if captured:
            self._captured.add(copy)
        return words

    def _copy(self, entry: _Entry, device: torch.device) -> _Words:
        """The entry's words on a device that did not have them."""
        device = _full_device(device)
        if device in entry.copies:
            return entry.copies[device]
        copy: _Words
        if device.type == "cuda":
            copy = DeviceWords(entry.pattern.words, device, self._transfers)
        else:
            copy = PlainWords(entry.pattern.words, device)
        entry.copies[device] = copy
        entry.nbytes += copy.nbytes
        self._bytes += copy.nbytes
        self._copies_made += 1
        self._evict()
        return copy

    def _evict(self) -> None:
        while len(self._entries) > self._max_entries or self._bytes > self._max_bytes:
            _, entry = self._entries.popitem(last=False)
            if entry is self._newest:
                self._newest = None
            self._bytes -= entry.nbytes
            self._evictions += 1

    def statistics(self) -> CacheStatistics:
        with self._lock:
            return CacheStatistics(
                len(self._entries),
                self._bytes,
                self._hits,
                self._misses,
                self._evictions,
                self._copies_made,
            )

    def clear(self) -> None:
        """Drops all patterns and counts. Graphs that captured one must not be replayed after."""
        with self._lock:
            self._entries.clear()
            self._captured.clear()
            self._newest = None
            self._bytes = self._hits = self._misses = self._evictions = self._copies_made = 0

    def resize(self, *, max_entries: int | None = None, max_bytes: int | None = None) -> None:
        """Sets the capacities that are given and evicts what no longer fits."""
        with self._lock:
            if max_entries is not None:
                self._max_entries = _capacity(max_entries, "max_entries")
            if max_bytes is not None:
                self._max_bytes = _capacity(max_bytes, "max_bytes")
            self._evict()

    def __len__(self) -> int:
        with self._lock:
            return len(self._entries)

    def __contains__(self, spec: object) -> bool:
        with self._lock:
            return spec in self._entries

    def __reduce__(self) -> tuple[type[PatternCache], tuple[int, int]]:
        return PatternCache, (self._max_entries, self._max_bytes)

    def __repr__(self) -> str:
        return (
            f"PatternCache(max_entries={self._max_entries}, max_bytes={self._max_bytes}): "
            f"{self.statistics()}"
        )


def _full_device(device: torch.device) -> torch.device:
    """The name under which copies are kept: the CPU has no index, a GPU has one."""
    if device.type == "cuda" and device.index is None:
        return torch.device("cuda", torch.cuda.current_device())
    return _CPU if device.type == "cpu" else device


def _capacity(value: int, name: str) -> int:
    try:
        capacity = operator.index(value)
    except TypeError:
        raise TypeError(f"{name} must be an integer, got {value!r}") from None
    if capacity < 0:
        raise ValueError(f"{name} must be at least 0, got {value}")
    return capacity


_default = PatternCache()


def default_pattern_cache() -> PatternCache:
    """The process's cache, used wherever no other is given."""
    return _default
