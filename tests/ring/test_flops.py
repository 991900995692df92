"""torch's FlopCounterMode over a ring: the ranks' counts add up to those of the whole sequence."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch.utils.flop_counter import FlopCounterMode

from dilated_attention_pytorch import dilated_attention
from tests.conftest import make_qkv
from tests.ring.processes import Processes, group_of

BRANCHES = ([16, 40], [1, 2])
SHARDS = [30, 10, 24]


def count(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    group: dist.ProcessGroup | None,
    lengths: list[int] | None,
) -> tuple[int, int]:
    """Operations of the forward, and of the backward."""
    query.requires_grad_()
    with FlopCounterMode(display=False) as forward:
        out = dilated_attention(
            query, key, value, *BRANCHES, is_causal=True, group=group, shard_lengths=lengths
        )
    with FlopCounterMode(display=False) as backward:
        out.sum().backward()
    return forward.get_total_flops(), backward.get_total_flops()


def count_shard(size: int, lengths: list[int] | None) -> tuple[int, int]:
    group = group_of(size)
    parts = lengths or [64 // size] * size
    rows = [x.split(parts, 1)[group.rank()].contiguous() for x in make_qkv(64, 4, 8, kv_heads=2)]
    return count(rows[0], rows[1], rows[2], group, lengths)


@pytest.mark.parametrize("lengths", [SHARDS, None])
def test_ranks_add_up_to_the_whole(workers: Processes, lengths: list[int] | None) -> None:
    size = 3 if lengths else 2
    whole = count(*make_qkv(64, 4, 8, kv_heads=2), None, None)
    counts = workers.run(size, count_shard, lengths)
    assert tuple(map(sum, zip(*counts, strict=True))) == whole
    assert min(whole) > 0
