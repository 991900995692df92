"""Four worker processes that all of the ring's tests share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.ring.processes import Processes


@pytest.fixture(scope="session")
def workers() -> Iterator[Processes]:
    processes = Processes(4)
    yield processes
    processes.close()
