"""Messages between GPUs of one host by their copy engines, which leave the multiprocessors free.

Each rank has a buffer that the others can read, with a region for every peer. A sender copies a
message into the receiver's region and signals; the receiver copies it out over NVLink and signals
back that the region is free. All of it is queued on a stream of its own; the host never waits.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Sequence
from itertools import zip_longest
from typing import Literal, Protocol

import torch
from torch import Tensor

Transport = Literal["direct", "staged", "copy engine"]
Message = tuple[int, Tensor]  # peer, data

_READY, _FREE = 0, 1  # channels: sender to receiver, and back


def choose_transport(
    backend: str,
    device_type: str,
    *,
    is_wanted: Sequence[bool],
    hosts: Sequence[str],
    reaches_peers: Sequence[bool],
) -> Transport:
    """How messages go; the last three have one entry for each rank, and are the same on all.

    "direct": the backend reads and writes the tensors. "staged": through the host's memory, as gloo
    does not see a GPU's. "copy engine": only where every rank wants it, is on the same host and
    has a GPU that reads all others' memory.
    """
    if device_type != "cuda":
        return "direct"
    if backend == "gloo":
        return "staged"
    several = len(hosts) > 1 and len(set(hosts)) == 1
    return "copy engine" if several and all(is_wanted) and all(reaches_peers) else "direct"


class Handle(Protocol):
    """What is used of a symmetric memory's handle. Signals are on the current stream."""

    def get_buffer(
        self, rank: int, sizes: Sequence[int], dtype: torch.dtype, storage_offset: int
    ) -> Tensor: ...
    def put_signal(self, dst_rank: int, channel: int, timeout_ms: int) -> None: ...
    def wait_signal(self, src_rank: int, channel: int, timeout_ms: int) -> None: ...


class Copies:
    """An exchange under way."""

    def __init__(self, stream: torch.cuda.Stream | None) -> None:
        self._done = None if stream is None else stream.record_event()

    def wait(self) -> None:
        """Makes the current stream wait for it."""
        if self._done is not None:
            torch.cuda.current_stream().wait_event(self._done)


class CopyEngine:
    """One rank's side. Ranks exchange in an order that is the same for each pair.

    Args:
        handle: of a buffer of size * capacity bytes on every rank.
        capacity: bytes of the largest message; larger ones must go another way.
        stream: of this rank's GPU; None copies at once, on the host.
        timeout_ms: after which a signal that does not come is an error.
    """

    def __init__(
        self,
        handle: Handle,
        rank: int,
        capacity: int,
        stream: torch.cuda.Stream | None,
        timeout_ms: int,
    ) -> None:
        self.capacity = capacity
        self._handle, self._rank = handle, rank
        self._stream, self._timeout_ms = stream, timeout_ms
        self._filled: set[int] = set()  # peers whose region held a message before

    def takes(self, data: Tensor) -> bool:
        """Whether a message fits."""
        return data.nbytes <= self.capacity

    def exchange(self, sends: Sequence[Message], receives: Sequence[Message]) -> Copies:
        """Posts all messages; those of a pair arrive in the order in which they are posted."""
        stream = self._stream
        if stream is not None:
            stream.wait_stream(torch.cuda.current_stream())
            for _, data in (*sends, *receives):
                data.record_stream(stream)
        with contextlib.nullcontext() if stream is None else torch.cuda.stream(stream):
            # A second message to a peer waits until the first has left its region, so the peer
            # must not have to send a second one before it receives the first.
            for some, others in zip_longest(_rounds(sends), _rounds(receives), fillvalue=()):
                for peer, data in some:
                    self._send(peer, data)
                for peer, data in others:
                    self._receive(peer, data)
        return Copies(stream)

    def _send(self, peer: int, data: Tensor) -> None:
        if peer in self._filled:
            self._handle.wait_signal(peer, _FREE, self._timeout_ms)
        self._filled.add(peer)
        self._region(self._rank, peer, data).copy_(data)
        self._handle.put_signal(peer, _READY, self._timeout_ms)

    def _receive(self, peer: int, data: Tensor) -> None:
        self._handle.wait_signal(peer, _READY, self._timeout_ms)
        data.copy_(self._region(peer, self._rank, data))
        self._handle.put_signal(peer, _FREE, self._timeout_ms)

    def _region(self, sender: int, receiver: int, data: Tensor) -> Tensor:
        """Where a message like `data` lies in the sender's buffer."""
        offset = receiver * self.capacity // data.itemsize
        return self._handle.get_buffer(sender, data.shape, data.dtype, offset)


def _rounds(messages: Sequence[Message]) -> list[list[Message]]:
    """The first message of every peer, the second of every peer that has one, and so on."""
    rounds: list[list[Message]] = []
    counts: Counter[int] = Counter()
    for peer, data in messages:
        if counts[peer] == len(rounds):
            rounds.append([])
        rounds[counts[peer]].append((peer, data))
        counts[peer] += 1
    return rounds
