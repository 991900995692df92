"""A call's arguments, and attention over one block of it, with the pattern from the cache."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .. import ops
from ..pattern import PatternSpec, current_pattern_cache
from .lattice import Span

Running = tuple[Tensor, Tensor]  # out [B, N, H, D] and lse [B, H, N] of the blocks so far
Gradients = tuple[Tensor, Tensor, Tensor]


@dataclass(frozen=True, slots=True)
class Call:
    """All of a ring's call but the rows. `spec` is the whole sequence's; the strategy is chosen."""

    spec: PatternSpec
    shard_lengths: tuple[int, ...]
    strategy: str
    scale: float | None
    dropout_p: float
    dropout_seed: Tensor | None

    def of_branches(self, branches: tuple[int, ...], heads: Span, kv_heads: Span) -> Call:
        """The same for some of the branches and heads."""
        spec = self.spec
        if branches == tuple(range(len(spec.branches))) and heads == (0, spec.heads):
            return self
        table = spec.offset_table()
        part = spec._replace(
            branches=tuple(spec.branches[i] for i in branches),
            head_offsets=tuple(table[i][heads[0] : heads[1]] for i in branches),
            heads=heads[1] - heads[0],
            kv_heads=kv_heads[1] - kv_heads[0],
        )
        return replace(self, spec=part)


@dataclass(frozen=True, slots=True)
class Results:
    """A forward's results over all blocks, in the query's dtype, and their gradients."""

    out: Tensor
    lse: Tensor
    grad_out: Tensor
    grad_lse: Tensor | None


def wide_dtype(dtype: torch.dtype) -> torch.dtype:
    """What is accumulated in."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def attend(
    call: Call,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    queries: Span,
    keys: Span,
    *,
    running: Running | None = None,
    partial: bool,
) -> Running:
    """Continues `running` with the keys at positions `keys`; partial: more blocks follow."""
    words, offsets = _pattern(call, queries, keys, query.device)
    out, lse = running if running is not None else (None, None)
    spec = call.spec
    return ops.attention_block(
        query,
        key,
        value,
        spec.seq_len,
        queries[0],
        keys[0],
        [branch.segment_length for branch in spec.branches],
        [branch.dilation_rate for branch in spec.branches],
        out=out,
        lse=lse,
        head_offsets=offsets,
        is_causal=spec.is_causal,
        scale=call.scale,
        padding=spec.padding,
        dropout_p=call.dropout_p,
        dropout_seed=call.dropout_seed,
        pattern=words,
        partial=partial,
    )


def differentiate(
    call: Call,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    results: Results,
    queries: Span,
    keys: Span,
    *,
    partial: bool,
) -> Gradients:
    """A block's share of the gradients of query, key and value; partial: there are others."""
    words, offsets = _pattern(call, queries, keys, query.device)
    spec = call.spec
    return ops.attention_block_backward(
        results.grad_out,
        results.grad_lse,
        query,
        key,
        value,
        results.out,
        results.lse,
        spec.seq_len,
        queries[0],
        keys[0],
        [branch.segment_length for branch in spec.branches],
        [branch.dilation_rate for branch in spec.branches],
        head_offsets=offsets,
        is_causal=spec.is_causal,
        scale=call.scale,
        padding=spec.padding,
        dropout_p=call.dropout_p,
        dropout_seed=call.dropout_seed,
        pattern=words,
        partial=partial,
    )


def _pattern(
    call: Call, queries: Span, keys: Span, device: torch.device
) -> tuple[Tensor, Tensor | None]:
    spec = call.spec._replace(queries=queries, keys=keys)
    pattern, words = current_pattern_cache().lookup(spec, device)
    return words, pattern.head_offsets
