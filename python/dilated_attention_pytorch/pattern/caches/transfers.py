"""What the caches use of an asynchronous device: its streams, events and copies.

No other file of theirs names these. Streams are known by their handles; 0 is the default stream.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Protocol

import torch
from torch import Tensor

DEFAULT_STREAM = 0
WORD_BYTES = 4
_ALIGNMENT = 64  # words, 256 bytes: as the allocator aligns what it gives


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

    def side_stream(self, device: int) -> contextlib.AbstractContextManager[object]:
        """A context in which a stream of this object's own is current: no other work delays it."""

    def pin(self, words: Tensor, device: int) -> Tensor:
        """The words in page-locked memory; the same tensor if they lie there already."""

    def copy(
        self, sources: Sequence[Tensor], device: int, blocking: bool
    ) -> tuple[Tensor, list[Tensor], Event]:
        """A block of device memory, a view of it for each source, and the event after the copy.

        One copy, enqueued on the current stream, which owns the memory. The host waits for it if
        `blocking`, else it goes through page-locked memory; the sources may be released at once.
        """

    def wait(self, event: Event, device: int) -> None:
        """Makes the current stream's further work wait for the event."""

    def record(self, words: Tensor, device: int) -> None:
        """Once released, the words' memory is not reused before the current stream's work ends."""


def pack(sources: Sequence[Tensor], block: Tensor | None = None) -> tuple[int, list[slice]]:
    """Lays the sources out one after another, aligned: words in all, and the slice of each.

    With a block, copies them there.
    """
    places, end = [], 0
    for source in sources:
        places.append(slice(end, end + source.numel()))
        if block is not None:
            block[places[-1]] = source
        end += -(-source.numel() // _ALIGNMENT) * _ALIGNMENT
    return end, places


def _current_stream(device: int, /) -> int:
    return torch.cuda.current_stream(device).cuda_stream


class CudaTransfers:
    """CUDA's, with PyTorch's allocators, which reuse memory only after the streams that use it.

    Every look-up calls `stream`. Where torch has it, that is the function that torch.compile's
    generated code calls; the public one makes an object each time.
    """

    stream = staticmethod(getattr(torch._C, "_cuda_getCurrentRawStream", _current_stream))

    def __init__(self) -> None:
        self._side_streams: dict[int, torch.cuda.Stream] = {}

    def capturing(self, device: int) -> bool:
        if torch.cuda.current_device() == device:
            return torch.cuda.is_current_stream_capturing()
        with torch.cuda.device(device):
            return torch.cuda.is_current_stream_capturing()

    @contextlib.contextmanager
    def side_stream(self, device: int) -> Iterator[None]:
        if device not in self._side_streams:
            self._side_streams[device] = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        with torch.cuda.stream(self._side_streams[device]):
            yield

    def pin(self, words: Tensor, device: int) -> Tensor:
        with torch.cuda.device(device):
            return words.pin_memory()

    def copy(
        self, sources: Sequence[Tensor], device: int, blocking: bool
    ) -> tuple[Tensor, list[Tensor], Event]:
        size, places = pack(sources)
        with torch.cuda.device(device):
            if len(sources) == 1:
                staged = sources[0] if blocking else sources[0].pin_memory()
            else:
                staged = torch.empty(size, dtype=torch.int32, device="cpu", pin_memory=not blocking)
                pack(sources, staged)
            # The allocator of page-locked memory keeps what a copy reads until it is done.
            block = staged.to(torch.device("cuda", device), non_blocking=not blocking)
            event = torch.cuda.Event()  # type: ignore[no-untyped-call]
            event.record()
        return block, [block[place] for place in places], event

    def wait(self, event: Event, device: int) -> None:
        torch.cuda.current_stream(device).wait_event(event)  # type: ignore[arg-type]

    def record(self, words: Tensor, device: int) -> None:
        words.record_stream(torch.cuda.current_stream(device))
