"""A call's arguments, and attention over one block of it, with the pattern from the cache."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ... import ops
from ...pattern import Pattern, PatternSpec, current_pattern_cache
from ...pattern.advice import PartOfPattern
from ...pattern.pattern import QueryRows
from ..plans.lattice import Span
from ..plans.layout import Stretches
from ..plans.plan import Plan, make_plan

Running = tuple[Tensor, Tensor]  # out [B, N, H, D] and lse [B, H, N] of the blocks so far
Gradients = tuple[Tensor, Tensor, Tensor]


class Where(NamedTuple):
    """A block's positions, as PatternSpec has them."""

    queries: Stretches
    keys: Stretches
    far_keys: Stretches = ()
    rows: QueryRows = "all"

    def block_of(self, spec: PatternSpec) -> PatternSpec:
        forward_only = self.rows != "all" or self.far_keys
        return spec._replace(
            **self._asdict(), directions="forward" if forward_only else spec.directions
        )


@dataclass(frozen=True, slots=True)
class Call:
    """A ring's call without its rows.

    `spec` is the whole sequence's, or batch's; strategy is never "auto". shard_lengths,
    shard_layout, size: as of `shards`.
    """

    spec: PatternSpec
    shard_lengths: tuple[int, ...]
    strategy: str
    scale: float | None
    dropout_p: float
    dropout_seed: Tensor | None
    shard_layout: str = "contiguous"
    size: int | None = None

    @property
    def has_gaps(self) -> bool:
        """Whether rows are in no sequence, so that no kernel writes their results."""
        sequences = self.spec.sequences
        return sequences is not None and int(sequences.tensor[:, 1].sum()) < self.spec.seq_len

    def plan_of(self, rank: int) -> Plan:
        """The rank's share of strategy "ring" or "gather"."""
        return make_plan(
            self.spec, self.shard_lengths, rank, self.strategy, self.shard_layout, self.size
        )

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

    def plan(self, where: Where) -> None:
        """Puts the block's pattern into the cache. Raises ValueError if it can't be planned."""
        self._look_up(where, torch.device("cpu"))

    def _look_up(self, where: Where, device: torch.device) -> tuple[Pattern, Tensor]:
        with PartOfPattern():
            return current_pattern_cache().lookup(where.block_of(self.spec), device)

    def arguments(self, where: Where, device: torch.device) -> dict[str, Any]:
        """Arguments of the block operators besides tensors of rows, with the cache's pattern."""
        spec = self.spec
        pattern, words = self._look_up(where, device)
        return {
            "seq_len": spec.seq_len,
            "queries": where.queries,
            "keys": where.keys,
            "segment_lengths": [branch.segment_length for branch in spec.branches],
            "dilation_rates": [branch.dilation_rate for branch in spec.branches],
            "head_offsets": pattern.head_offsets,
            "is_causal": spec.is_causal,
            "scale": self.scale,
            "padding": spec.padding,
            "sequences": None if spec.sequences is None else spec.sequences.tensor,
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
    queries: Stretches,
    keys: Stretches,
    *,
    running: Running | None = None,
    partial: bool,
) -> Running:
    """Continues `running` with the keys at positions `keys`; partial: more blocks follow."""
    out, lse = running if running is not None else (None, None)
    arguments = call.arguments(Where(queries, keys), query.device)
    return ops.attention_block(query, key, value, out=out, lse=lse, partial=partial, **arguments)


def make_results(call: Call, query: Tensor) -> Running:
    """Room for out, in query's dtype, and lse of these queries; filled for rows in no sequence."""
    batch, rows, heads, _ = query.shape
    out = torch.empty_like(query, memory_format=torch.contiguous_format)
    lse = query.new_empty(batch, heads, rows, dtype=wide_dtype(query.dtype))
    return (out.zero_(), lse.fill_(-torch.inf)) if call.has_gaps else (out, lse)


def attend_into(
    results: Running,
    call: Call,
    query: Tensor,
    near: tuple[Tensor, Tensor],
    far: tuple[Tensor, Tensor] | None,
    where: Where,
) -> None:
    """Writes the rows that `where` names, over near and far (key, value)."""
    far_key, far_value = (None, None) if far is None else far
    arguments = call.arguments(where, query.device)
    arguments |= {"far_keys": where.far_keys, "rows": where.rows}
    ops.attention_block_into(*results, query, *near, far_key, far_value, **arguments)


def differentiate(
    call: Call,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    results: Results,
    queries: Stretches,
    keys: Stretches,
    *,
    partial: bool,
) -> Gradients:
    """A block's share of the gradients of query, key and value; partial: there are other blocks."""
    tensors = results.with_inputs(query, key, value)
    arguments = call.arguments(Where(queries, keys), query.device)
    return ops.attention_block_backward(*tensors, partial=partial, **arguments)


def differentiate_into(
    grad_query_sums: Tensor,
    call: Call,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    results: Results,
    queries: Stretches,
    keys: Stretches,
) -> tuple[Tensor, Tensor]:
    """Adds the share of grad_query to the sums; returns those of key and value, in wide dtype."""
    tensors = results.with_inputs(query, key, value)
    arguments = call.arguments(Where(queries, keys), query.device)
    return ops.attention_block_backward_into(grad_query_sums, *tensors, **arguments)
