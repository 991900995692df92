"""What the caches ask of a device that runs behind the host: its streams, events and copies.

The one place that names them. Streams are known by their handles; 0 is the default one.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

DEFAULT_STREAM = 0


class Event(Protocol):
    """A point in a stream's work."""

    def query(self) -> bool:
        """Whether the stream has reached it."""


class Transfers(Protocol):
    """`device` is an index; "current" is the calling thread's current stream on that device."""

    def stream(self, device: int, /) -> int:
        """The current stream's handle."""

    def capturing(self, device: int) -> bool:
        """Whether a graph captures what is enqueued on the current stream."""

    def copy(self, words: Tensor, device: int) -> tuple[Tensor, Event]:
        """Words on the device, and the event after which they hold what the host's hold.

        The copy is enqueued on the current stream, which owns the memory; the host does not wait.
        """

    def wait(self, event: Event, device: int) -> None:
        """The current stream's further work begins after the event."""

    def record(self, words: Tensor, device: int) -> None:
        """Their memory, once released, is not used again before the current stream's work ends."""


def _current_stream(device: int, /) -> int:
    return torch.cuda.current_stream(device).cuda_stream


class CudaTransfers:
    """CUDA's, by PyTorch's allocators: memory that a stream uses is not given out before its end.

    `stream` is in every look-up. What it names where it can is the function that torch.compile's
    generated code calls for the same purpose; the public way makes an object each time.
    """

    stream = staticmethod(getattr(torch._C, "_cuda_getCurrentRawStream", _current_stream))

    def capturing(self, device: int) -> bool:
        if torch.cuda.current_device() == device:
            return torch.cuda.is_current_stream_capturing()
        with torch.cuda.device(device):
            return torch.cuda.is_current_stream_capturing()

    def copy(self, words: Tensor, device: int) -> tuple[Tensor, Event]:
        with torch.cuda.device(device):
            pinned = words if words.is_pinned() else words.pin_memory()
            copied = pinned.to(torch.device("cuda", device), non_blocking=True)
            event = torch.cuda.Event()  # type: ignore[no-untyped-call]
            event.record()
            return copied, event

    def wait(self, event: Event, device: int) -> None:
        torch.cuda.current_stream(device).wait_event(event)  # type: ignore[arg-type]

    def record(self, words: Tensor, device: int) -> None:
        words.record_stream(torch.cuda.current_stream(device))
