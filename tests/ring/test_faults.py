"""What goes wrong between ranks: the same error on all of them, in time, and no wrong result."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist

from dilated_attention_pytorch import dilated_attention
from tests.conftest import make_qkv
from tests.ring.processes import Failure, Processes, group_of

TIMEOUT = 2.0  # of the groups of processes that die, in seconds


def call(group: dist.ProcessGroup, **change: Any) -> torch.Tensor:
    """A good call, but for what is changed."""
    length = change.pop("length", 20)
    heads, kv_heads = change.pop("heads", 4), change.pop("kv_heads", 2)
    tensors = make_qkv(
        length, heads, 8, kv_heads=kv_heads, dtype=change.pop("dtype", torch.float32)
    )
    if change.pop("requires_grad", False):
        tensors = tuple(x.requires_grad_() for x in tensors)
    branches = change.pop("branches", ([16, 40], [1, 2]))
    out = dilated_attention(*tensors, *branches, group=group, **change)
    assert isinstance(out, torch.Tensor)
    return out


def differ(size: int, change: dict[str, Any], cached: bool) -> tuple[str, float]:
    """The error of a call that rank 1 makes with other arguments, and the seconds it took."""
    group = group_of(size)
    if cached:
        call(group, scale=0.1)
    begin = time.monotonic()
    try:
        # No other test makes a call of this scale: it is compared.
        call(group, **{"scale": 0.37, **(change if group.rank() == 1 else {})})
    except (ValueError, TypeError) as error:
        text = f"{type(error).__name__}: {error}"
    else:
        raise AssertionError("no error")
    seconds = time.monotonic() - begin
    call(group, scale=0.2)  # the group still works
    return text, seconds


DIFFERENCES: dict[str, tuple[dict[str, Any], str]] = {
    "rows": ({"length": 21}, "rows of query"),
    "heads": ({"heads": 8}, "query without its rows"),
    "KV heads": ({"kv_heads": 1}, "key without its rows"),
    "dtype": ({"dtype": torch.float64}, "dtype: torch.float32 on ranks 0, 2, torch.float64"),
    "segments": ({"branches": ([16, 50], [1, 2])}, "segment_lengths"),
    "rates": ({"branches": ([16, 40], [1, 3])}, "dilation_rates"),
    "number of branches": ({"branches": ([16], [1])}, "segment_lengths"),
    "offsets": ({"head_offsets": "blocked"}, "head_offsets"),
    "causal": ({"is_causal": True}, "is_causal: False on ranks 0, 2, True on rank 1"),
    "scale": ({"scale": 0.5}, "scale: 0.37 on ranks 0, 2, 0.5 on rank 1"),
    "padding": ({"padding": "zeros"}, "padding"),
    "strategy": ({"strategy": "ring"}, "strategy: auto on ranks 0, 2, ring on rank 1"),
    "dropout": ({"dropout_p": 0.5}, "dropout_p"),
    "shards": ({"shard_lengths": [20, 20, 20]}, "shard_lengths"),
}


@pytest.mark.parametrize("name", DIFFERENCES)
def test_differing_arguments_raise_the_same_error_on_every_rank(
    workers: Processes, name: str
) -> None:
    change, named = DIFFERENCES[name]
    results = workers.run(3, differ, change, name == "rows")
    assert len({text for text, _ in results}) == 1
    text, _ = results[0]
    assert named in text and "rank 1" in text
    assert max(seconds for _, seconds in results) < 1.0


REFUSALS: dict[str, tuple[dict[str, Any], str]] = {
    "no fourth of 3 heads": ({"kv_heads": 3}, "key: "),
    "rows that are not the shard's": (
        {"length": 19, "shard_lengths": [20, 20, 20]},
        "query: must have the rows of rank",
    ),
    "dropout in all_to_all": (
        {"dropout_p": 0.5, "strategy": "all_to_all"},
        "must not be 'all_to_all' with dropout",
    ),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_a_rank_that_refuses_its_arguments_tells_the_others(workers: Processes, name: str) -> None:
    change, named = REFUSALS[name]
    (first, _), (second, _), (third, _) = workers.run(3, differ, change, False)
    assert first == third and named in first and "rank 1 refused its arguments" in first
    assert named in second and "refused" not in second


@pytest.fixture
def mortals() -> Iterator[Processes]:
    processes = Processes(3, timeout=TIMEOUT)
    yield processes
    processes.close()


def die(size: int, warm: bool) -> None:
    """Rank 1 ends in the middle; what the others see."""
    group = group_of(size)
    if warm:
        call(group)
    if group.rank() == 1:
        os._exit(1)
    for _ in range(50):  # what rank 1 had sent before may still arrive
        call(group)


@pytest.mark.parametrize("warm", [False, True])
def test_a_killed_rank_is_an_error_within_the_timeout(mortals: Processes, warm: bool) -> None:
    begin = time.monotonic()
    mortals.start(die, 3, warm, ranks=range(3))
    for rank in (0, 2):
        with pytest.raises(Failure, match="RuntimeError|DistBackendError") as caught:
            mortals.result(rank, timeout=60.0)
        assert "did not answer" not in str(caught.value)
    assert time.monotonic() - begin < 60.0


def stay_away(size: int, warm: bool) -> None:
    group = group_of(size)
    if warm:
        call(group)
    if group.rank() == 1:
        time.sleep(TIMEOUT + 1.0)
        return
    call(group)


@pytest.mark.parametrize("warm", [False, True])
def test_an_absent_rank_is_an_error_within_the_timeout(mortals: Processes, warm: bool) -> None:
    mortals.start(stay_away, 3, warm, ranks=range(3))
    for rank in (0, 2):
        with pytest.raises(Failure, match="rank 1 did not come within") as caught:
            mortals.result(rank, timeout=60.0)
        assert "did not answer" not in str(caught.value)
