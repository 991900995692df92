"""What FlopCounterMode counts for a ring: this rank's queries with the keys of all ranks."""

from __future__ import annotations

from typing import Any

from ..ops.flops import Block, register_ring_flops
from .group.process_group import resolve
from .plans.plan import shards


def _block_of(call: dict[str, Any]) -> Block:
    query = call["query"]
    group = resolve(call["group_name"])
    given = call.get("shard_lengths")
    lengths = tuple(given or (int(query.shape[1]),) * group.size())
    return Block(sum(lengths), shards(lengths)[group.rank()], (0, sum(lengths)))


register_ring_flops(_block_of)
