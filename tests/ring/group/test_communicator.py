"""What the benchmark compares computes the same thing, on every rank."""

from __future__ import annotations

import pytest
import torch

from benchmarks.peers.calls import Inputs
from benchmarks.peers.ring import SINGLE, Case, prepare, without_exchange
from benchmarks.workloads import Workload
from dilated_attention_pytorch.ring import traffic
from dilated_attention_pytorch.ring.plans.layout import shards
from tests.ring.processes import Processes, group_of

WORKLOAD = Workload("tiny", "ring", 64, 4, 16, (8, 32, 64), (1, 2, 4))


def compare(size: int, name: str, is_causal: bool) -> None:
    group = group_of(size)
    inputs = Inputs(*(x.double() for x in Inputs.make(WORKLOAD, torch.device("cpu")).all))
    case = Case(WORKLOAD, is_causal, inputs, group)
    begin, end = shards(case.shard_lengths)[group.rank()]
    alone, peer = prepare(SINGLE, case), prepare(name, case)
    torch.testing.assert_close(peer.forward(), alone.forward()[:, begin:end])
    for ours, theirs in zip(peer.both(), alone.both(), strict=True):
        torch.testing.assert_close(ours, theirs[:, begin:end])
    assert peer.sent() > 0 and alone.sent() == 0
    if name == "ring":
        before = traffic(group).bytes_sent
        with without_exchange():
            peer.both()
        assert traffic(group).bytes_sent == before


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("name", ["auto", "ring", "gather", "all_to_all", "all-gather"])
def test_peers_equal_one_rank(workers: Processes, name: str, is_causal: bool) -> None:
    workers.run(4, compare, name, is_causal)
