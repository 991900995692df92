"""What FlopCounterMode counts for a ring: this rank's queries with the keys of all ranks."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ..ops.flops import Block, register_ring_flops
from .group.process_group import resolve
from .plans.plan import shards


def _block_of(query: Tensor, group_name: str, options: dict[str, Any]) -> Block:
    group = resolve(group_name)
    given = options.get("shard_lengths")
    lengths = tuple(given or (int(query.shape[1]),) * group.size())
    return sum(lengths), shards(lengths)[group.rank()], (0, sum(lengths))


register_ring_flops(_block_of)
