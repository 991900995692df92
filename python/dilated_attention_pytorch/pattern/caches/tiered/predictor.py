"""Learns sequences that repeat, and predicts what comes next."""

from __future__ import annotations

from collections import OrderedDict
from typing import Generic, TypeVar

T = TypeVar("T")


class Predictor(Generic[T]):
    """Predicts what followed the last two items, if the same item did so twice in a row.

    Two items tell apart what one can't, as in A B A C A B A C. Remembers the latest `capacity`
    pairs. Items are hashable; not locked.
    """

    def __init__(self, capacity: int = 1024) -> None:
        self._capacity = capacity
        self._followers: OrderedDict[tuple[T, T], tuple[T, bool]] = OrderedDict()
        self._last: tuple[T, ...] = ()

    def observe(self, item: T) -> T | None:
        """The item that is expected after this one, None if nothing is."""
        if len(self._last) == 2:
            self._learn((self._last[0], self._last[1]), item)
        self._last = (*self._last[-1:], item)
        if len(self._last) < 2:
            return None
        follower, confirmed = self._followers.get((self._last[0], item), (None, False))
        return follower if confirmed else None

    def _learn(self, pair: tuple[T, T], item: T) -> None:
        known = self._followers.pop(pair, None)
        self._followers[pair] = (item, known is not None and known[0] == item)
        if len(self._followers) > self._capacity:
            self._followers.popitem(last=False)
