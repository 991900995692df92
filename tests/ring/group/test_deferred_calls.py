"""Groups that are not gloo's alone: on GPUs ranks compare while their messages travel.

Here they are gloo's for the CPU, and torch's fake backend, which moves nothing, stands for NCCL.
"""

from __future__ import annotations

import time
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
from torch.testing._internal.distributed import fake_pg  # noqa: F401, registers the backend

from dilated_attention_pytorch.ring.group.agreement import Fields
from dilated_attention_pytorch.ring.group.communicator import Communicator
from tests.ring.processes import Processes, group_of
from tests.ring.test_faults import call
from tests.ring.test_later_calls import good, see

GPU = torch.device("cuda")


def mixed_group(size: int) -> dist.ProcessGroup:
    limit = timedelta(seconds=3)
    group = dist.new_group(list(range(size)), backend="cpu:gloo,cuda:fake", timeout=limit)
    dist.barrier(group_of(size))
    return group


def keys(group: dist.ProcessGroup) -> int:
    return dist.distributed_c10d._get_process_group_store(group).num_keys()


def leave(size: int, group: dist.ProcessGroup) -> None:
    dist.barrier(group_of(size))
    dist.destroy_process_group(group)


def call_on_the_cpu(size: int) -> list[str]:
    group = mixed_group(size)
    is_odd = group.rank() == 1
    expected = good(group_of(size))
    assert torch.equal(good(group), expected)
    texts = [
        see(call, group, length=24 if is_odd else 20),
        see(call, group, scale=float("nan") if is_odd else 0.2),
    ]
    before = keys(group)
    for length in range(20, 60):
        call(group, length=length, requires_grad=True).sum().backward()
    assert keys(group) - before <= 2 * size
    assert torch.equal(good(group), expected)
    leave(size, group)
    return texts


def test_calls_on_the_cpu_are_compared_first(workers: Processes) -> None:
    first, second, *rest = workers.run(4, call_on_the_cpu)
    assert first[0] == second[0] and rest == [first, first] and "rows of query" in first[0]
    assert "rank 1 refused its arguments: ValueError: scale" in first[1]


def differ_on_gpus(size: int, is_refused: bool) -> list[str]:
    """Only what is compared: nothing travels."""
    group = mixed_group(size)
    comm = Communicator(group.group_name)
    for number in range(20):
        comm.repeat(Fields({"layer": str(number % 3)}), GPU)
    if comm.rank == 1 and is_refused:
        comm.refuse("ValueError: no")
    else:
        comm.repeat(Fields({"layer": "another" if comm.rank == 1 else "4"}), GPU)
    texts = [see(comm.repeat, {"layer": "5"}, GPU) for _ in range(2)]
    leave(size, group)
    return texts


@pytest.mark.parametrize("is_refused", [False, True])
def test_the_next_call_on_gpus_raises(workers: Processes, is_refused: bool) -> None:
    told = workers.run(4, differ_on_gpus, is_refused)
    assert all(texts == told[0] for texts in told)
    for text, begin in zip(told[0], ("", "an earlier call over the group failed: "), strict=True):
        named = "rank 1 refused its arguments" if is_refused else "all ranks of the group"
        assert text.startswith(f"RuntimeError: {begin}{named}")
        assert "ranks had begun the call, so its results are wrong" in text
    if not is_refused:
        assert "layer: 4 on ranks 0, 2, 3, another on rank 1" in told[0][0]


def wait_for_no_one(size: int) -> float:
    """Seconds that a call takes while rank 1 has not come to it."""
    group = mixed_group(size)
    comm = Communicator(group.group_name)
    comm.repeat(Fields({}), GPU)
    if comm.rank == 1:
        time.sleep(1.0)
    begin = time.monotonic()
    comm.repeat(Fields({}), GPU)
    seconds = time.monotonic() - begin
    leave(size, group)
    return seconds


def test_a_call_on_gpus_does_not_wait_for_the_others(workers: Processes) -> None:
    assert max(workers.run(4, wait_for_no_one)) < 0.5
