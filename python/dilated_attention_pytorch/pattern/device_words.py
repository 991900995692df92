"""A pattern's words on one device, safe to read from any stream of it."""

from __future__ import annotations

import torch
from torch import Tensor


class DeviceWords:
    """Copies at construction, once; `read()` orders the reader after the copy.

    On CUDA the copy goes through pinned memory and the host does not wait for it: it is ordered
    by the stream that made it, and by an event on all others. The memory is released only after
    the last stream that read it has finished (Tensor.record_stream). Not locked: the cache's lock
    covers it.
    """

    def __init__(self, words: Tensor, device: torch.device) -> None:
        self._is_cuda = device.type == "cuda"
        # An inference tensor could not be saved for a later call's backward.
        with torch.inference_mode(False):
            if self._is_cuda:
                self._copy_to_cuda(words, device)
            else:
                self._words = words.to(device)

    def _copy_to_cuda(self, words: Tensor, device: torch.device) -> None:
        with torch.cuda.device(device):
            if torch.cuda.is_current_stream_capturing():
                raise RuntimeError(
                    "this pattern is not on the GPU yet and can't be copied there while a CUDA "
                    "graph is captured: call once with the same shapes before the capture"
                )
            self._stream = torch.cuda.current_stream()
            self._words = words.pin_memory().to(device, non_blocking=True)
            self._copied = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self._copied.record(self._stream)

    @property
    def nbytes(self) -> int:
        return self._words.nbytes

    def read(self) -> tuple[Tensor, bool]:
        """The words for work on the current stream, and whether a CUDA graph captures that work.

        A graph keeps the address, not the tensor: whoever holds this object must then keep it.
        """
        if not self._is_cuda:
            return self._words, False
        stream = torch.cuda.current_stream(self._words.device)
        with torch.cuda.device(self._words.device):
            capturing: bool = torch.cuda.is_current_stream_capturing()
        if stream != self._stream:
            if not capturing:  # a capture begins by waiting for the device, so the copy is done
                stream.wait_event(self._copied)
            self._words.record_stream(stream)
        return self._words, capturing
