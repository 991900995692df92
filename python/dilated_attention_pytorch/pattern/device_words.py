"""A pattern's words on one device, safe to read from any stream of it."""

from __future__ import annotations

import torch
from torch import Tensor

from .transfers import DEFAULT_STREAM, Transfers


class DeviceWords:
    """Copies at construction, once; `read()` orders the reader after the copy.

    The host does not wait for the copy: it is ordered by the stream that made it, and by an event
    on all others. The memory is released only after the last stream that read it has finished. Not
    locked: the cache's lock covers it.

    Raises:
        RuntimeError: a CUDA graph is being captured.
    """

    def __init__(self, words: Tensor, device: torch.device, transfers: Transfers) -> None:
        self._transfers = transfers
        self._index = device.index
        if transfers.capturing(self._index):
            raise RuntimeError(
                "this pattern is not on the GPU yet and can't be copied there while a CUDA "
                "graph is captured: call once with the same shapes before the capture"
            )
        # An inference tensor could not be saved for a later call's backward.
        with torch.inference_mode(False):
            self._words, self._copied = transfers.copy(words, self._index)
        # Streams whose work follows the copy, and after which the memory is released.
        self._readers = {transfers.stream(self._index)}

    @property
    def nbytes(self) -> int:
        return self._words.nbytes

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

    def __init__(self, words: Tensor, device: torch.device) -> None:
        with torch.inference_mode(False):
            self._words = words.to(device)
        self.nbytes = 0 if device.type == "cpu" else self._words.nbytes

    def read(self) -> tuple[Tensor, bool]:
        return self._words, False
