"""Worker processes joined by gloo, which run a function of a test on every rank."""

from __future__ import annotations

import multiprocessing
import os
import tempfile
import traceback
from collections.abc import Callable, Sequence
from datetime import timedelta
from multiprocessing.connection import Connection
from typing import Any

import torch
import torch.distributed as dist

Function = Callable[..., Any]


class Failure(AssertionError):
    """A function raised on a rank; the text is its traceback."""


class Processes:
    """`size` processes in one process group, and further groups of the first 1, 2, .. of them.

    They take calls until `close`. timeout: of the groups, in seconds.
    """

    def __init__(self, size: int, timeout: float = 30.0) -> None:
        context = multiprocessing.get_context("spawn")
        self._folder = tempfile.TemporaryDirectory()
        store = os.path.join(self._folder.name, "store")
        self.size = size
        self._pipes: list[Connection] = []
        self.processes = []
        for rank in range(size):
            here, there = context.Pipe()
            process = context.Process(
                target=_serve, args=(there, rank, size, store, timeout), daemon=True
            )
            process.start()
            there.close()
            self._pipes.append(here)
            self.processes.append(process)

    def start(self, function: Function, *arguments: Any, ranks: Sequence[int]) -> None:
        for rank in ranks:
            self._pipes[rank].send((function, arguments))

    def result(self, rank: int, timeout: float = 240.0) -> Any:
        """What the function returned on the rank; raises Failure if it raised, or says nothing."""
        if not self._pipes[rank].poll(timeout):
            raise Failure(f"rank {rank} did not answer within {timeout} s")
        succeeded, value = self._pipes[rank].recv()
        if not succeeded:
            raise Failure(f"rank {rank}:\n{value}")
        return value

    def run(self, size: int, function: Function, *arguments: Any) -> list[Any]:
        """Calls function(*arguments) on the first `size` ranks; see `group_of`."""
        self.start(function, size, *arguments, ranks=range(size))
        failures, results = [], []
        for rank in range(size):
            try:
                results.append(self.result(rank))
            except Failure as failure:
                failures.append(str(failure))
        if failures:
            raise Failure("\n".join(failures))
        return results

    def close(self) -> None:
        for pipe in self._pipes:
            pipe.close()
        for process in self.processes:
            process.join(5)
            if process.is_alive():
                process.kill()
        self._folder.cleanup()


_groups: dict[int, dist.ProcessGroup] = {}


def group_of(size: int) -> dist.ProcessGroup:
    """In a worker: the group of the first `size` ranks."""
    return _groups[size]


def _serve(pipe: Connection, rank: int, size: int, store: str, timeout: float) -> None:
    torch.set_num_threads(1)
    # Processes may start further apart than a test gives the operations of their groups.
    starting, limit = timedelta(seconds=120), timedelta(seconds=timeout)
    dist.init_process_group(
        "gloo", store=dist.FileStore(store, size), rank=rank, world_size=size, timeout=starting
    )
    for some in range(1, size + 1):
        group = dist.new_group(list(range(some)), timeout=limit)
        if rank < some:
            _groups[some] = group
    while True:
        try:
            function, arguments = pipe.recv()
        except EOFError:
            return
        try:
            pipe.send((True, function(*arguments)))
        except Exception:
            pipe.send((False, traceback.format_exc()))
