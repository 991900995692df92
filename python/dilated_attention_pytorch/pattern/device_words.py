"""A pattern's words on one device, safe to read from any stream of it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .transfers import DEFAULT_STREAM, Event, Transfers


class Block:
    """Device memory that holds the words of one pattern or, after a batched copy, of several."""

    __slots__ = ("nbytes", "users")

    def __init__(self, nbytes: int, users: int) -> None:
        self.nbytes = nbytes
        self.users = users

    def release(self) -> int:
        """One user less. The bytes that no cache holds any more: all of them after the last."""
        self.users -= 1
        return 0 if self.users else self.nbytes


class DeviceWords:
    """`read()` orders the reader after the copy.

    The copy is ordered by the stream that made it, and by an event on all others. The memory is
    released only after the last stream that read it has finished. Not locked: the cache's lock
    covers it.
    """

    def __init__(
        self, words: Tensor, copied: Event, block: Block, device: int, transfers: Transfers
    ) -> None:
        self._words = words
        self._copied = copied
        self.block = block
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
        return self._words, capturing

    def _admit(self, stream: int, capturing: bool) -> None:
        self._transfers.record(self._words, self._index)
        if not capturing:  # a capture begins by waiting for the device, so the copy is done
            self._transfers.wait(self._copied, self._index)
            # Until then a stream made later, under the handle of one that is gone, would not wait.
            if self._copied.query():
                self._readers.add(stream)


class PlainWords:
    """The same for a device whose copies the host waits for: the host itself, among others."""

    def __init__(self, words: Tensor) -> None:
        self._words = words
        self.block = Block(0 if words.is_cpu else words.nbytes, 1)

    def read(self) -> tuple[Tensor, bool]:
        return self._words, False


Copy = DeviceWords | PlainWords


def send(
    sources: Sequence[Tensor], device: torch.device, transfers: Transfers, blocking: bool
) -> tuple[list[Copy], int]:
    """A copy of each source, all made at once, and the bytes that they hold together."""
    # An inference tensor could not be saved for a later call's backward.
    with torch.inference_mode(False):
        if device.type != "cuda":
            copies: list[Copy] = [PlainWords(source.to(device)) for source in sources]
            return copies, sum(copy.block.nbytes for copy in copies)
        memory, words, copied = transfers.copy(sources, device.index, blocking)
    block = Block(memory.nbytes, len(words))
    return [DeviceWords(x, copied, block, device.index, transfers) for x in words], block.nbytes
