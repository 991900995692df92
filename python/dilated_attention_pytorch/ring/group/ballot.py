"""A cheap way to see whether all ranks are about to make the same call.

Each adds a digest of its call to a counter in the group's store, and reads the sum: two requests,
however many ranks there are, and more only while it waits. Knows no torch.distributed.
"""

from __future__ import annotations

from .store import Patience, Store, reaching_the_store

REFUSED = bytes(16)  # cast by a rank that refuses its call; no call has this digest
_RANK = 1 << 48  # counts ranks; the bits below add up what they cast
_SILENT_SECONDS = 0.1  # after which a rank that waits says so


class Ballot:
    """One rank's side. Rounds are numbered, and come in this order on all ranks.

    Ranks agree if the sum is size times one's own digest. Only the first 32 bits of each are
    added: about one disagreement in 2^32 goes unseen.
    """

    def __init__(self, store: Store, rank: int, size: int, patience: Patience) -> None:
        self._store, self._rank, self._size, self._patience = store, rank, size, patience
        self._counters: list[str] = []
        self._total = 0  # of the last counter, when it was last seen

    @reaching_the_store()
    def cast(self, number: int, digest: bytes) -> None:
        """Tells the others, without waiting for them."""
        self._counters.append(f"dilated/{number}")
        self._total = self._store.add(self._counters[-1], _RANK + _short(digest))

    @reaching_the_store()
    def is_unanimous(self, number: int, digest: bytes) -> bool:
        """Waits until all ranks have cast; whether they cast the same as this one.

        Raises RuntimeError if one does not come within the timeout.
        """
        counter = self._counters[-1]
        waiting = [f"{counter}/waits/{rank}" for rank in range(self._size)]
        has_said = False
        for waited in self._patience.polls():
            if self._total // _RANK == self._size:
                break
            self._total = int(self._store.get(counter))
            if waited > _SILENT_SECONDS and not has_said:
                self._store.set(waiting[self._rank], "")
                has_said = True
        else:
            ranks = range(self._size)
            raise self._patience.absent([rank for rank in ranks if not self._has_come(rank)])
        if has_said:
            self._store.delete_key(waiting[self._rank])
        while len(self._counters) > 1:  # all have come to this round, so they are done with earlier
            former = self._counters.pop(0)
            if self._rank == 0:
                self._store.delete_key(former)
        return self._total % _RANK == self._size * _short(digest)

    def _has_come(self, rank: int) -> bool:
        """Whether the rank says that it waits, or has published, under `Agreement`'s key."""
        counter = self._counters[-1]
        keys = (f"{counter}/waits/{rank}", f"{counter}/{rank}")
        return any(self._store.check([key]) for key in keys)


def _short(digest: bytes) -> int:
    return int.from_bytes(digest[:4], "big")
