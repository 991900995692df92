"""The comparison of calls, with threads as ranks and a store in memory."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta

import pytest
import torch.distributed as dist

from dilated_attention_pytorch.ring.group.agreement import (
    Agreement,
    Disagreement,
    Fields,
    describe_differences,
)
from dilated_attention_pytorch.ring.group.ballot import Ballot
from dilated_attention_pytorch.ring.group.store import Absent, Patience


def on_ranks(
    size: int,
    function: Callable[[Agreement, int], None],
    timeout: float = 5.0,
    store: dist.Store | None = None,
) -> list[BaseException | None]:
    """What each rank raised."""
    shared = dist.HashStore() if store is None else store
    patience = Patience(timedelta(seconds=timeout))

    def run(rank: int) -> BaseException | None:
        ballot = Ballot(shared, rank, size, patience)
        try:
            function(Agreement(shared, ballot, rank, size, patience), rank)
        except Exception as error:
            return error
        return None

    with ThreadPoolExecutor(size) as pool:
        return list(pool.map(run, range(size)))


def test_equal_fields_pass_many_times() -> None:
    def compare(agreement: Agreement, rank: int) -> None:
        for number in range(5):
            agreement.compare(Fields({"a": str(number)}))

    assert on_ranks(4, compare) == [None] * 4


def test_differences_are_the_same_error_on_all_ranks_and_do_no_harm() -> None:
    def compare(agreement: Agreement, rank: int) -> None:
        with pytest.raises(Disagreement) as caught:
            agreement.compare(
                Fields({"dtype": "half" if rank == 2 else "float", "strategy": "ring"})
            )
        texts.add(str(caught.value))
        agreement.compare(Fields({"dtype": "float"}))

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
            agreement.compare(Fields({"a": "1"}))

    first, second, third = on_ranks(3, compare)
    assert second is None
    assert isinstance(first, Disagreement) and isinstance(third, Disagreement)
    assert str(first) == str(third) == "rank 1 refused its arguments: ValueError: no"


def test_an_absent_rank_is_named() -> None:
    def compare(agreement: Agreement, rank: int) -> None:
        if rank != 1:
            agreement.compare(Fields({"a": "1"}))

    first, second, third = on_ranks(3, compare, timeout=0.3)
    assert second is None and str(first).startswith("rank 1 did not come within 0.")
    assert isinstance(first, RuntimeError) and isinstance(third, RuntimeError)


def test_a_rank_that_refused_is_not_absent() -> None:
    def compare(agreement: Agreement, rank: int) -> None:
        if rank == 0:
            agreement.compare(Fields({"a": "1"}))
        elif rank == 1:
            agreement.refuse("ValueError: no")

    first, second, third = on_ranks(3, compare, timeout=0.3)
    assert second is None and third is None
    assert str(first).startswith("rank 2 did not come within 0.")


def test_a_rank_that_refuses_learns_whether_others_had_posted() -> None:
    def compare(agreement: Agreement, rank: int) -> None:
        if rank == 1:
            agreement.refuse("ValueError: no", may_have_posted=True)
        else:
            agreement.compare(Fields({"a": "1"}), has_posted=rank == has_posted)

    has_posted = 2
    first, second, third = on_ranks(3, compare)
    assert type(first) is type(second) is type(third) is RuntimeError
    assert str(first) == str(second) == str(third) and "ranks had begun the call" in str(first)
    has_posted = None
    first, second, third = on_ranks(3, compare)
    assert second is None and type(first) is type(third) is Disagreement


def test_refusals_keep_their_place_in_the_order() -> None:
    """Those who refuse do not wait; whoever comes later meets every refusal where it was made."""

    def compare(agreement: Agreement, rank: int) -> None:
        for number in range(6):
            if number % 3 == rank:
                agreement.refuse(f"no {number}")
                continue
            with pytest.raises(Disagreement, match=f"rank {number % 3} refused.*no {number}"):
                agreement.compare(Fields({"call": str(number)}))
        agreement.compare(Fields({"call": "the last"}))

    assert on_ranks(3, compare) == [None] * 3


def test_a_difference_is_fatal_once_messages_were_posted() -> None:
    def compare(agreement: Agreement, rank: int) -> None:
        agreement.compare(Fields({"rows": "20"}), has_posted=rank != 1)
        agreement.compare(Fields({"rows": "24" if rank == 1 else "20"}), has_posted=rank != 1)

    errors = on_ranks(3, compare)
    assert len({str(error) for error in errors}) == 1
    for error in errors:
        assert isinstance(error, RuntimeError) and not isinstance(error, Disagreement)
        assert "rows: 20 on ranks 0, 2, 24 on rank 1; ranks had begun the call" in str(error)


def test_the_store_does_not_grow() -> None:
    """Whatever the rounds are: a few keys of the last two remain."""
    store = dist.HashStore()
    counts: list[int] = []

    def compare(agreement: Agreement, rank: int) -> None:
        for number in range(60):
            agreement.compare(Fields({"rows": str(number)}))
            if number % 5 == 4:
                agreement.gather(number)
            if number % 7 == 6:
                with pytest.raises(Disagreement):
                    agreement.compare(Fields({"rows": str(rank)}))
            if number % 11 == 10:
                agreement.refuse("no")
            if rank == 0:
                counts.append(store.num_keys())

    assert on_ranks(3, compare, store=store) == [None] * 3
    assert max(counts) <= 16 and store.num_keys() <= 8


def test_a_store_that_is_gone_is_said() -> None:
    class Gone(dist.HashStore):
        def add(self, key: str, amount: int) -> int:
            raise dist.DistNetworkError("broken pipe")

    (error,) = on_ranks(1, lambda agreement, rank: agreement.compare(Fields({})), store=Gone())
    assert isinstance(error, RuntimeError) and not isinstance(error, Absent)
    assert str(error) == "the group's store can't be reached: broken pipe"


def test_fields_that_some_lack() -> None:
    text = describe_differences([{"a": "1", "b": "2"}, {"a": "1"}, {"a": "1", "b": "2"}])
    assert text == "b: 2 on ranks 0, 2, nothing on rank 1"
    assert describe_differences([{"a": "1"}] * 3) == ""
