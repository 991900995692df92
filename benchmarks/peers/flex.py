"""FlexAttention as a peer: tokens in class order, whole blocks, log multiplicities as a bias.

Within the shortest segment, tokens are sorted by their residue modulo the largest rate R. Then the
pairs of 128-token blocks that hold anything hold everything, with one multiplicity, and
FlexAttention skips the others. The order is the same for all heads, so a model can keep its tokens
in it: sorting is not timed.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, unflatten
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from ..workloads import Workload
from .calls import Calls, Inputs, UnsupportedError, autograd_calls

_BLOCK = 128


@dataclass(frozen=True, slots=True)
class ClassOrder:
    """Index n of the sorted sequence <-> position: segment n // base, then residue, then row."""

    base: int
    rate: int

    @staticmethod
    def make(workload: Workload) -> ClassOrder:
        """Raises UnsupportedError where classes are not made of whole blocks."""
        base, rate = min(workload.segment_lengths), max(workload.dilation_rates)
        lengths = [min(length, workload.seq_len) for length in workload.segment_lengths]
        whole = all(workload.seq_len % w == 0 and w % base == 0 for w in lengths)
        whole = whole and all(rate % r == 0 for r in workload.dilation_rates)
        if not whole or base % (rate * _BLOCK):
            raise UnsupportedError(f"tokens can't be sorted into classes of whole {_BLOCK}-blocks")
        return ClassOrder(base, rate)

    def sort(self, x: Tensor) -> Tensor:
        """[B, N, H, D] in the order of positions -> [B, H, N, D] in class order."""
        x = unflatten(x, 1, (-1, self.base // self.rate, self.rate))
        return x.permute(0, 4, 1, 3, 2, 5).flatten(2, 4).contiguous()

    def restore(self, x: Tensor) -> Tensor:
        """The inverse of `sort`."""
        x = unflatten(x, 2, (-1, self.rate, self.base // self.rate))
        return x.permute(0, 2, 4, 3, 1, 5).flatten(1, 3)

    def position(self, index: Tensor) -> Tensor:
        rows = self.base // self.rate
        inside = index % self.base
        return index - inside + inside % rows * self.rate + inside // rows


def multiplicities(workload: Workload, order: ClassOrder, device: torch.device) -> Tensor:
    """int8 [H, blocks, blocks]: branches that hold the pairs of a query block and a key block."""
    first = order.position(torch.arange(0, workload.seq_len, _BLOCK, device=device))
    table = workload.spec(False).offset_table()
    count = torch.zeros((workload.heads, len(first), len(first)), dtype=torch.int8, device=device)
    for (length, rate), offsets in zip(workload.branches, table, strict=True):
        segment = first // length
        same = segment[:, None] == segment[None, :]
        for head, offset in enumerate(offsets):
            mine = first % order.rate % rate == offset
            count[head] += same & mine[:, None] & mine[None, :]
    return count


def _ordered(dense: Tensor) -> tuple[Tensor, Tensor]:
    """bool [H, Q, K] -> how many key blocks each query block has, and their indices first."""
    indices = torch.argsort(dense.to(torch.int8), dim=-1, descending=True, stable=True)
    return dense.sum(-1).to(torch.int32)[None], indices.to(torch.int32)[None].contiguous()


def block_mask(count: Tensor, order: ClassOrder, causal: bool) -> BlockMask:
    """Blocks are whole, but for those of the query's own shortest segment if causal."""
    held = count > 0

    def mask(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        inside = held[head, query // _BLOCK, key // _BLOCK]
        return inside & (order.position(query) >= order.position(key)) if causal else inside

    base = torch.arange(held.size(1), device=held.device) * _BLOCK // order.base
    whole, straddling = held, torch.zeros_like(held)
    if causal:
        whole = held & (base[None, :] < base[:, None])
        straddling = held & (base[None, :] == base[:, None])
    made: BlockMask = BlockMask.from_kv_blocks(
        *_ordered(straddling), *_ordered(whole), BLOCK_SIZE=_BLOCK, mask_mod=mask
    )
    return made


def flex(workload: Workload, causal: bool, inputs: Inputs) -> Calls:
    """Raises UnsupportedError where there is no class order."""
    if workload.key_heads != workload.heads:
        raise UnsupportedError("blocks differ by query head, which grouped key heads do not allow")
    order = ClassOrder.make(workload)
    count = multiplicities(workload, order, inputs.query.device)
    bias, mask = count.clamp(min=1).float().log(), block_mask(count, order, causal)

    def multiply(score: Tensor, batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return score + bias[head, query // _BLOCK, key // _BLOCK]

    attend: Callable[..., Any] = flex_attention
    options: dict[str, Any] = {"score_mod": multiply, "block_mask": mask}
    if inputs.query.is_cuda:
        # The bias is staged like keys and values, and what this torch stages by default is more
        # than an H200's shared memory holds: at a head_dim of 64 everywhere, above in the backward.
        stages = "bwd_num_stages" if workload.head_dim > 64 else "num_stages"
        options["kernel_options"] = {stages: 2}
        torch._dynamo.reset()  # each mask is a compilation of its own, and their number is limited
        attend = torch.compile(flex_attention, dynamic=False)

    def function(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        out: Tensor = attend(query, key, value, **options)
        return out

    ordered = Inputs(*map(order.sort, inputs.all))
    return replace(autograd_calls(function, ordered), restore=order.restore)
