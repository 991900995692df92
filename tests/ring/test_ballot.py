"""Ballots, with threads as ranks; messages are queues."""

from __future__ import annotations

import queue
from collections import defaultdict
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta

import pytest
import torch.distributed as dist
from torch import Tensor

from dilated_attention_pytorch.ring.ballot import (
    REFUSED,
    Ballot,
    CounterBallot,
    MessageBallot,
)
from dilated_attention_pytorch.ring.store import Absent, Patience

A, B = b"a" * 16, b"b" * 16
Boxes = defaultdict[tuple[int, int], "queue.Queue[Tensor]"]


class Work:
    def __init__(self, wait: Callable[[], object]) -> None:
        self.wait = wait


class Mailer:
    """One rank of a group of threads."""

    def __init__(self, boxes: Boxes, rank: int, timeout: float) -> None:
        self._boxes, self._rank, self._timeout = boxes, rank, timeout

    def send(self, tensors: list[Tensor], dst: int, tag: int) -> Work:
        self._boxes[self._rank, dst].put(tensors[0].clone())
        return Work(lambda: None)

    def recv(self, tensors: list[Tensor], src: int, tag: int) -> Work:
        def wait() -> None:
            try:
                tensors[0].copy_(self._boxes[src, self._rank].get(timeout=self._timeout))
            except queue.Empty:
                raise RuntimeError("Timed out") from None

        return Work(wait)


@pytest.fixture(params=["messages", "counter"])
def ballots(request: pytest.FixtureRequest) -> list[Ballot]:
    """Of three ranks."""
    if request.param == "messages":
        boxes: Boxes = defaultdict(queue.Queue)
        return [MessageBallot(Mailer(boxes, rank, 0.5), rank, 3) for rank in range(3)]
    store, patience = dist.HashStore(), Patience(timedelta(seconds=0.5))
    return [CounterBallot(store, rank, 3, patience) for rank in range(3)]


def vote(ballots: list[Ballot], rounds: list[str]) -> list[list[bool | str]]:
    """What each rank learns in each round. Rounds: a letter a rank, - for none, x to refuse."""

    def run(rank: int) -> list[bool | str]:
        found: list[bool | str] = []
        for number, letters in enumerate(rounds):
            if letters[rank] == "x":
                ballots[rank].cast(number, REFUSED)
            elif letters[rank] != "-":
                digest = {"a": A, "b": B}[letters[rank]]
                ballots[rank].cast(number, digest)
                try:
                    found.append(ballots[rank].is_unanimous(number, digest))
                except Absent as error:
                    found.append(str(error))
        return found

    with ThreadPoolExecutor(len(ballots)) as pool:
        return list(pool.map(run, range(len(ballots))))


def test_all_learn_whether_all_agree(ballots: list[Ballot]) -> None:
    expected = [True, False, True, False, False, True]
    assert vote(ballots, ["aaa", "aba", "bbb", "aab", "baa", "aaa"]) == [expected] * 3


def test_a_refusal_is_a_difference_and_does_not_wait(ballots: list[Ballot]) -> None:
    assert vote(ballots, ["axa", "axx", "aaa"]) == [
        [False, False, True],
        [True],
        [False, True],
    ]


def test_the_absent_are_named(ballots: list[Ballot]) -> None:
    first, second, third = vote(ballots, ["a-a"])
    assert second == []
    for (text,) in (first, third):
        assert isinstance(text, str) and text.startswith("rank 1 did not come within 0.")
