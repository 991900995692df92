"""Ballots, with threads as ranks and a store in memory."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta

import pytest
import torch.distributed as dist

from dilated_attention_pytorch.ring.group.ballot import REFUSED, Ballot
from dilated_attention_pytorch.ring.group.store import Absent, Patience

A, B = b"a" * 16, b"b" * 16


@pytest.fixture
def ballots() -> list[Ballot]:
    """Of three ranks."""
    store, patience = dist.HashStore(), Patience(timedelta(seconds=0.5))
    return [Ballot(store, rank, 3, patience) for rank in range(3)]


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


def test_a_probe_ends_the_wait_for_a_dead_rank() -> None:
    def probe(waited: float) -> None:
        if waited > 0.2:
            raise Absent("rank 1 is dead")

    ballot = Ballot(dist.HashStore(), 0, 2, Patience(timedelta(hours=1), probe=probe))
    ballot.cast(1, A)
    with pytest.raises(Absent, match="^rank 1 is dead$"):
        ballot.is_unanimous(1, A)
