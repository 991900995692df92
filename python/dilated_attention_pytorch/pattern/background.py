"""One thread for work that nobody waits for."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait


class Background:
    """Runs jobs one after the other on a thread of its own, which starts with the first job.

    `abandon()` is for a forked process, in which the thread does not live on.
    """

    def __init__(self) -> None:
        self.abandon()

    def abandon(self) -> None:
        self._lock = threading.Lock()
        self._executor: ThreadPoolExecutor | None = None
        self._jobs: set[Future[None]] = set()
        self._failure: BaseException | None = None

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

    def _finish(self, future: Future[None]) -> None:
        """Both `drain` and the future itself call this; the first one counts."""
        with self._lock:
            if future in self._jobs:
                self._jobs.remove(future)
                self._failure = self._failure or future.exception()

    def drain(self) -> None:
        """Waits until all that was submitted is done.

        Raises:
            Exception: the first that a job raised, or that kept one from running, since the last
                time.
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
