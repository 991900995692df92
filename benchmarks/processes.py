"""Worker processes that run functions when they are told to."""

from __future__ import annotations

import contextlib
import multiprocessing
import traceback
from collections.abc import Callable, Sequence
from multiprocessing import connection
from multiprocessing.connection import Connection
from multiprocessing.context import ForkServerProcess
from typing import Any

Function = Callable[..., Any]


class Failure(AssertionError):
    """A function raised on a rank; the text is its traceback."""


class Processes:
    """`size` fresh processes, which take calls until `close`.

    Each begins with join(rank, *arguments).
    """

    def __init__(self, size: int, join: Function, *arguments: Any) -> None:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["dilated_attention_pytorch"])  # takes seconds to import
        self.size = size
        self._pipes: list[Connection] = []
        self.processes: list[ForkServerProcess] = []
        for rank in range(size):
            here, there = context.Pipe()
            process = context.Process(target=_serve, args=(there, join, rank, *arguments))
            process.daemon = True
            process.start()
            there.close()
            self._pipes.append(here)
            self.processes.append(process)

    def start(self, function: Function, *arguments: Any, ranks: Sequence[int]) -> None:
        """Tells the ranks to call function(*arguments); one that has ended shows it in `result`."""
        for rank in ranks:
            with contextlib.suppress(BrokenPipeError):
                self._pipes[rank].send((function, arguments))

    def ready(self, ranks: Sequence[int], timeout: float) -> list[int]:
        """Waits for one of these at least; those that `result` need not wait for."""
        pipes = connection.wait([self._pipes[rank] for rank in ranks], timeout)
        return [rank for rank in ranks if self._pipes[rank] in pipes]

    def result(self, rank: int, timeout: float = 240.0) -> Any:
        """What the function returned on the rank.

        Raises Failure if it raised, or does not return within `timeout` seconds; EOFError if the
        process has ended.
        """
        if not self._pipes[rank].poll(timeout):
            raise Failure(f"rank {rank} did not answer within {timeout} s")
        try:
            succeeded, value = self._pipes[rank].recv()
        except ConnectionResetError as error:
            raise EOFError from error
        if not succeeded:
            raise Failure(f"rank {rank}:\n{value}")
        return value

    def close(self) -> None:
        for pipe in self._pipes:
            pipe.close()
        for process in self.processes:
            process.join(5)
            if process.is_alive():
                process.kill()


def _serve(pipe: Connection, join: Function, rank: int, *arguments: Any) -> None:
    join(rank, *arguments)
    while True:
        try:
            function, given = pipe.recv()
        except EOFError:
            return
        try:
            pipe.send((True, function(*given)))
        except Exception:
            pipe.send((False, traceback.format_exc()))
