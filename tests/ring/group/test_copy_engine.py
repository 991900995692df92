"""The copy engine's protocol, with threads as ranks and semaphores as signals; and its choice."""

from __future__ import annotations

import random
import threading
from collections import defaultdict
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from unittest import mock

import pytest
import torch
from torch import Tensor

from dilated_attention_pytorch.ring.group.communicator import Communicator
from dilated_attention_pytorch.ring.group.copy_engine import CopyEngine, _rounds, choose_transport
from dilated_attention_pytorch.ring.group.transport import start_engine
from tests.ring.processes import Processes, group_of

CAPACITY = 256


class Shared:
    """The ranks' buffers, and a binary signal for each (receiver, sender, channel)."""

    def __init__(self, size: int) -> None:
        self.buffers = [torch.zeros(size * CAPACITY, dtype=torch.uint8) for _ in range(size)]
        self.changed = threading.Condition()
        self.signals: dict[tuple[int, int, int], bool] = defaultdict(bool)


class ThreadHandle:
    def __init__(self, shared: Shared, rank: int) -> None:
        self.shared, self.rank = shared, rank

    def get_buffer(
        self, rank: int, sizes: Sequence[int], dtype: torch.dtype, storage_offset: int
    ) -> Tensor:
        buffer = self.shared.buffers[rank].view(dtype)
        return buffer[storage_offset : storage_offset + sizes[0]]

    def _turn(self, key: tuple[int, int, int], value: bool, timeout_ms: int) -> None:
        """Waits until the signal has the other value, then sets it."""
        with self.shared.changed:
            if not self.shared.changed.wait_for(
                lambda: self.shared.signals[key] != value, timeout_ms / 1e3
            ):
                raise TimeoutError(f"signal {key}")
            self.shared.signals[key] = value
            self.shared.changed.notify_all()

    def put_signal(self, dst_rank: int, channel: int, timeout_ms: int) -> None:
        self._turn((dst_rank, self.rank, channel), True, timeout_ms)

    def wait_signal(self, src_rank: int, channel: int, timeout_ms: int) -> None:
        self._turn((self.rank, src_rank, channel), False, timeout_ms)


@pytest.mark.parametrize("counts", [(1, 1, 1, 1), (3, 3, 3, 3), (1, 3, 2, 1)])
@pytest.mark.parametrize("size", [2, 3, 4])
def test_every_message_arrives_as_it_was_sent(size: int, counts: tuple[int, ...]) -> None:
    """Each exchange has counts[rank] messages from a rank to every other, peer by peer."""
    shared = Shared(size)
    random_sizes = random.Random(size)
    lengths = [random_sizes.randint(1, CAPACITY // 8) for _ in range(60)]

    def message(sender: int, receiver: int, number: int) -> Tensor:
        dtype = (torch.float32, torch.bfloat16)[number % 2]
        return torch.full((lengths[number],), 100.0 * number + 10 * sender + receiver).to(dtype)

    def run(rank: int) -> None:
        engine = CopyEngine(ThreadHandle(shared, rank), rank, CAPACITY, None, 5000)
        for first in range(0, len(lengths), max(counts)):
            others = [peer for peer in range(size) if peer != rank]
            numbers = [range(first, first + count) for count in counts]
            sends = [(to, message(rank, to, n)) for to in others for n in numbers[rank]]
            expected = [message(source, rank, n) for source in others for n in numbers[source]]
            received = [torch.full_like(each, -1.0) for each in expected]
            sources = [source for source in others for _ in numbers[source]]
            engine.exchange(sends, list(zip(sources, received, strict=True))).wait()
            assert all(map(torch.equal, received, expected))

    with ThreadPoolExecutor(size) as pool:
        list(pool.map(run, range(size)))


def test_a_round_has_one_message_of_each_peer() -> None:
    messages = [(peer, torch.full((1,), float(i))) for i, peer in enumerate([1, 1, 2, 1, 3])]
    rounds = [[(peer, int(data)) for peer, data in each] for each in _rounds(messages)]
    assert rounds == [[(1, 0), (2, 2), (3, 4)], [(1, 1)], [(1, 3)]]


def test_a_rank_that_does_not_come_is_an_error() -> None:
    engine = CopyEngine(ThreadHandle(Shared(2), 0), 0, CAPACITY, None, 50)
    with pytest.raises(TimeoutError):
        engine.exchange([], [(1, torch.zeros(4))])


def start_without(size: int, step: str) -> tuple[list[str], str | None, bool]:
    """Starts the engine where a step fails on rank 1: calls, transport, whether there is none."""
    comm, called = Communicator(group_of(size).group_name), []

    def tried(name: str) -> Tensor:
        called.append(name)
        if name == step and comm.rank == 1:
            raise MemoryError(f"{name} failed")
        return torch.zeros(1)

    module = "dilated_attention_pytorch.ring.group.transport"
    with (
        mock.patch(f"{module}._symmetric_buffer", lambda *_: tried("buffer")),
        mock.patch(f"{module}._map_buffer", lambda *_: tried("map")),
        mock.patch("torch.cuda.synchronize"),
        pytest.warns(UserWarning, match=f"{step} failed"),
    ):
        start_engine(comm._group, comm._state, torch.device("cpu"), CAPACITY)
    transport, comm._state.transport = comm.transport, None
    return called, transport, comm._state.engine is None


@pytest.mark.parametrize(("step", "called"), [("buffer", ["buffer"]), ("map", ["buffer", "map"])])
def test_all_ranks_go_without_it_where_one_can_not_start(
    workers: Processes, step: str, called: list[str]
) -> None:
    """A rank that met the others in a step that one of them does not reach would hang."""
    assert workers.run(2, start_without, step) == [(called, "direct", True)] * 2


@pytest.mark.parametrize(
    ("backend", "device", "wanted", "hosts", "reaches", "expected"),
    [
        ("nccl", "cuda", [True, True], ["a", "a"], [True, True], "copy engine"),
        ("nccl", "cuda", [True, False], ["a", "a"], [True, True], "direct"),
        ("nccl", "cuda", [True, True], ["a", "b"], [True, True], "direct"),
        ("nccl", "cuda", [True, True], ["a", "a"], [True, False], "direct"),
        ("nccl", "cuda", [True], ["a"], [True], "direct"),
        ("gloo", "cuda", [True, True], ["a", "a"], [True, True], "staged"),
        ("gloo", "cpu", [True, True], ["a", "a"], [True, True], "direct"),
    ],
)
def test_choice_of_the_transport(
    backend: str,
    device: str,
    wanted: list[bool],
    hosts: list[str],
    reaches: list[bool],
    expected: str,
) -> None:
    chosen = choose_transport(backend, device, is_wanted=wanted, hosts=hosts, reaches_peers=reaches)
    assert chosen == expected
