"""Ranks compare what they were called with, before they exchange anything.

Ranks that exchange different numbers of bytes hang, abort or compute nonsense. So each publishes
the fields of its call in the group's key-value store, or why it refuses the call, reads the others'
and raises the same error where they differ. Knows no torch.distributed, but for the store's
methods.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from datetime import timedelta
from typing import Any, Protocol

Fields = Mapping[str, str]


class Store(Protocol):
    """What is used of torch.distributed.Store."""

    def set(self, key: str, value: str) -> None: ...
    def get(self, key: str) -> bytes: ...
    def check(self, keys: list[str]) -> bool: ...
    def wait(self, keys: list[str], timeout: timedelta) -> None: ...


class Disagreement(ValueError):
    """Ranks were called with different arguments, or one of them refused its own."""


class Agreement:
    """One rank's side. Comparisons are numbered: all ranks make them in the same order.

    Args:
        store: shared by the ranks.
        timeout: how long to wait for a rank that does not come.
    """

    def __init__(self, store: Store, rank: int, size: int, timeout: timedelta) -> None:
        self._store, self._rank, self._size, self._timeout = store, rank, size, timeout
        self._number = 0

    def compare(self, fields: Fields) -> None:
        """Returns once all ranks have published equal fields.

        Raises:
            Disagreement: naming fields and ranks, the same on all; or the rank that refused.
            RuntimeError: a rank did not come within the timeout, or the store is gone.
        """
        entries = self._exchange({"fields": dict(fields)})
        refused = [
            f"rank {rank} refused its arguments: {entry['error']}"
            for rank, entry in enumerate(entries)
            if "error" in entry
        ]
        if refused:
            raise Disagreement("; ".join(refused))
        differences = describe_differences([entry["fields"] for entry in entries])
        if differences:
            raise Disagreement(
                f"all ranks of the group must pass the same arguments, got {differences}"
            )

    def gather(self, value: Any) -> list[Any]:
        """What each rank passes, as JSON; raises RuntimeError as `compare` does."""
        return [entry["value"] for entry in self._exchange({"value": value})]

    def refuse(self, error: str) -> None:
        """Tells the others that this rank raises, so that they need not wait for it."""
        self._publish({"error": error})

    def describe_absence(self) -> str:
        """What an exchange that failed may be due to: ranks that compare without this one."""
        keys = self._keys(self._number)
        try:
            ahead = [rank for rank, key in enumerate(keys) if self._store.check([key])]
        except RuntimeError:
            return "the group's store can't be reached either"
        if not ahead:
            return "a rank is dead, or did not make the same call"
        return f"{_ranks(ahead)} made another call, and waited to compare its arguments"

    def _exchange(self, entry: Mapping[str, object]) -> list[dict[str, Any]]:
        keys = self._publish(entry)
        self._wait(keys)
        return [json.loads(self._store.get(key)) for key in keys]

    def _publish(self, entry: Mapping[str, object]) -> list[str]:
        keys = self._keys(self._number)
        self._number += 1
        self._store.set(keys[self._rank], json.dumps(entry))
        return keys

    def _keys(self, number: int) -> list[str]:
        return [f"dilated/{number}/{rank}" for rank in range(self._size)]

    def _wait(self, keys: list[str]) -> None:
        begin = time.monotonic()
        try:
            self._store.wait(keys, self._timeout)
        except RuntimeError as error:
            try:
                absent = [rank for rank, key in enumerate(keys) if not self._store.check([key])]
            except RuntimeError:
                absent = []
            if not absent:
                raise RuntimeError(f"the group's store can't be reached: {error}") from error
            raise RuntimeError(
                f"{_ranks(absent)} did not come within {time.monotonic() - begin:.1f} s to compare "
                "arguments: dead, slower, or called with arguments that were compared before"
            ) from error


def describe_differences(entries: Sequence[Fields]) -> str:
    """The fields in which ranks differ, with each value and the ranks that have it; "" if none."""
    texts = []
    for name in dict.fromkeys(name for entry in entries for name in entry):
        holders: dict[str, list[int]] = {}
        for rank, entry in enumerate(entries):
            holders.setdefault(entry.get(name, "nothing"), []).append(rank)
        if len(holders) > 1:
            values = ", ".join(f"{value} on {_ranks(r)}" for value, r in holders.items())
            texts.append(f"{name}: {values}")
    return "; ".join(texts)


def _ranks(ranks: Sequence[int]) -> str:
    return f"rank{'s' if len(ranks) > 1 else ''} {', '.join(map(str, ranks))}"
