"""The key-value store that the ranks of a group share: its interface, and waiting for ranks."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Protocol


class Store(Protocol):
    """What is used of torch.distributed.Store."""

    def set(self, key: str, value: str) -> None: ...
    def get(self, key: str) -> bytes: ...
    def check(self, keys: list[str]) -> bool: ...
    def add(self, key: str, amount: int) -> int: ...
    def delete_key(self, key: str) -> bool: ...


class Absent(RuntimeError):
    """Ranks did not come within the timeout."""


@dataclass(frozen=True, slots=True)
class Patience:
    """How long to wait for other ranks.

    pause: waits the given seconds. probe: takes the seconds waited so far, raises Absent if it
    finds a rank dead; called after a tenth of a second, then at least every 5 s.
    """

    timeout: timedelta
    pause: Callable[[float], object] = time.sleep
    probe: Callable[[float], object] = float

    def polls(self) -> Iterator[float]:
        """Yields the seconds waited so far whenever to ask the store; ends at the timeout."""
        begin, waited, next_probe = time.monotonic(), 0.0, 0.1
        while waited <= self.timeout.total_seconds():
            yield waited
            if waited > next_probe:
                self.probe(waited)
                next_probe = waited + min(waited, 5.0)
            self.pause(min(0.01, waited / 8))
            waited = time.monotonic() - begin

    def absent(self, ranks: Sequence[int]) -> Absent:
        return Absent(describe_absence(ranks, self.timeout.total_seconds()))


def describe_absence(ranks: Sequence[int], seconds: float) -> str:
    return (
        f"{name_ranks(ranks)} did not come within {seconds:.1f} s to compare arguments: dead, "
        "slower, or without this call"
    )


def name_ranks(ranks: Sequence[int]) -> str:
    return f"rank{'s' if len(ranks) != 1 else ''} {', '.join(map(str, ranks))}"


@contextlib.contextmanager
def reaching_the_store() -> Iterator[None]:
    """Makes errors of the store itself say that they are."""
    try:
        yield
    except Absent:
        raise
    except RuntimeError as error:
        raise RuntimeError(f"the group's store can't be reached: {error}") from error
