"""Worker processes joined by gloo, which run a function of a test on every rank."""

from __future__ import annotations

import os
import tempfile
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from benchmarks import processes
from benchmarks.processes import Failure, Function

__all__ = ["Failure", "Processes", "group_of"]


class Processes(processes.Processes):
    """`size` processes in one process group, and further groups of the first 1, 2, .. of them.

    timeout: of the groups, in seconds.
    """

    def __init__(self, size: int, timeout: float = 30.0) -> None:
        self._folder = tempfile.TemporaryDirectory()
        store = os.path.join(self._folder.name, "store")
        super().__init__(size, _join, size, store, timeout)

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
        super().close()
        self._folder.cleanup()


_groups: dict[int, dist.ProcessGroup] = {}


def group_of(size: int) -> dist.ProcessGroup:
    """In a worker: the group of the first `size` ranks."""
    return _groups[size]


def _join(rank: int, size: int, store: str, timeout: float) -> None:
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
