"""DTensors [batch, seq_len, heads, head_dim], sharded by batch and heads, as this rank's part.

Each head and each batch entry is attended on its own, so no rank needs another's; but which
lattices a head has, and what dropout draws for it, depend on its number among all.
"""

from __future__ import annotations

import sys
from typing import Any, NamedTuple

import torch
from torch import Tensor


class Shards(NamedTuple):
    """rows: this rank's of query, key and value. first_entry, first_head: of query's, in all."""

    rows: tuple[Tensor, ...]
    first_entry: int
    first_head: int
    whole: Any  # query

    def out(self, rows: Tensor) -> Tensor:
        """As a DTensor like query, of these rows."""
        return self._whole(rows, self.whole.shape, self.whole.placements)

    def of_heads(self, numbers: Tensor) -> Tensor:
        """[batch, heads, seq_len], of lse's form, likewise."""
        from torch.distributed.tensor import Shard

        batch, seq_len, heads, _ = self.whole.shape
        heads_at = [Shard(1) if p.is_shard(2) else p for p in self.whole.placements]
        return self._whole(numbers, torch.Size((batch, heads, seq_len)), heads_at)

    def _whole(self, part: Tensor, shape: torch.Size, placements: Any) -> Tensor:
        from torch.distributed.tensor import DTensor

        stride = torch.empty(shape, device="meta").stride()
        made: Tensor = DTensor.from_local(
            part, self.whole.device_mesh, placements, run_check=False, shape=shape, stride=stride
        )
        return made


def is_sharded(*tensors: Tensor) -> bool:
    """Whether one is a DTensor."""
    module = sys.modules.get("torch.distributed.tensor")  # without it there is none
    return module is not None and any(isinstance(x, module.DTensor) for x in tensors)


def shards_of(**tensors: Tensor) -> Shards:
    """Of query, key and, where there is one, value.

    Raises:
        TypeError, ValueError: naming the argument, what must hold and what was given.
    """
    from torch.distributed.tensor import DTensor
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    for name, tensor in tensors.items():
        if not isinstance(tensor, DTensor):
            raise TypeError(
                f"{name} must be a DTensor where another of {', '.join(tensors)} is, "
                f"got {type(tensor).__name__}"
            )
    query: Any = tensors["query"]
    begins = {}
    given: dict[str, Any] = tensors
    for name, x in given.items():
        if any(not (p.is_replicate() or p.is_shard(0) or p.is_shard(2)) for p in x.placements):
            raise ValueError(
                f"{name} must be sharded by batch or heads, Shard(0) or Shard(2), or replicated "
                "(a sequence over several ranks is for group=, without DTensors), "
                f"got {x.placements}"
            )
        if x.device_mesh != query.device_mesh or x.placements != query.placements:
            raise ValueError(
                f"{name} must have query's mesh and placements, {query.device_mesh} and "
                f"{query.placements}, got {x.device_mesh} and {x.placements}"
            )
        size, begin = compute_local_shape_and_global_offset(x.shape, x.device_mesh, x.placements)
        if size[2] == 0:
            raise ValueError(f"{name} must have a head for each rank, got {x.shape[2]}")
        begins[name] = begin
        group = query.shape[2] // x.shape[2]
        local = query.to_local().shape[2]
        if (begins["query"][2], local) != (begin[2] * group, size[2] * group):
            raise ValueError(
                f"{name} must have the heads that query's heads of the rank read, "
                f"{begins['query'][2]} to {begins['query'][2] + local} by {group}, "
                f"got {begin[2]} to {begin[2] + size[2]}"
            )
    first_entry, _, first_head, _ = begins["query"]
    rows = tuple(x.to_local() for x in given.values())
    return Shards(rows, first_entry, first_head, query)
