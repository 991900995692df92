"""A thread of its own for what the ranks compare while their messages travel already."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import ParamSpec, TypeVar

Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")


class Deferred:
    """Calls functions one after the other. The interpreter's exit does not wait for them."""

    def __init__(self) -> None:
        self._jobs: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._is_stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="dilated-agreement", daemon=True)
        self._thread.start()

    def submit(
        self,
        function: Callable[Arguments, Result],
        *arguments: Arguments.args,
        **options: Arguments.kwargs,
    ) -> Future[Result]:
        future: Future[Result] = Future()

        def job() -> None:
            try:
                future.set_result(function(*arguments, **options))
            except BaseException as error:
                future.set_exception(error)

        self._jobs.put(job)
        return future

    def pause(self, seconds: float) -> None:
        """For a function that waits. Raises RuntimeError once `stop` was called."""
        if self._is_stopping.wait(seconds):
            raise RuntimeError("the process group was destroyed, or the process ends")

    def stop(self) -> None:
        """Ends the thread, soon if what it is at waits by `pause`."""
        self._is_stopping.set()
        self._jobs.put(None)
        if self._thread is not threading.current_thread():
            self._thread.join(1.0)

    def _run(self) -> None:
        while (job := self._jobs.get()) is not None:
            job()
