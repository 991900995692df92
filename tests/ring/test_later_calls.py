"""Ranks that differ in calls which were all agreed on before: an error on each, and on it goes."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import pytest
import torch
import torch.distributed as dist

from tests.ring.processes import Failure, Processes, group_of
from tests.ring.test_faults import call, mortals  # noqa: F401

HALF, BRAIN = {"dtype": torch.float16}, {"dtype": torch.bfloat16}
RING, GATHER, HEADS = ({"strategy": name} for name in ("ring", "gather", "all_to_all"))
PAIRS: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "a shorter sequence": ({"length": 24}, {}, "rows of query"),
    "a longer sequence": ({}, {"length": 40}, "rows of query"),
    "as many bytes": (HALF, BRAIN, "dtype: torch.float16 on ranks 0, 2, torch.bfloat16 on rank 1"),
    "wider numbers": ({}, {"dtype": torch.float64}, "dtype"),
    "another layer": ({"scale": 0.2}, {"scale": 0.3}, "scale: 0.2 on ranks 0, 2, 0.3 on rank 1"),
    "causal": ({}, {"is_causal": True}, "is_causal"),
    "other rounds": (RING, GATHER, "strategy"),
    "other messages": (RING, HEADS, "strategy"),
    "fewer branches": ({}, {"branches": ([16], [1])}, "segment_lengths"),
}


def good(group: dist.ProcessGroup) -> torch.Tensor:
    return call(group, scale=0.2)


def see(function: Any, *arguments: Any, **options: Any) -> str:
    try:
        function(*arguments, **options)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "no error"


def differ(size: int, mine: dict[str, Any], others: dict[str, Any]) -> str:
    """What a rank sees where rank 1 makes the one call and the others the other; both are known."""
    group = group_of(size)
    for options in (mine, others):
        call(group, **options)
    expected = good(group)
    text = see(call, group, **(mine if group.rank() == 1 else others))
    assert torch.equal(good(group), expected)
    return text


@pytest.mark.parametrize("name", PAIRS)
def test_a_difference_is_the_same_error_on_every_rank(workers: Processes, name: str) -> None:
    others, mine, named = PAIRS[name]
    first, *rest = workers.run(3, differ, mine, others)
    assert rest == [first, first]
    assert first.startswith("Disagreement: all ranks of the group") and named in first


def differ_in_direction(size: int) -> str:
    """Rank 1 calls again where the others differentiate."""
    group = group_of(size)
    out = call(group, requires_grad=True)
    text = see(good, group) if group.rank() == 1 else see(out.sum().backward)
    out = call(group, requires_grad=True)
    out.sum().backward()
    return text


def test_a_forward_does_not_meet_a_backward(workers: Processes) -> None:
    first, *rest = workers.run(3, differ_in_direction)
    assert rest == [first, first]
    assert "call: backward on ranks 0, 2, forward on rank 1" in first


def differ_in_order(size: int) -> list[str]:
    group = group_of(size)
    scales = [0.2, 0.3]
    for scale in scales:
        call(group, scale=scale)
    if group.rank() == 1:
        scales.reverse()
    return [see(call, group, scale=scale) for scale in scales] + [see(good, group)]


def test_layers_in_another_order(workers: Processes) -> None:
    first, *rest = workers.run(3, differ_in_order)
    assert rest == [first, first]
    assert "scale" in first[0] and "scale" in first[1] and first[2] == "no error"


def fail_at_posting(size: int) -> None:
    """As where a rank dies between the comparison and the messages."""
    group = group_of(size)
    call(group)

    def broken(operations: object) -> None:
        raise RuntimeError("Connection closed by peer")

    dist.batch_isend_irecv = broken
    for text in ("an exchange failed: a rank is dead", "an earlier call over the group failed: an"):
        with pytest.raises(RuntimeError, match=f"^{text}.*: Connection closed by peer$"):
            call(group)


def test_an_error_while_posting_is_explained_and_stays(mortals: Processes) -> None:  # noqa: F811
    mortals.run(3, fail_at_posting)


def keys_of_many_lengths(size: int) -> list[int]:
    group = group_of(size)
    store = dist.distributed_c10d._get_process_group_store(group)
    dist.barrier(group)
    counts = [store.num_keys()]
    for length in range(20, 60):
        call(group, length=length)
        if length % 10 == 0:
            see(call, group, scale=float("nan") if group.rank() == 1 else 0.2)
    dist.barrier(group)
    return [*counts, store.num_keys()]


def test_the_store_does_not_grow_with_the_kinds_of_calls(workers: Processes) -> None:
    for before, after in workers.run(3, keys_of_many_lengths):
        assert after - before <= 2 * 3


def stop_after_a_refusal(size: int) -> str:
    """Rank 1 refuses and calls no more."""
    group = group_of(size)
    return see(call, group, scale=float("nan") if group.rank() == 1 else 0.2)


def test_nobody_waits_for_a_rank_that_refused(mortals: Processes) -> None:  # noqa: F811
    first, second, third = mortals.run(3, stop_after_a_refusal)
    assert first == third and "rank 1 refused its arguments: ValueError: scale" in first
    assert second.startswith("ValueError: scale")


def no_backward(size: int) -> None:
    group = group_of(size)
    out = call(group, requires_grad=True)
    if group.rank() != 1:
        out.sum().backward()


def test_a_backward_that_one_rank_leaves_out_names_it(mortals: Processes) -> None:  # noqa: F811
    mortals.start(no_backward, 3, ranks=range(3))
    mortals.result(1)
    for rank in (0, 2):
        with pytest.raises(Failure, match="rank 1 did not come within"):
            mortals.result(rank)


def call_over_groups_of_one_name(size: int) -> list[str]:
    """A group that is made again has the former one's keys in the store."""
    texts = []
    for calls in (1, 2, 3):
        limit = timedelta(seconds=2)
        group = dist.new_group(list(range(size)), limit, use_local_synchronization=True)
        texts += [f"{group.group_name} {see(good, group)}" for _ in range(calls)]
        dist.destroy_process_group(group)
    return texts


def test_a_group_that_is_made_again_works(workers: Processes) -> None:
    # Of one rank: torch itself may meet the former group's addresses when it connects more.
    (texts,) = workers.run(1, call_over_groups_of_one_name)
    assert len(set(texts)) == 1 and texts[0].endswith("no error")
