"""Every cache, on a model of a GPU that takes the worst order, and on a GPU."""

from __future__ import annotations

import pytest

from tests.conftest import missing_cuda

from .machines import MAKERS, CudaMachine, FakeMachine, Machine, Make


@pytest.fixture(params=MAKERS)
def make(request: pytest.FixtureRequest) -> Make:
    return MAKERS[request.param]


@pytest.fixture(params=["model", "cuda"])
def machine(request: pytest.FixtureRequest) -> Machine:
    if request.param == "model":
        return FakeMachine()
    if (reason := missing_cuda()) is not None:
        pytest.skip(reason)
    return CudaMachine()
