"""How the ranks see, at little cost, whether all of them are about to make the same call.

Each casts a digest of its call. Over gloo the digests are messages of their own, before those of
the call. Otherwise they are added up in a counter of the group's store, which takes two requests
of a rank, however many there are. Knows no torch.distributed, but for methods of a group.
"""

from __future__ import annotations

import time
from typing import Protocol

import torch
from torch import Tensor

from .store import Absent, Patience, Store, describe_absence, reaching_the_store

REFUSED = bytes(16)  # what a rank casts that will not make its call; no call has this digest
_TAG = 0x64696C61  # of the messages; no other message has it
_RANK = 1 << 48  # counts ranks; the bits below add up what they cast
_SILENT_SECONDS = 0.1  # after which a rank that waits says so


class Ballot(Protocol):
    """Rounds are numbered, and come in this order on all ranks."""

    def cast(self, number: int, digest: bytes) -> None:
        """Tells the others, without waiting for them."""

    def is_unanimous(self, number: int, digest: bytes) -> bool:
        """Whether all ranks have cast the same as this one, once they have come.

        Raises RuntimeError if one does not come within the timeout.
        """


class Work(Protocol):
    def wait(self) -> object: ...


class Mailer(Protocol):
    """What is used of a process group whose messages lie in the host's memory."""

    def send(self, tensors: list[Tensor], dst: int, tag: int) -> Work: ...
    def recv(self, tensors: list[Tensor], src: int, tag: int) -> Work: ...


class MessageBallot:
    """Digests as messages between all pairs of ranks."""

    def __init__(self, group: Mailer, rank: int, size: int) -> None:
        self._group, self._size = group, size
        self._peers = [peer for peer in range(size) if peer != rank]
        # Digests of a round, and for each peer what brings them; more rounds than one if the
        # former were refused here, and nobody waited.
        self._rounds: list[tuple[Tensor, list[tuple[Work, Work]]]] = []

    def cast(self, number: int, digest: bytes) -> None:
        digests = torch.frombuffer(bytearray(digest), dtype=torch.uint8).repeat(self._size + 1, 1)
        mine, *theirs = digests.unbind()
        works = [
            (self._group.send([mine], peer, _TAG), self._group.recv([theirs[peer]], peer, _TAG))
            for peer in self._peers
        ]
        self._rounds.append((digests, works))

    def is_unanimous(self, number: int, digest: bytes) -> bool:
        begin = time.monotonic()
        while self._rounds:
            digests, works = self._rounds.pop(0)
            for peer, (send, receive) in zip(self._peers, works, strict=True):
                try:
                    receive.wait()
                    send.wait()
                except RuntimeError as error:
                    absence = describe_absence([peer], time.monotonic() - begin)
                    raise Absent(f"{absence}: {error}") from error
        return bool((digests == digests[0]).all())


class CounterBallot:
    """Digests added up: all are equal if the sum is size times one's own.

    The first 32 bits of each: one disagreement in 2^32 may have that sum, too.
    """

    def __init__(self, store: Store, rank: int, size: int, patience: Patience) -> None:
        self._store, self._rank, self._size, self._patience = store, rank, size, patience
        self._counters: list[str] = []

    @reaching_the_store()
    def cast(self, number: int, digest: bytes) -> None:
        self._counters.append(f"dilated/{number}")
        self._store.add(self._counters[-1], _RANK + _short(digest))

    @reaching_the_store()
    def is_unanimous(self, number: int, digest: bytes) -> bool:
        counter = self._counters[-1]
        waiting = [f"{counter}/waits/{rank}" for rank in range(self._size)]
        has_said = False
        for waited in self._patience.polls():
            total = self._store.add(counter, 0)
            if total // _RANK == self._size:
                break
            if waited > _SILENT_SECONDS and not has_said:
                self._store.set(waiting[self._rank], "")
                has_said = True
        else:
            raise self._patience.absent(
                [rank for rank, key in enumerate(waiting) if not self._store.check([key])]
            )
        if has_said:
            self._store.delete_key(waiting[self._rank])
        while len(self._counters) > 1:  # all have come to this round, so they are done with those
            former = self._counters.pop(0)
            if self._rank == 0:
                self._store.delete_key(former)
        return total % _RANK == self._size * _short(digest)


def _short(digest: bytes) -> int:
    return int.from_bytes(digest[:4], "big")
