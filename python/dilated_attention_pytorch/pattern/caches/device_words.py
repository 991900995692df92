"""A pattern's words on one device, safe to read from any stream of it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from ..._load import vouch
from .transfers import DEFAULT_STREAM, Event, Transfers


class Allocation:
    """Device memory that holds the words of one pattern or, after a batched copy, of several."""

    __slots__ = ("nbytes", "users")

    def __init__(self, nbytes: int) -> None:
        self.nbytes = nbytes
        self.users: set[Copy] = set()

    def admit(self, user: Copy) -> int:
        """Counts a copy that a cache keeps. Returns by how many bytes memory in use grows."""
        nbytes = 0 if self.users else self.nbytes
        self.users.add(user)
        return nbytes

    def release(self, user: Copy) -> int:
        """Forgets a copy that a cache drops. Returns by how many bytes memory in use shrinks."""
        if user not in self.users:
            return 0
        self.users.remove(user)
        return 0 if self.users else self.nbytes


def held_bytes(copies: Iterable[Copy]) -> int:
    """Bytes of the memory that holds the copies which are kept, each allocation once."""
    allocations = {copy.allocation for copy in copies if copy in copy.allocation.users}
    return sum(allocation.nbytes for allocation in allocations)


class Words:
    """int32 words that are lent, and whether a borrower wrote into them (by torch's count)."""

    def __init__(self, words: Tensor, allocation: Allocation) -> None:
        self.words = words
        self.version = words._version
        self.allocation = allocation

    @property
    def is_intact(self) -> bool:
        return self.words._version == self.version


class DeviceWords(Words):
    """`read()` orders the reader after the copy.

    The copy is ordered by the stream that made it, and by an event on all others. The memory is
    released only after the last stream that read it has finished. Not locked: the cache's lock
    covers it.
    """

    def __init__(
        self,
        words: Tensor,
        copied: Event,
        allocation: Allocation,
        device: int,
        transfers: Transfers,
    ) -> None:
        super().__init__(words, allocation)
        self._copied = copied
        self._index = device
        self._transfers = transfers
        # Streams whose work follows the copy, and after which the memory is released.
        self._readers = {transfers.stream(device)}

    def read(self) -> tuple[Tensor, bool]:
        """The words for work on the current stream, and whether a CUDA graph captures that work.

        A graph keeps the address, not the tensor: whoever holds this object must then keep it.
        """
        stream = self._transfers.stream(self._index)
        # The default stream can't be captured, and needs no call to find that out.
        capturing = stream != DEFAULT_STREAM and self._transfers.capturing(self._index)
        if stream not in self._readers:
            self._admit(stream, capturing)
        return self.words, capturing

    def _admit(self, stream: int, capturing: bool) -> None:
        self._transfers.record(self.words, self._index)
        if not capturing:  # a capture begins by waiting for the device, so the copy is done
            self._transfers.wait(self._copied, self._index)
            # Until then a stream made later, under the handle of one that is gone, would not wait.
            if self._copied.query():
                self._readers.add(stream)


class PlainWords(Words):
    """The same for a device whose copies the host waits for: the host itself, among others."""

    def __init__(self, words: Tensor) -> None:
        super().__init__(words, Allocation(0 if words.is_cpu else words.nbytes))

    def read(self) -> tuple[Tensor, bool]:
        return self.words, False


Copy = DeviceWords | PlainWords


def send(
    sources: Sequence[Tensor], device: torch.device, transfers: Transfers, blocking: bool
) -> list[Copy]:
    """A copy of each source, all made at once. Operators take CUDA's without reading them.

    Raises:
        ValueError: a source is not as it was planned.
    """
    # An inference tensor could not be saved for a later call's backward.
    with torch.inference_mode(False):
        if device.type != "cuda":
            return [PlainWords(source.to(device)) for source in sources]
        memory, words, copied = transfers.copy(sources, device.index, blocking)
        for copy, source in zip(words, sources, strict=True):
            vouch(copy, source)
    allocation = Allocation(memory.nbytes)
    return [DeviceWords(x, copied, allocation, device.index, transfers) for x in words]
