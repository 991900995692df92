"""How tensors on GPUs travel over a group: all ranks choose at its first call with some."""

from __future__ import annotations

import os
import socket
import warnings
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from .copy_engine import CopyEngine, choose_transport
from .process_group import timeout_of
from .state import GroupState


def connect(
    group: dist.ProcessGroup, state: GroupState, device: torch.device, largest: Callable[[], int]
) -> None:
    """Chooses the transport, at a group's first call with GPUs; all ranks take part."""
    if state.transport is None:
        backend = group._get_backend(device).name()
        if backend != "gloo":  # NCCL connects ranks in the first call, which all must make
            dist.all_reduce(torch.zeros(1, device=device), group=group)
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
            start_engine(group, state, device, capacity)


def start_engine(
    group: dist.ProcessGroup, state: GroupState, device: torch.device, capacity: int
) -> None:
    """Makes the buffers and lets all ranks map them; if that fails, NCCL is used."""
    torch.cuda.synchronize(device)
    state.gather(None)  # nobody reads the old buffer any more
    state.engine = state.memory = None
    # A rank whose memory is short must not leave the others waiting for it in the rendezvous.
    memory, failures = _in_step(state, lambda: _symmetric_buffer(state.size * capacity, device))
    if not failures:
        handle, failures = _in_step(state, lambda: _map_buffer(memory, group))
    if failures:
        warnings.warn(f"no symmetric memory, so NCCL is used: {failures}", stacklevel=2)
        state.transport = "direct"
        return
    stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
    timeout = int(timeout_of(group).total_seconds() * 1e3)
    state.engine = CopyEngine(handle, state.rank, capacity, stream, timeout)
    state.memory = memory


def _in_step(state: GroupState, step: Callable[[], Any]) -> tuple[Any, list[str]]:
    """The step's result here, and why it failed, rank by rank, once all have tried."""
    result, failure = None, None
    try:
        result = step()
    except Exception as error:  # a driver or a virtual machine may not offer it
        failure = str(error)
    return result, [text for text in state.gather(failure) if text is not None]


def _symmetric_buffer(nbytes: int, device: torch.device) -> Tensor:
    """Bytes that can be mapped by the GPUs of other processes."""
    from torch.distributed import _symmetric_memory

    return _symmetric_memory.empty(nbytes, dtype=torch.uint8, device=device)


def _map_buffer(memory: Tensor, group: dist.ProcessGroup) -> Any:
    """The handle to all ranks' buffers, mapped here without multicast; the ranks meet in it."""
    from torch.distributed import _symmetric_memory

    return _symmetric_memory.rendezvous(memory, group.group_name)
