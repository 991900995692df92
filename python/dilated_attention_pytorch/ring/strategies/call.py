"""A call's arguments, and attention over one block of it, with the pattern from the cache."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ... import ops
from ...pattern import Pattern, PatternSpec, current_pattern_cache
from ...pattern.advice import PartOfPattern
from ..plans.lattice import Span

Running = tuple[Tensor, Tensor]  # out [B, N, H, D] and lse [B, H, N] of the blocks so far
Gradients = tuple[Tensor, Tensor, Tensor]


@dataclass(frozen=True, slots=True)
class Call:
    """A ring's call without its rows. `spec` is the whole sequence's; strategy is never "auto"."""

    spec: PatternSpec
    shard_lengths: tuple[int, ...]
    strategy: str
    scale: float | None
    dropout_p: float
    dropout_seed: Tensor | None

    def with_seed(self, dropout_seed: Tensor | None) -> Call:
        """The same with the seed of one call, which the ranks need not agree on."""
        return self if dropout_seed is None else replace(self, dropout_seed=dropout_seed)

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

    def plan(self, queries: Span, keys: Span) -> None:
        """Puts the block's pattern into the cache. Raises ValueError if it can't be planned."""
        self._look_up(queries, keys, torch.device("cpu"))

    def _look_up(self, queries: Span, keys: Span, device: torch.device) -> tuple[Pattern, Tensor]:
        block = self.spec._replace(queries=queries, keys=keys)
        with PartOfPattern():
            return current_pattern_cache().lookup(block, device)

    def arguments(self, queries: Span, keys: Span, device: torch.device) -> dict[str, Any]:
        """Arguments of both block operators besides tensors of rows, with the cache's pattern."""
        spec = self.spec
        pattern, words = self._look_up(queries, keys, device)
        return {
            "seq_len": spec.seq_len,
            "queries": queries,
            "keys": keys,
            "segment_lengths": [branch.segment_length for branch in spec.branches],
            "dilation_rates": [branch.dilation_rate for branch in spec.branches],
            "head_offsets": pattern.head_offsets,
            "is_causal": spec.is_causal,
            "scale": self.scale,
            "padding": spec.padding,
            "dropout_p": self.dropout_p,
            "dropout_seed": self.dropout_seed,
            "pattern": words,
        }


@dataclass(frozen=True, slots=True)
class Results:
    """A forward's results over all blocks, in the query's dtype, and their gradients."""

    out: Tensor
    lse: Tensor
    grad_out: Tensor
    grad_lse: Tensor | None

    def with_inputs(
        self, query: Tensor, key: Tensor, value: Tensor
    ) -> tuple[Tensor, Tensor | None, Tensor, Tensor, Tensor, Tensor, Tensor]:
        """As the operators' backwards take them."""
        return self.grad_out, self.grad_lse, query, key, value, self.out, self.lse


def wide_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of accumulators."""
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
    out, lse = running if running is not None else (None, None)
    arguments = call.arguments(queries, keys, query.device)
    return ops.attention_block(query, key, value, out=out, lse=lse, partial=partial, **arguments)


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
    """A block's share of the gradients of query, key and value; partial: there are other blocks."""
    tensors = results.with_inputs(query, key, value)
    arguments = call.arguments(queries, keys, query.device)
    return ops.attention_block_backward(*tensors, partial=partial, **arguments)


def differentiate_into(
    grad_query_sums: Tensor,
    call: Call,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    results: Results,
    queries: Span,
    keys: Span,
) -> tuple[Tensor, Tensor]:
    """Adds the share of grad_query to the sums; returns those of key and value, in wide dtype."""
    tensors = results.with_inputs(query, key, value)
    arguments = call.arguments(queries, keys, query.device)
    return ops.attention_block_backward_into(grad_query_sums, *tensors, **arguments)
