"""A device that runs behind the host, without one: streams, events, memory, as `Transfers`.

Nothing runs before `run()`, which then takes the worst order that streams and events allow: memory
that was given back is overwritten first, then reads run, and copies last. So a read that does not
wait for its copy sees garbage, and so does one whose memory was released too early.
"""

from __future__ import annotations

import contextlib
import threading
import weakref
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from dilated_attention_pytorch.pattern.caches.transfers import WORD_BYTES, pack

GARBAGE = -1
SIDE_STREAM = 1000


class FakeEvent:
    def __init__(self) -> None:
        self.is_reached = False

    def query(self) -> bool:
        return self.is_reached


class Step:
    """One entry of a stream; it can run once `after` is reached. Steps of low rank run first."""

    def __init__(
        self, rank: int, action: Callable[[], None], after: FakeEvent | None = None
    ) -> None:
        self.rank = rank
        self.action = action
        self.after = after

    @property
    def is_ready(self) -> bool:
        return self.after is None or self.after.is_reached


class Buffer:
    """Device memory: outlives the tensors that show it, as real memory does."""

    def __init__(self, words: int, owner: int) -> None:
        self.memory = np.full(words, GARBAGE, dtype=np.int32)
        self.users = {owner}
        self.owner = owner

    def holds(self, address: int) -> bool:
        begin = self.memory.ctypes.data
        return begin <= address < begin + self.memory.nbytes


class FakeDevice:
    """`Transfers` of any device index; all threads share it, each has its own current stream."""

    def __init__(self) -> None:
        self._lock = threading.RLock()
        self._current = threading.local()
        self._streams: dict[int, list[Step]] = {}
        self.buffers: list[Buffer] = []
        self._pinned: list[Tensor] = []
        self._capture: list[tuple[Buffer, slice]] | None = None
        self.seen: list[Tensor] = []  # what reads saw, in the order in which they ran
        self.copies = 0

    # Transfers

    def stream(self, device: int, /) -> int:
        return int(getattr(self._current, "stream", 0))

    def capturing(self, device: int) -> bool:
        return self._capture is not None

    @contextlib.contextmanager
    def side_stream(self, device: int) -> Iterator[None]:
        with self.on(SIDE_STREAM):
            yield

    def pin(self, words: Tensor, device: int) -> Tensor:
        assert self._capture is None, "page-locking would make the capture fail"
        if not self.is_pinned(words):
            words = words.clone()
            self._pinned.append(words)
        return words

    def copy(
        self, sources: Sequence[Tensor], device: int, blocking: bool
    ) -> tuple[Tensor, list[Tensor], FakeEvent]:
        size, places = pack(sources)
        staged = torch.full((size,), GARBAGE, dtype=torch.int32)
        pack(sources, staged)
        assert self._capture is None, "copying would make the capture fail"
        with self._lock:
            self.copies += 1
            buffer = Buffer(size, self.stream(device))
            self.buffers.append(buffer)
            shown = buffer.memory[:]
            weakref.finalize(shown, self._free, buffer)
            block = torch.from_numpy(shown)
            self._enqueue(Step(3, lambda: np.copyto(buffer.memory, staged.numpy())))
            event = self._record_event(self.stream(device))
        if blocking:
            self.run()
        return block, [block[place] for place in places], event

    def wait(self, event: FakeEvent, device: int) -> None:
        self._enqueue(Step(2, lambda: None, event))

    def record(self, words: Tensor, device: int) -> None:
        self._buffer(words)[0].users.add(self.stream(device))

    # What tests do with it

    def is_pinned(self, words: Tensor) -> bool:
        return any(words is pinned for pinned in self._pinned)

    @contextlib.contextmanager
    def on(self, stream: int) -> Iterator[None]:
        before = self.stream(0)
        self._current.stream = stream
        try:
            yield
        finally:
            self._current.stream = before

    def read(self, words: Tensor) -> None:
        """A kernel on the current stream that reads the words, or its place in a graph."""
        buffer, place = self._buffer(words)
        if self._capture is not None:
            self._capture.append((buffer, place))
        else:
            self._enqueue(self._read_step(buffer, place))

    @contextlib.contextmanager
    def graph(self) -> Iterator[Callable[[], None]]:
        """Captures the reads of its body; gives the graph's replay."""
        captured: list[tuple[Buffer, slice]] = []
        self._capture = captured
        try:
            yield lambda: [self._enqueue(self._read_step(*read)) for read in captured] and None
        finally:
            self._capture = None

    def run(self) -> None:
        """Runs all that was enqueued."""
        with self._lock:
            while ready := [steps for steps in self._streams.values() if steps[0].is_ready]:
                steps = min(ready, key=lambda steps: steps[0].rank)
                steps.pop(0).action()
                self._streams = {name: left for name, left in self._streams.items() if left}
            assert not self._streams, "a stream waits for what never comes"

    def _enqueue(self, step: Step, stream: int | None = None) -> None:
        with self._lock:
            self._streams.setdefault(self.stream(0) if stream is None else stream, []).append(step)

    def _record_event(self, stream: int) -> FakeEvent:
        event = FakeEvent()
        self._enqueue(Step(0, lambda: setattr(event, "is_reached", True)), stream)
        return event

    def _read_step(self, buffer: Buffer, place: slice) -> Step:
        return Step(1, lambda: self.seen.append(torch.from_numpy(buffer.memory[place].copy())))

    def _free(self, buffer: Buffer) -> None:
        """The allocator: gives the memory to others, after what its users have enqueued so far."""
        with self._lock:
            for user in buffer.users - {buffer.owner}:
                self._enqueue(Step(0, lambda: None, self._record_event(user)), buffer.owner)
            self._enqueue(Step(0, lambda: buffer.memory.fill(GARBAGE)), buffer.owner)

    def _buffer(self, words: Tensor) -> tuple[Buffer, slice]:
        (buffer,) = [buffer for buffer in self.buffers if buffer.holds(words.data_ptr())]
        begin = (words.data_ptr() - buffer.memory.ctypes.data) // WORD_BYTES
        return buffer, slice(begin, begin + words.numel())
