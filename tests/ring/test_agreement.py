"""The comparison of arguments, with threads as ranks and a store in memory."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta

import pytest
import torch.distributed as dist

from dilated_attention_pytorch.ring.agreement import (
    Agreement,
    Disagreement,
    describe_differences,
)


def on_ranks(
    size: int, function: Callable[[Agreement, int], None], timeout: float = 5.0
) -> list[BaseException | None]:
    """What each rank raised."""
    store = dist.HashStore()

    def run(rank: int) -> BaseException | None:
        try:
            function(Agreement(store, rank, size, timedelta(seconds=timeout)), rank)
        except Exception as error:
            return error
        return None

    with ThreadPoolExecutor(size) as pool:
        return list(pool.map(run, range(size)))


def test_equal_fields_pass_many_times() -> None:
    def compare(agreement: Agreement, rank: int) -> None:
        for number in range(5):
            agreement.compare({"a": str(number)})

    assert on_ranks(4, compare) == [None] * 4


def test_differences_are_the_same_error_on_all_ranks_and_do_no_harm() -> None:
    def compare(agreement: Agreement, rank: int) -> None:
        with pytest.raises(Disagreement) as caught:
            agreement.compare({"dtype": "half" if rank == 2 else "float", "strategy": "ring"})
        texts.add(str(caught.value))
        agreement.compare({"dtype": "float"})

    texts: set[str] = set()
    assert on_ranks(4, compare) == [None] * 4
    (text,) = texts
    assert text == (
        "all ranks of the group must pass the same arguments, got dtype: float on ranks 0, 1, 3, "
        "half on rank 2"
    )


def test_a_refusal_is_told_to_the_others() -> None:
    def compare(agreement: Agreement, rank: int) -> None:
        if rank == 1:
            agreement.refuse("ValueError: no")
        else:
            agreement.compare({"a": "1"})

    first, second, third = on_ranks(3, compare)
    assert second is None
    assert isinstance(first, Disagreement) and isinstance(third, Disagreement)
    assert str(first) == str(third) == "rank 1 refused its arguments: ValueError: no"


def test_an_absent_rank_is_named() -> None:
    def compare(agreement: Agreement, rank: int) -> None:
        if rank != 1:
            agreement.compare({"a": "1"})

    first, second, third = on_ranks(3, compare, timeout=0.3)
    assert second is None and str(first).startswith("rank 1 did not come within 0.")
    assert isinstance(first, RuntimeError) and isinstance(third, RuntimeError)


def test_fields_that_some_lack() -> None:
    text = describe_differences([{"a": "1", "b": "2"}, {"a": "1"}, {"a": "1", "b": "2"}])
    assert text == "b: 2 on ranks 0, 2, nothing on rank 1"
    assert describe_differences([{"a": "1"}] * 3) == ""
