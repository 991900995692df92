"""A thread for work in the background."""

from __future__ import annotations

import atexit
import threading
import weakref
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait


class Background:
    """Runs jobs one after the other on a thread of its own, which starts with the first job.

    The interpreter's exit waits for the running job and drops the others. `abandon()` is for a
    forked process, in which the thread does not exist.
    """

    def __init__(self) -> None:
        self.abandon()
        _all.add(self)

    def abandon(self) -> None:
        self._lock = threading.Lock()
        self._executor: ThreadPoolExecutor | None = None
        self._jobs: set[Future[None]] = set()
        self._failure: BaseException | None = None
        self.is_stopping = False

    def submit(self, job: Callable[[], None]) -> None:
        with self._lock:
            if self._executor is None:
                self._executor = ThreadPoolExecutor(1, "dilated-prefetch")
            try:
                future = self._executor.submit(job)
            except RuntimeError as error:  # no thread starts while the interpreter shuts down
                self._failure = self._failure or error
                return
            self._jobs.add(future)
        future.add_done_callback(self._finish)

    def stop(self) -> None:
        """No further job begins; one that runs may look at `is_stopping`."""
        self.is_stopping = True
        if self._executor is not None:
            self._executor.shutdown(wait=False, cancel_futures=True)

    def _finish(self, future: Future[None]) -> None:
        """Called by `drain` and by the future itself; only the first call counts."""
        with self._lock:
            if future in self._jobs:
                self._jobs.remove(future)
                if not future.cancelled():
                    self._failure = self._failure or future.exception()

    def drain(self) -> None:
        """Waits until all that was submitted is done.

        Raises:
            Exception: the first since the last drain that a job raised or that kept one from
                running.
        """
        with self._lock:
            jobs = tuple(self._jobs)
        wait(jobs)
        for job in jobs:
            self._finish(job)
        with self._lock:
            failure, self._failure = self._failure, None
        if failure is not None:
            raise failure


_all: weakref.WeakSet[Background] = weakref.WeakSet()


def _stop_all() -> None:
    for background in list(_all):
        background.stop()


# Worker threads are joined before atexit's functions run, so atexit would be too late.
getattr(threading, "_register_atexit", atexit.register)(_stop_all)
