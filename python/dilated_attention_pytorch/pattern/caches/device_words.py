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
        """Adds a copy that a cache keeps; returns the bytes that this adds to the memory in use."""
        nbytes = 0 if self.users else self.nbytes
        self.users.add(user)
        return nbytes

    def release(self, user: Copy) -> int:
        """Drops a copy; returns the bytes that this frees."""
        if user not in self.users:
            return 0
        self.users.remove(user)
        return 0 if self.users else self.nbytes


def held_bytes(copies: Iterable[Copy]) -> int:
    """Bytes of memory behind the copies that caches keep, each allocation counted once."""
    allocations = {copy.allocation for copy in copies if copy in copy.allocation.users}
    return sum(allocation.nbytes for allocation in allocations)


class Words:
    """int32 words that are lent. is_intact: no borrower wrote into them, by torch's count."""

    def __init__(self, words: Tensor, allocation: Allocation) -> None:
        self.words = words
        self.version = words._version
        self.allocation = allocation

    @property
    def is_intact(self) -> bool:
        return self.words._version == self.version


class DeviceWords(Words):
    """Words on a GPU. `read()` orders the reader after the copy.

    On the stream that made the copy this needs nothing, on others an event. The memory is reused
    only after the last stream that read it has finished. Not locked: the cache's lock covers it.
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
        # Streams that are ordered after the copy, and that the memory's reuse waits for.
        self._readers = {transfers.stream(device)}

    def read(self) -> tuple[Tensor, bool]:
        """The words for work on the current stream, and whether a CUDA graph captures that work.

        A graph keeps the address, not the tensor: the caller must then keep this object.
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
            # Before that, a later stream may get the handle of this one, and has to wait as well.
            if self._copied.query():
                self._readers.add(stream)


class PlainWords(Words):
    """Words on a device whose copies the host waits for, such as the host itself."""

    def __init__(self, words: Tensor) -> None:
        super().__init__(words, Allocation(0 if words.is_cpu else words.nbytes))

    def read(self) -> tuple[Tensor, bool]:
        return self.words, False


Copy = DeviceWords | PlainWords


def send(
    sources: Sequence[Tensor], device: torch.device, transfers: Transfers, blocking: bool
) -> list[Copy]:
    """Copies all sources at once. Those on CUDA are vouched for: operators needn't read them.

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
