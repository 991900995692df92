"""Tensors between the ranks of a process group: the only file that knows torch.distributed.

A message is a flat tensor for one peer; both sides know its size from the plan. On NCCL all
messages of an exchange are one group call, on NCCL's own stream: it starts when the current stream
has come to where it was posted, and the current stream waits for it in `Transfer.wait`, the host
never. gloo sends from the host's memory; tensors on a GPU pass through it. On one host copy engines
can take NCCL's place, where DILATED_RING_COPY_ENGINE=1 is set for every rank.
"""

from __future__ import annotations

import contextlib
import os
import socket
import threading
import warnings
from collections.abc import Callable, Hashable, Sequence
from datetime import timedelta
from functools import partial
from typing import Any
from weakref import WeakKeyDictionary, finalize, proxy

import torch
import torch.distributed as dist
from torch import Tensor

if dist.is_available():
    # A profiler or a compiler imports this at some time. Defaults of its functions hold the group
    # of that time for good, and then gloo's threads, which outlive it, may abort at exit.
    import torch.distributed.nn
    from torch.distributed.device_mesh import DeviceMesh

from .agreement import Agreement, Fields
from .ballot import Ballot
from .copy_engine import Copies, CopyEngine, Message, Transport, choose_transport
from .deferred import Deferred
from .group_state import GroupState, Traffic
from .store import Absent, Patience, Store, describe_absence, reaching_the_store

Group = object  # dist.ProcessGroup, DeviceMesh or a group's name; a torch without them has no types


_POSTED = "an exchange failed, a rank is dead, or failed within the same call: "


class Transfer:
    """An exchange under way. Keeps its tensors until it is done."""

    def __init__(
        self,
        works: Sequence[dist.Work | Copies] = (),
        landings: Sequence[tuple[Tensor, Tensor]] = (),
        kept: Sequence[Message] = (),
        state: GroupState | None = None,
    ) -> None:
        self._works, self._landings, self._kept = works, landings, kept
        self._state = state

    def wait(self) -> None:
        """Work that is launched on the current stream from now on sees what was received.

        Raises RuntimeError if a peer is dead or does not send within the group's timeout.
        """
        if self._state is not None:
            with self._state.failing(_POSTED):
                for work in self._works:
                    work.wait()
        for device, host in self._landings:
            device.copy_(host, non_blocking=True)
        self._works, self._landings, self._kept = (), (), ()


# Not typed, as names that begin with _ are not exported; 2.11 to 2.15 have them.
_c10d: Any = getattr(dist, "distributed_c10d", None)
_states: WeakKeyDictionary[Any, GroupState] = WeakKeyDictionary()
_states_lock = threading.Lock()
_MAX_AGREED = 4096
_PROBE_TAG = (1 << 24) - 1
_CALL_TAG = 1 << 24  # on gloo, messages have tags from here on, by the number of their call


