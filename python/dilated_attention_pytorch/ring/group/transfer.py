"""Messages between the ranks of a process group, posted and awaited.

A message is a flat tensor for one peer; both sides know its size from the plan. On NCCL all
messages of an exchange are one group call on NCCL's own stream, after the work that the current
stream held when it was posted. `Transfer.wait` makes the current stream wait for it, never the
host. gloo sends from the host's memory, through which tensors on a GPU pass. On one host, copy
engines take NCCL's place if DILATED_RING_COPY_ENGINE=1 is set for every rank.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from .copy_engine import Copies, Message
from .state import GroupState, Traffic

_CALL_TAG = 1 << 24  # on gloo, messages have tags from here on, by the number of their call
_POSTED = "an exchange failed: a rank is dead, or failed within the same call: "


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
        """Work launched on the current stream from now on sees what was received.

        Raises RuntimeError if a peer is dead or does not send within the group's timeout.
        """
        if self._state is not None:
            with self._state.failing(_POSTED):
                for work in self._works:
                    work.wait()
        for device, host in self._landings:
            device.copy_(host, non_blocking=True)
        self._works, self._landings, self._kept = (), (), ()


def post(
    group: dist.ProcessGroup,
    state: GroupState,
    sends: Sequence[Message],
    receives: Sequence[Message],
) -> Transfer:
    """As `Communicator.exchange`."""
    _count(state.traffic, sends, receives)
    if not sends and not receives:
        return Transfer()
    device = (sends or receives)[0][1].device
    landings: list[tuple[Tensor, Tensor]] = []
    works: list[dist.Work | Copies] = []
    if device.type == "cuda" and state.transport == "staged":
        sends = [(peer, data.cpu()) for peer, data in sends]
        landings = [(data, torch.empty_like(data, device="cpu")) for _, data in receives]
        receives = [(peer, host) for (peer, _), (_, host) in zip(receives, landings, strict=True)]
    kept = [*sends, *receives]
    engine = state.engine
    if engine is not None and device.type == "cuda":
        small = [[m for m in some if engine.takes(m[1])] for some in (sends, receives)]
        sends, receives = ([m for m in s if not engine.takes(m[1])] for s in (sends, receives))
        with state.failing(_POSTED):
            works.append(engine.exchange(*small))
    operations = [
        *(_operation(group, state, dist.isend, peer, data) for peer, data in sends),
        *(_operation(group, state, dist.irecv, peer, data) for peer, data in receives),
    ]
    if operations:
        with state.failing(_POSTED):
            works += dist.batch_isend_irecv(operations)
    return Transfer(works, landings, kept, state)


def _operation(
    group: dist.ProcessGroup,
    state: GroupState,
    kind: Callable[..., object],
    peer: int,
    data: Tensor,
) -> dist.P2POp:
    # The tag keeps a call from receiving what a failed one left behind.
    tag = _CALL_TAG + state.calls % _CALL_TAG
    return dist.P2POp(kind, data, group=group, tag=tag, group_peer=peer)


def _count(traffic: Traffic, sends: Sequence[Message], receives: Sequence[Message]) -> None:
    traffic.exchanges += bool(sends or receives)
    traffic.messages_sent += len(sends)
    traffic.messages_received += len(receives)
    traffic.bytes_sent += sum(data.nbytes for _, data in sends)
    traffic.bytes_received += sum(data.nbytes for _, data in receives)
