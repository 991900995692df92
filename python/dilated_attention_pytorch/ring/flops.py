"""What FlopCounterMode counts for a ring: this rank's queries with the keys of all ranks."""

from __future__ import annotations

from typing import Any

from ..ops.flops import Block, register_ring_flops
from .group.process_group import resolve
from .plans.layout import equal_lengths, shards


def _block_of(call: dict[str, Any]) -> Block:
    query = call["query"]
    group = resolve(call["group_name"])
    given = call.get("shard_lengths")
    layout = call.get("shard_layout", "contiguous")
    lengths = tuple(given or equal_lengths(int(query.shape[1]), group.size(), layout))
    own = shards(lengths, layout, group.size())[group.rank()]
    return Block(sum(lengths), own, (0, sum(lengths)))


register_ring_flops(_block_of)