class Peers:
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
        """How GPUs' tensors travel; None before the first call with some."""
        return self._state.transport

    @property
    def calls(self) -> int:
        """How many calls this rank has come to so far, those that it refused among them."""
        return self._state.calls

    def agreed(self, kind: Hashable) -> Any:
        """What `agree` was given to keep with this kind; None if the ranks did not agree on it."""
        return self._state.agreed.get(kind)

    def agree(
        self,
        kind: Hashable,
        kept: object,
        fields: Fields,
        device: torch.device,
        largest: Callable[[], int],
    ) -> None:
        """Compares a call of a new kind with those of the other ranks, as `Agreement.compare` does.

        largest: bytes of the largest message between any two ranks, the same on all.
        """
        with self._state.lock:
            self._compare(fields, is_awaited=True)
            if device.type == "cuda":
                with self._state.failing():
                    self._connect(device, largest)
            if len(self._state.agreed) >= _MAX_AGREED:
                self._state.agreed.clear()
            self._state.agreed[kind] = kept

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
            # The caller raises the error that it is about, whatever happens here.
            with contextlib.suppress(RuntimeError), state.failing():
                refuse(error)

    def exchange(self, sends: Sequence[Message], receives: Sequence[Message]) -> Transfer:
        """Posts all messages at once; empty ones must be left out, on both sides.

        The order of messages between two ranks is that of their calls here.
        """
        self._count(sends, receives)
        if not sends and not receives:
            return Transfer()
        device = (sends or receives)[0][1].device
        landings: list[tuple[Tensor, Tensor]] = []
        works: list[dist.Work | Copies] = []
        if device.type == "cuda" and self._state.transport == "staged":
            sends = [(peer, data.cpu()) for peer, data in sends]
            landings = [(data, torch.empty_like(data, device="cpu")) for _, data in receives]
            receives = [
                (peer, host) for (peer, _), (_, host) in zip(receives, landings, strict=True)
            ]
        kept = [*sends, *receives]
        engine = self._state.engine
        if engine is not None and device.type == "cuda":
            small = [[m for m in some if engine.takes(m[1])] for some in (sends, receives)]
            sends, receives = ([m for m in s if not engine.takes(m[1])] for s in (sends, receives))
            with self._state.failing(_POSTED):
                works.append(engine.exchange(*small))
        operations = [
            *(self._operation(dist.isend, peer, data) for peer, data in sends),
            *(self._operation(dist.irecv, peer, data) for peer, data in receives),
        ]
        if operations:
            with self._state.failing(_POSTED):
                works += dist.batch_isend_irecv(operations)
        return Transfer(works, landings, kept, self._state)

    def _operation(self, kind: Callable[..., object], peer: int, data: Tensor) -> dist.P2POp:
        # What a call that failed has left behind is not received by a later one.
        tag = _CALL_TAG + self._state.calls % _CALL_TAG
        return dist.P2POp(kind, data, group=self._group, tag=tag, group_peer=peer)

    def _count(self, sends: Sequence[Message], receives: Sequence[Message]) -> None:
        traffic = self._state.traffic
        traffic.exchanges += bool(sends or receives)
        traffic.messages_sent += len(sends)
        traffic.messages_received += len(receives)
        traffic.bytes_sent += sum(data.nbytes for _, data in sends)
        traffic.bytes_received += sum(data.nbytes for _, data in receives)

    def _connect(self, device: torch.device, largest: Callable[[], int]) -> None:
        """Chooses the transport, at a group's first call with GPUs; all ranks take part."""
        state = self._state
        if state.transport is None:
            backend = self._group._get_backend(device).name()
            if backend != "gloo":  # NCCL connects ranks in the first call, which all must make
                dist.all_reduce(torch.zeros(1, device=device), group=self._group)
            others = [i for i in range(torch.cuda.device_count()) if i != device.index]
            mine = (
                os.environ.get("DILATED_RING_COPY_ENGINE") == "1",
                socket.gethostname(),
                all(torch.cuda.can_device_access_peer(device, other) for other in others),
            )
            wanted, hosts, reaches = zip(*state.gather(mine), strict=True)
            state.transport = choose_transport(
                backend, device.type, is_wanted=wanted, hosts=hosts, reaches_peers=reaches
            )
        if state.transport == "copy engine":
            capacity = -(-largest() // 512) * 512
            if capacity > (0 if state.engine is None else state.engine.capacity):
                self._start_engine(device, capacity)

    def _start_engine(self, device: torch.device, capacity: int) -> None:
        """Makes the buffers and lets all ranks map them; without them NCCL goes on."""
        state = self._state
        torch.cuda.synchronize(device)
        state.gather(None)  # nobody reads the old buffer any more
        state.engine = state.memory = None
        # A rank whose memory is short must not leave the others waiting for it in the rendezvous.
        memory, failures = self._in_step(lambda: _symmetric_buffer(self.size * capacity, device))
        if not failures:
            handle, failures = self._in_step(lambda: _map_buffer(memory, self._group))
        if failures:
            warnings.warn(f"no symmetric memory, so NCCL is used: {failures}", stacklevel=2)
            state.transport = "direct"
            return
        stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        timeout = int(timeout_of(self._group).total_seconds() * 1e3)
        state.engine = CopyEngine(handle, self.rank, capacity, stream, timeout)
        state.memory = memory

    def _in_step(self, step: Callable[[], Any]) -> tuple[Any, list[str]]:
        """The step's result, and why it failed, on whichever ranks; known once all have tried."""
        result, failure = None, None
        try:
            result = step()
        except Exception as error:  # a driver or a virtual machine may not offer it
            failure = str(error)
        return result, [text for text in self._state.gather(failure) if text is not None]


def _symmetric_buffer(nbytes: int, device: torch.device) -> Tensor:
    """Bytes that can be mapped by the GPUs of other processes."""
    from torch.distributed import _symmetric_memory

    return _symmetric_memory.empty(nbytes, dtype=torch.uint8, device=device)


def _map_buffer(memory: Tensor, group: dist.ProcessGroup) -> Any:
    """The handle to all ranks' buffers, mapped here without multicast; the ranks meet in it."""
    from torch.distributed import _symmetric_memory

    return _symmetric_memory.rendezvous(memory, group.group_name)


def resolve(group_name: str) -> dist.ProcessGroup:
    """The process group that has this name in this process.

    Raises RuntimeError if there is none, or no torch.distributed.
    """
    if not dist.is_available():
        raise RuntimeError("a group needs torch.distributed, which this torch was built without")
    try:
        group: dist.ProcessGroup = _c10d._resolve_process_group(group_name)
        return group
    except RuntimeError as error:
        raise RuntimeError(
            f"group must be a process group of this process, got the name {group_name!r}, which is "
            "none (destroyed, or made in another process)"
        ) from error


def group_name(group: Group) -> str:
    """The name of a ProcessGroup or of a one-dimensional DeviceMesh; a name stays as it is.

    Raises:
        TypeError: neither of them.
        ValueError: a mesh of more dimensions, or a group that this rank is not in.
    """
    if isinstance(group, str):
        return group
    if dist.is_available():
        if isinstance(group, DeviceMesh):
            if group.ndim != 1:
                raise ValueError(
                    "group must be a DeviceMesh of one dimension (take one: mesh['name']), got "
                    f"{group.ndim}"
                )
            return str(group.get_group().group_name)
        if isinstance(group, dist.ProcessGroup):
            return str(group.group_name)
        if group is dist.GroupMember.NON_GROUP_MEMBER:
            raise ValueError("group must be one that this rank is a member of, got another")
    raise TypeError(f"group must be a ProcessGroup, a DeviceMesh or a group's name, got {group!r}")


def _make_state(group: dist.ProcessGroup) -> GroupState:
    """Over gloo, which aborts the process for a message that is too long, ranks compare first."""
    rank, size = group.rank(), group.size()
    store = _store_of(group, rank)
    backends = {group._get_backend(device).name() for device in group._device_types}
    deferred = None
    if size == 1 or backends == {"gloo"}:
        # The state is kept as long as the group, which it must not keep.
        patience = Patience(timeout_of(group), probe=partial(_probe, proxy(group), rank, size))
    else:
        deferred = Deferred()
        finalize(group, deferred.stop)
        patience = Patience(timeout_of(group), deferred.pause)
    ballot = Ballot(store, rank, size, patience)
    return GroupState(Agreement(store, ballot, rank, size, patience), rank, size, deferred)


def _store_of(group: dist.ProcessGroup, rank: int) -> Store:
    """The group's store, without what an earlier group of the same name has left in it.

    torchrun's store outlives the groups, and one that is made again has the name and so the keys of
    the one that was destroyed. Each rank counts the groups of this name that it has called over.
    """
    store = _c10d._get_process_group_store(group)
    with reaching_the_store():
        made = store.add(f"dilated/groups of rank {rank}", 1)
    prefixed: Store = _c10d.PrefixStore(str(made), store)
    return prefixed


def _probe(group: dist.ProcessGroup, rank: int, size: int, waited: float) -> None:
    """Raises Absent if gloo's connection to a rank has closed: it lets nothing be posted there."""
    for peer in range(size):
        try:
            if peer != rank:
                group.send([torch.zeros(1)], peer, _PROBE_TAG)  # nobody receives it
        except RuntimeError as error:
            raise Absent(f"{describe_absence([peer], waited)}: {error}") from error


def timeout_of(group: dist.ProcessGroup) -> timedelta:
    """How long the group's operations may take."""
    for device in group._device_types:
        options = getattr(group._get_backend(device), "options", None)
        timeout = getattr(options, "_timeout", None)
        if isinstance(timeout, timedelta):
            return timeout
    return timedelta(minutes=30)  # torch.distributed's own default


def group_size(name: str) -> int:
    """How many ranks the group has."""
    return int(resolve(name).size())


def traffic(group: Group) -> Traffic:
    """The counters of what this rank has exchanged for rings over the group."""
    return Peers(group_name(group)).traffic
