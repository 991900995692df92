"""The copies that a cache with two tiers keeps on one device."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from ..device_words import Allocation, Copy, held_bytes
from ..entry import Entry
from ..tally import Tally


class HotTier:
    """Copies by entry, within a budget of bytes. Not locked: the cache's lock covers it.

    A copy that was made ahead is *promised*: until it is read, or until a given look-up, it makes
    way for nothing.
    """

    def __init__(self) -> None:
        self.copies: dict[Entry, Copy] = {}
        self.promised: dict[Copy, int] = {}  # until which look-up
        self._bytes = Tally(lambda: held_bytes(self.copies.values()))
        self.promotions = self.demotions = 0
        self.prefetches = self.prefetch_hits = self.wasted_prefetches = 0

    @property
    def bytes(self) -> int:
        return self._bytes.read()

    def counts(self) -> dict[str, int]:
        """The tier's part of TieredCacheStatistics."""
        return {
            "hot_size": len(self.copies),
            "device_bytes": self.bytes,
            "promotions": self.promotions,
            "demotions": self.demotions,
            "prefetches": self.prefetches,
            "prefetch_hits": self.prefetch_hits,
            "wasted_prefetches": self.wasted_prefetches,
        }

    def has(self, entry: Entry) -> bool:
        """Whether there is a copy that no borrower wrote into."""
        copy = self.copies.get(entry)
        return copy is not None and copy.is_intact

    def promote(self, entry: Entry, copy: Copy) -> None:
        self.promotions += 1
        self._place(entry, copy)

    def promise(self, entries: Sequence[Entry], copies: Sequence[Copy], until: int) -> None:
        """Takes copies that were made ahead by one transfer."""
        self.prefetches += len(copies)
        for entry, copy in zip(entries, copies, strict=True):
            self._place(entry, copy)
            self.promised[copy] = until

    def _place(self, entry: Entry, copy: Copy) -> None:
        self.drop(entry)
        total = self._bytes.begin()
        self.copies[entry] = copy
        self._bytes.end(total + copy.allocation.admit(copy))

    def redeem(self, copy: Copy) -> None:
        """The promised copy is read for the first time."""
        del self.promised[copy]
        self.prefetch_hits += 1

    def drop(self, entry: Entry) -> None:
        """Lets go of the entry's copy, if there is one."""
        copy = self.copies.get(entry)
        if copy is not None:
            total = self._bytes.begin()
            total -= copy.allocation.release(copy)
            if self.promised.pop(copy, None) is not None:
                self.wasted_prefetches += 1
            del self.copies[entry]
            self._bytes.end(total)

    def make_room(
        self, nbytes: int, limit: int, uses: int, now: int, order: Iterable[Entry]
    ) -> bool:
        """Whether `nbytes` more fit into `limit`, after demoting entries with fewer than `uses`.

        The coldest go first: by uses, then as they come in `order`. Nothing goes if that would not
        be enough. `now` is the number of the current look-up.
        """
        missing = self.bytes + nbytes - limit
        victims: list[Entry] = []
        left: dict[Allocation, int] = {}
        if missing > 0:
            for entry in self._coldest(order):
                copy = self.copies[entry]
                if missing <= 0 or entry.uses >= uses:
                    break
                if self.promised.get(copy, -1) < now:
                    victims.append(entry)
                    memory = copy.allocation
                    left[memory] = left.get(memory, len(memory.users)) - 1
                    missing -= 0 if left[memory] else memory.nbytes
        if missing > 0:
            return False
        for entry in victims:
            self.demote(entry)
        return True

    def shrink(self, limit: int, order: Iterable[Entry]) -> None:
        """Demotes the coldest, whatever they are, until the limit holds."""
        for entry in self._coldest(order):
            if self.bytes <= limit:
                break
            self.demote(entry)

    def demote(self, entry: Entry) -> None:
        self.demotions += 1
        self.drop(entry)

    def _coldest(self, order: Iterable[Entry]) -> list[Entry]:
        hot = (entry for entry in order if entry in self.copies)
        return sorted(hot, key=lambda entry: entry.uses)
