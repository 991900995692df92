"""The thread that compares while messages travel."""

from __future__ import annotations

import subprocess
import sys
import threading
from datetime import timedelta

import pytest

from dilated_attention_pytorch.ring.group.deferred import Deferred
from dilated_attention_pytorch.ring.group.store import Patience


def test_jobs_run_in_order_on_a_thread_of_their_own() -> None:
    deferred, order = Deferred(), []

    def job(number: int) -> int:
        order.append(number)
        if number == 2:
            raise ValueError("two")
        return threading.get_ident()

    futures = [deferred.submit(job, number) for number in range(5)]
    assert futures[4].result(10) == futures[0].result(10) != threading.get_ident()
    assert order == [0, 1, 2, 3, 4]
    with pytest.raises(ValueError, match="two"):
        futures[2].result(10)
    deferred.stop()


def test_stop_ends_a_job_that_waits() -> None:
    deferred = Deferred()
    patience = Patience(timedelta(hours=1), deferred.pause)
    waiting = deferred.submit(lambda: sum(1 for _ in patience.polls()))
    deferred.stop()
    with pytest.raises(RuntimeError, match="destroyed, or the process ends"):
        waiting.result(10)
    assert not any(t.name == "dilated-agreement" and t.is_alive() for t in threading.enumerate())


LEFT = """
from datetime import timedelta
from weakref import finalize
from dilated_attention_pytorch.ring.group.deferred import Deferred
from dilated_attention_pytorch.ring.group.store import Patience

deferred = Deferred()
finalize(Deferred, deferred.stop)
patience = Patience(timedelta(hours=1), deferred.pause)
deferred.submit(lambda: sum(1 for _ in patience.polls()))
"""


def test_the_interpreter_ends_while_a_job_waits() -> None:
    subprocess.run([sys.executable, "-c", LEFT], check=True, timeout=120)
