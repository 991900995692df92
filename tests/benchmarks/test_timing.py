"""The timing protocol's pure parts, and the protocol itself on a clock that is moved by hand."""

from __future__ import annotations

import random
import time
from itertools import pairwise

import pytest
import torch

from benchmarks import timing
from benchmarks.device_state import Sample, medians
from benchmarks.timing import Stopwatch, Timing, percentile

CPU = torch.device("cpu")


class HandClock:
    """Stands for time.perf_counter(): launches and pauses move it."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 100.0
        self.launches: list[tuple[str, float]] = []
        monkeypatch.setattr(time, "perf_counter", lambda: self.now)
        monkeypatch.setattr(time, "sleep", self.move)

    def move(self, seconds: float) -> None:
        self.now += seconds

    def launch(self, name: str, seconds: float) -> None:
        self.launches.append((name, self.now))
        self.move(seconds)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> HandClock:
    return HandClock(monkeypatch)


def test_percentiles() -> None:
    values = list(range(11))
    random.Random(0).shuffle(values)
    assert [percentile(values, p) for p in (0, 10, 50, 90, 100)] == [0, 1, 5, 9, 10]
    assert percentile([1.0, 2.0], 50) == 1.5
    assert percentile([0.1], 90) == 0.1


def test_a_timing_has_percentiles_and_the_state_medians() -> None:
    columns = Timing([3.0, 1.0, 2.0]).columns
    assert columns == pytest.approx({"ms": 2.0, "ms_p10": 1.2, "ms_p90": 2.8})
    state = [Sample(0.0, 1500.0, 690.0), Sample(1.0, 1600.0, None), Sample(2.0, 1980.0, 700.0)]
    assert medians(state) == (1600.0, 695.0)
    assert medians([]) == (None, None)


def test_sustained_reports_the_settled_rate(clock: HandClock) -> None:
    # The device slows down from 1 to 2 ms a launch after 100 ms, as a throttled clock does.
    def launch() -> None:
        clock.move(1e-3 if clock.now < 100.1 else 2e-3)

    (got,) = timing.sustained([launch], Stopwatch(CPU), seconds=0.5)
    assert got.values == pytest.approx([2.0] * len(got.values))
    assert clock.now - 100.0 >= 0.5 and got.launches >= 100


def test_sustained_times_short_launches_in_batches(clock: HandClock) -> None:
    launch = lambda: clock.launch("a", 1e-5)  # noqa: E731
    (got,) = timing.sustained([launch], Stopwatch(CPU), seconds=0.02)
    assert got.ms == pytest.approx(0.01) and len(clock.launches) >= 2000


def test_sustained_goes_there_and_back(clock: HandClock) -> None:
    # Who follows "hot" runs at half the rate: each of the others does so once.
    order: list[str] = []

    def launch(name: str) -> None:
        if order[-1:] != [name]:
            order.append(name)
        clock.move(2e-3 if order[-2:-1] == ["hot"] else 1e-3)

    launches = [lambda name=name: launch(name) for name in ("a", "hot", "b")]  # type: ignore[misc]
    a, _, b = timing.sustained(launches, Stopwatch(CPU), seconds=0.1)
    assert order == ["a", "hot", "b", "hot", "a"]
    assert (min(a.values), max(a.values)) == pytest.approx((1.0, 2.0))
    assert (min(b.values), max(b.values)) == pytest.approx((2.0, 2.0))


def test_isolated_takes_turns_and_pauses(clock: HandClock) -> None:
    launches = [lambda: clock.launch("a", 1e-3), lambda: clock.launch("b", 3e-3)]
    first, second = timing.isolated(launches, Stopwatch(CPU), 3)
    assert [first.ms, second.ms] == pytest.approx([1.0, 3.0])
    assert [name for name, _ in clock.launches] == ["a", "b"] * 4
    starts = [at for _, at in clock.launches[2:]]
    assert min(b - a for a, b in pairwise(starts)) >= 0.04


def test_host_times_are_those_of_the_calls_in_turn(
    clock: HandClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(timing, "HOST_LAUNCHES", 5)

    def launch(name: str, seconds: float) -> None:
        clock.launch(name, seconds if len(clock.launches) >= 2 * timing.HOST_WARM_UP else 1.0)

    launches = [lambda: launch("a", 2e-5), lambda: launch("b", 1e-5)]
    first, second = timing.host_times(launches, Stopwatch(CPU))
    assert [max(first.values), max(second.values)] == pytest.approx([0.02, 0.01])
    assert first.launches == second.launches == 5
    assert [name for name, _ in clock.launches] == ["a", "b"] * (timing.HOST_WARM_UP + 5)
