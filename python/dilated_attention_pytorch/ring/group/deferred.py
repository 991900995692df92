"""A thread on which ranks compare their calls while messages already travel."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from functools import partial
from typing import Generic, ParamSpec, TypeVar

Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")


class Outcome(Generic[Result]):
    """A call and its result, for every call of a ring: a Future takes three times as long.

    Run once, by one thread; its result may be asked for by any.
    """

    __slots__ = ("_call", "_error", "_pending", "_result")

    _result: Result

    def __init__(self, call: Callable[[], Result]) -> None:
        self._call = call
        self._error: BaseException | None = None
        self._pending = threading.Lock()
        self._pending.acquire()

    def run(self) -> None:
        try:
            self._result = self._call()
        except BaseException as error:
            self._error = error
        self._pending.release()

    def result(self, timeout: float = -1) -> Result:
        """Waits for what the call returns or raises; TimeoutError after `timeout` seconds."""
        if not self._pending.acquire(timeout=timeout):
            raise TimeoutError
        self._pending.release()
        if self._error is not None:
            raise self._error
        return self._result


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
    ) -> Outcome[Result]:
        outcome = Outcome(partial(function, *arguments, **options))
        self._jobs.put(outcome.run)
        return outcome

    def pause(self, seconds: float) -> None:
        """Sleeps, for a function that waits: at least 0.1 ms, so that other threads can run.

        Raises RuntimeError once `stop` was called.
        """
        if self._is_stopping.wait(max(seconds, 1e-4)):
            raise RuntimeError("the process group was destroyed, or the process ends")

    def stop(self) -> None:
        """Ends the thread; soon, if the function that it runs waits by `pause`."""
        self._is_stopping.set()
        self._jobs.put(None)
        if self._thread is not threading.current_thread():
            self._thread.join(1.0)

    def _run(self) -> None:
        while (job := self._jobs.get()) is not None:
            job()
