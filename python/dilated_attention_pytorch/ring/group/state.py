"""What a rank remembers of a process group: counters, agreed calls, transport, failure."""

from __future__ import annotations

import threading
from collections.abc import Hashable
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from .agreement import Agreement
from .copy_engine import CopyEngine, Transport
from .deferred import Deferred, Outcome


@dataclass(slots=True)
class Traffic:
    """What a rank has sent and received over a group so far."""

    exchanges: int = 0
    messages_sent: int = 0
    messages_received: int = 0
    bytes_sent: int = 0
    bytes_received: int = 0


class _Failing:
    """A class, since every call enters some and a generator takes three times as long."""

    __slots__ = ("_state", "_what")

    def __init__(self, state: GroupState, what: str) -> None:
        self._state, self._what = state, what

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if isinstance(error, RuntimeError):
            self._state.failure = f"{self._what}{error}"
            raise RuntimeError(self._state.failure) from error


@dataclass(slots=True)
class GroupState:
    """What is remembered of a process group.

    deferred: where ranks compare calls; None if they must have done so before they post messages.
    outcomes: of comparisons there that nobody waited for. failure: why the group is unusable.
    """

    agreement: Agreement
    rank: int
    size: int
    deferred: Deferred | None
    outcomes: list[Outcome[None]] = field(default_factory=list)
    failure: str | None = None
    calls: int = 0
    lock: threading.Lock = field(default_factory=threading.Lock)
    agreed: dict[Hashable, Any] = field(default_factory=dict)
    agreed_weight: int = 0
    traffic: Traffic = field(default_factory=Traffic)
    transport: Transport | None = None  # of GPUs' tensors; None before the first
    engine: CopyEngine | None = None
    memory: Tensor | None = None  # the engine's buffer

    def failing(self, what: str = "") -> _Failing:
        """A context: a RuntimeError in it makes the group unusable."""
        return _Failing(self, what)

    def settle(self) -> None:
        """Waits until the other ranks have come to all calls that this one has made.

        Raises RuntimeError if an earlier call failed, or differed between ranks.
        """
        if self.failure is not None:
            raise RuntimeError(f"an earlier call over the group failed: {self.failure}")
        while self.outcomes:
            with self.failing():
                self.outcomes.pop(0).result()

    def gather(self, value: Any) -> list[Any]:
        """What each rank passes, as JSON."""
        gather = self.agreement.gather
        return (
            gather(value) if self.deferred is None else self.deferred.submit(gather, value).result()
        )
