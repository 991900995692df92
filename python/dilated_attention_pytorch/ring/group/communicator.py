"""The ranks of a group as the strategies see them: they agree on a call, then exchange tensors."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Hashable, Sequence
from functools import partial
from typing import Any
from weakref import WeakKeyDictionary, finalize, proxy

import torch
import torch.distributed as dist

from .agreement import Agreement, Fields
from .ballot import Ballot
from .copy_engine import Message, Transport
from .deferred import Deferred
from .process_group import Group, group_name, resolve, store_of, timeout_of
from .state import GroupState, Traffic
from .store import Absent, Patience, describe_absence
from .transfer import Transfer, post
from .transport import connect

_states: WeakKeyDictionary[Any, GroupState] = WeakKeyDictionary()
_states_lock = threading.Lock()
_PROBE_TAG = (1 << 24) - 1  # below those of messages
# No other exception is a refusal: torch's checkpointing stops a recomputation by one.
_REFUSALS = (TypeError, ValueError, RuntimeError, MemoryError)
_MAX_AGREED = 4096  # by weight


class Communicator:
    """The ranks of a group, seen from one of them. Cheap to make; state is kept with the group."""

    def __init__(self, group_name: str) -> None:
        self._group = resolve(group_name)
        with _states_lock:
            state = _states.get(self._group)
            if state is None:
                state = _states[self._group] = _make_state(self._group)
        self._state = state
        self.rank = state.rank
        self.size = state.size

    @property
    def traffic(self) -> Traffic:
        return self._state.traffic

    @property
    def transport(self) -> Transport | None:
        """How tensors on GPUs travel; None before the first call with some."""
        return self._state.transport

    @property
    def calls(self) -> int:
        """How many calls this rank has come to so far, including those it refused."""
        return self._state.calls

    def agreed(self, kind: Hashable) -> Any:
        """What `agree` keeps for this kind; None if the ranks have not agreed on it."""
        return self._state.agreed.get(kind)

    def agree(
        self,
        kind: Hashable,
        kept: object,
        fields: Fields,
        device: torch.device,
        largest: Callable[[], int],
        weight: int = 1,
    ) -> None:
        """Compares a call of a new kind with those of the other ranks, as `Agreement.compare` does.

        largest: bytes of the largest message between any two ranks, the same on all. weight: how
        much is kept, in units of an ordinary call.
        """
        with self._state.lock:
            self._compare(fields, is_awaited=True)
            if device.type == "cuda":
                with self._state.failing():
                    connect(self._group, self._state, device, largest)
            state = self._state
            if state.agreed_weight + weight > _MAX_AGREED:
                state.agreed.clear()
                state.agreed_weight = 0
            state.agreed[kind] = kept
            state.agreed_weight += weight

    def repeat(self, fields: Fields, device: torch.device) -> None:
        """Compares a call of a kind that was agreed on before.

        On GPUs, but for gloo, the ranks compare while their messages travel, and the next call, of
        whatever kind, raises a RuntimeError if they differ.
        """
        with self._state.lock:
            self._compare(fields, is_awaited=device.type == "cpu")

    def _compare(self, fields: Fields, *, is_awaited: bool) -> None:
        state = self._state
        state.settle()
        state.calls += 1
        compare = state.agreement.compare
        with state.failing():
            if state.deferred is None:
                compare(fields)
                return
            outcome = state.deferred.submit(compare, fields, has_posted=not is_awaited)
            if is_awaited:
                outcome.result()
            else:
                state.outcomes.append(outcome)

    def refusing(self) -> _Refusing:
        """A context: if it raises before this rank has come to its call, the others are told."""
        return _Refusing(self)

    def refuse(self, error: str) -> None:
        """Tells the others that this rank raises instead of calling, without waiting for them."""
        state = self._state
        refuse = state.agreement.refuse
        with state.lock:
            state.calls += 1
            if state.failure is not None:
                return
            if state.deferred is not None:
                state.outcomes.append(state.deferred.submit(refuse, error, may_have_posted=True))
                return
            # The caller raises what `error` describes, whatever happens here.
            with contextlib.suppress(RuntimeError), state.failing():
                refuse(error)

    def exchange(self, sends: Sequence[Message], receives: Sequence[Message]) -> Transfer:
        """Posts all messages at once; empty ones must be left out, on both sides.

        The order of messages between two ranks is that of their calls here.
        """
        return post(self._group, self._state, sends, receives)


class _Refusing:
    """A class, since every call enters one and a generator takes three times as long."""

    __slots__ = ("_calls", "_comm")

    def __init__(self, comm: Communicator) -> None:
        self._comm, self._calls = comm, comm.calls

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if isinstance(error, _REFUSALS) and self._comm.calls == self._calls:
            self._comm.refuse(f"{type(error).__name__}: {error}")


def _make_state(group: dist.ProcessGroup) -> GroupState:
    """Over gloo, which aborts the process on a message that is too long, ranks compare first."""
    rank, size = group.rank(), group.size()
    store = store_of(group, rank)
    backends = {group._get_backend(device).name() for device in group._device_types}
    deferred = None
    if size == 1 or backends == {"gloo"}:
        # A proxy: the state lives as long as the group and must not keep it alive.
        patience = Patience(timeout_of(group), probe=partial(_probe, proxy(group), rank, size))
    else:
        deferred = Deferred()
        finalize(group, deferred.stop)
        patience = Patience(timeout_of(group), deferred.pause)
    ballot = Ballot(store, rank, size, patience)
    return GroupState(Agreement(store, ballot, rank, size, patience), rank, size, deferred)


def _probe(group: dist.ProcessGroup, rank: int, size: int, waited: float) -> None:
    """Raises Absent if gloo's connection to a rank has closed: it lets nothing be posted there."""
    for peer in range(size):
        try:
            if peer != rank:
                group.send([torch.zeros(1)], peer, _PROBE_TAG)  # nobody receives it
        except RuntimeError as error:
            raise Absent(f"{describe_absence([peer], waited)}: {error}") from error


def traffic(group: Group) -> Traffic:
    """The counters of what this rank has exchanged for rings over the group."""
    return Communicator(group_name(group)).traffic
