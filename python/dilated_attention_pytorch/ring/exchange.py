"""Tensors between the ranks of a process group: the only file that knows torch.distributed.

A message is a flat tensor for one peer; both sides know its size from the plan. On NCCL all
messages of an exchange are one group call, on NCCL's own stream: it starts when the current stream
has come to where it was posted, and the current stream waits for it in `Transfer.wait`, the host
never. gloo sends from the host's memory; tensors on a GPU pass through it.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist
from torch import Tensor

if dist.is_available():
    from torch.distributed.device_mesh import DeviceMesh

from .agreement import Agreement, Fields

Message = tuple[int, Tensor]  # peer, data
Group = object  # dist.ProcessGroup, DeviceMesh or a group's name; a torch without them has no types


@dataclass(slots=True)
class Traffic:
    """What a rank has sent and received over a group so far."""

    exchanges: int = 0
    messages_sent: int = 0
    messages_received: int = 0
    bytes_sent: int = 0
    bytes_received: int = 0


class Transfer:
    """An exchange under way. Keeps its tensors until it is done."""

    def __init__(self, works: Sequence[dist.Work], landings: Sequence[tuple[Tensor, Tensor]]):
        self._works, self._landings = works, landings
        self._kept: Sequence[Message] = ()

    def keep(self, messages: Sequence[Message]) -> Transfer:
        self._kept = messages
        return self

    def wait(self) -> None:
        """Work that is launched on the current stream from now on sees what was received.

        Raises RuntimeError if a peer is dead or does not send within the group's timeout.
        """
        for work in self._works:
            work.wait()
        for device, host in self._landings:
            device.copy_(host, non_blocking=True)
        self._works, self._landings, self._kept = (), (), ()


@dataclass(slots=True)
class _State:
    """What is remembered of a process group."""

    agreement: Agreement
    lock: threading.Lock = field(default_factory=threading.Lock)
    agreed: set[Hashable] = field(default_factory=set)
    traffic: Traffic = field(default_factory=Traffic)
    is_connected: bool = False


# Not typed, as names that begin with _ are not exported; 2.11 to 2.15 have them.
_c10d: Any = getattr(dist, "distributed_c10d", None)
_states: WeakKeyDictionary[Any, _State] = WeakKeyDictionary()
_states_lock = threading.Lock()
_MAX_AGREED = 4096


class Peers:
    """The ranks of a group, seen from one of them. Cheap to make; state is kept with the group."""

    def __init__(self, group_name: str) -> None:
        self._group = resolve(group_name)
        with _states_lock:
            state = _states.get(self._group)
            if state is None:
                state = _states[self._group] = _State(_make_agreement(self._group))
        self._state = state
        self.rank: int = self._group.rank()
        self.size: int = self._group.size()

    @property
    def traffic(self) -> Traffic:
        return self._state.traffic

    def has_agreed(self, call: Hashable) -> bool:
        """Whether `agree` was passed with this call."""
        return call in self._state.agreed

    def agree(self, call: Hashable, fields: Fields, device: torch.device) -> None:
        """Compares the call with those of the other ranks, as `Agreement.compare` does."""
        with self._state.lock:
            self._state.agreement.compare(fields)
            self._connect(device)
            if len(self._state.agreed) >= _MAX_AGREED:
                self._state.agreed.clear()
            self._state.agreed.add(call)

    def refuse(self, error: str) -> None:
        """Tells the others that this rank raises instead of calling."""
        with self._state.lock:
            self._state.agreement.refuse(error)

    def exchange(self, sends: Sequence[Message], receives: Sequence[Message]) -> Transfer:
        """Posts all messages at once; empty ones must be left out, on both sides.

        The order of messages between two ranks is that of their calls here.
        """
        self._count(sends, receives)
        if not sends and not receives:
            return Transfer((), ())
        device = (sends or receives)[0][1].device
        landings: list[tuple[Tensor, Tensor]] = []
        if device.type == "cuda" and not self._sends_from(device):
            sends = [(peer, data.cpu()) for peer, data in sends]
            landings = [(data, torch.empty_like(data, device="cpu")) for _, data in receives]
            receives = [
                (peer, host) for (peer, _), (_, host) in zip(receives, landings, strict=True)
            ]
        works = dist.batch_isend_irecv(
            [
                *(self._operation(dist.isend, peer, data) for peer, data in sends),
                *(self._operation(dist.irecv, peer, data) for peer, data in receives),
            ]
        )
        return Transfer(works, landings).keep([*sends, *receives])

    def _operation(self, kind: Callable[..., object], peer: int, data: Tensor) -> dist.P2POp:
        return dist.P2POp(kind, data, group=self._group, group_peer=peer)

    def _count(self, sends: Sequence[Message], receives: Sequence[Message]) -> None:
        traffic = self._state.traffic
        traffic.exchanges += bool(sends or receives)
        traffic.messages_sent += len(sends)
        traffic.messages_received += len(receives)
        traffic.bytes_sent += sum(data.nbytes for _, data in sends)
        traffic.bytes_received += sum(data.nbytes for _, data in receives)

    def _sends_from(self, device: torch.device) -> bool:
        """Whether the group's backend for a GPU sends from its memory: all but gloo."""
        return bool(self._group._get_backend(device).name() != "gloo")

    def _connect(self, device: torch.device) -> None:
        """NCCL connects a group's ranks in the first call, in which all must take part."""
        if not self._state.is_connected and device.type == "cuda" and self._sends_from(device):
            dist.all_reduce(torch.zeros(1, device=device), group=self._group)
            self._state.is_connected = True


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


def _make_agreement(group: dist.ProcessGroup) -> Agreement:
    store = _c10d._get_process_group_store(group)
    return Agreement(store, group.rank(), group.size(), timeout_of(group))


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
