"""What torch's FlopCounterMode counts for the operators: each pair of positions once.

A pair costs two products of head_dim, four operations each, forward; five products backward, the
scores' recomputation among them, as torch counts its own attention. How many branches hold the pair
plays no part. segment_attention is counted as what it is composed of.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch._subclasses import FakeTensor
from torch.utils.flop_counter import register_flop_formula

from ..pattern import HeadOffsets, Pattern, PatternSpec, make_branches
from ..pattern.offsets import normalize_head_offsets

_dilated = torch.ops.dilated
_FORWARD, _BACKWARD = 2, 5  # products of head_dim a pair
Span = tuple[int, int]
Block = tuple[int, Span, Span]  # seq_len, positions (begin, end) of the queries and of their keys


@lru_cache(maxsize=256)
def _distinct(spec: PatternSpec) -> int:
    return Pattern.plan(spec).report()["distinct"]


def _flops(
    products: int,
    query: Tensor,
    key: Tensor,
    lengths: Sequence[int],
    rates: Sequence[int],
    options: dict[str, Any],
    block: Block | None = None,
) -> int:
    """block: by default the whole sequence."""
    batch, rows, heads, head_dim = map(int, query.shape)
    seq_len, queries, keys = (rows, (0, rows), (0, rows)) if block is None else block
    lengths = [int(length) for length in lengths]
    table: HeadOffsets | None = options.get("head_offsets")
    if table is None or isinstance(table, FakeTensor):  # one without data counts as the default
        table = "interleaved"
    spec = PatternSpec(
        seq_len,
        make_branches(lengths, rates),
        normalize_head_offsets(table, rates),
        heads,
        int(key.shape[2]),
        options.get("is_causal", False),
        queries=queries,
        keys=keys,
        directions="forward",
    )
    return batch * 2 * head_dim * products * _distinct(spec)


def _block(query: Tensor, key: Tensor, seq_len: int, query_begin: int, key_begin: int) -> Block:
    queries = (int(query_begin), int(query_begin) + int(query.shape[1]))
    keys = (int(key_begin), int(key_begin) + int(key.shape[1]))
    return int(seq_len), queries, keys


@register_flop_formula(_dilated.attention, get_raw=True)
def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    segment_lengths: Sequence[int],
    dilation_rates: Sequence[int],
    *,
    out_val: Any = None,
    **options: Any,
) -> int:
    return _flops(_FORWARD, query, key, segment_lengths, dilation_rates, options)


@register_flop_formula(_dilated.attention_backward, get_raw=True)
def attention_backward(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,
    segment_lengths: Sequence[int],
    dilation_rates: Sequence[int],
    *,
    out_val: Any = None,
    **options: Any,
) -> int:
    return _flops(_BACKWARD, query, key, segment_lengths, dilation_rates, options)


@register_flop_formula(_dilated.attention_block, get_raw=True)
def attention_block(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    seq_len: int,
    query_begin: int,
    key_begin: int,
    segment_lengths: Sequence[int],
    dilation_rates: Sequence[int],
    *,
    out_val: Any = None,
    **options: Any,
) -> int:
    block = _block(query, key, seq_len, query_begin, key_begin)
    return _flops(_FORWARD, query, key, segment_lengths, dilation_rates, options, block)


@register_flop_formula(_dilated.attention_block_backward, get_raw=True)
def attention_block_backward(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,
    seq_len: int,
    query_begin: int,
    key_begin: int,
    segment_lengths: Sequence[int],
    dilation_rates: Sequence[int],
    *,
    out_val: Any = None,
    **options: Any,
) -> int:
    block = _block(query, key, seq_len, query_begin, key_begin)
    return _flops(_BACKWARD, query, key, segment_lengths, dilation_rates, options, block)


@register_flop_formula(_dilated.attention_block_backward_into, get_raw=True)
def attention_block_backward_into(grad_query_sums: Tensor, *arguments: Any, **options: Any) -> int:
    return int(attention_block_backward(*arguments, **options))


def register_ring_flops(block_of: Callable[[Tensor, str, dict[str, Any]], Block]) -> None:
    """block_of: what a rank computes, from its query, the group's name and the call's options."""

    @register_flop_formula(_dilated.ring_attention, get_raw=True)
    def ring_attention(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        lengths: Sequence[int],
        rates: Sequence[int],
        group_name: str,
        *,
        out_val: Any = None,
        **options: Any,
    ) -> int:
        block = block_of(query, group_name, options)
        return _flops(_FORWARD, query, key, lengths, rates, options, block)

    @register_flop_formula(_dilated.ring_attention_backward, get_raw=True)
    def ring_attention_backward(
        grad_out: Tensor,
        grad_lse: Tensor | None,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        out: Tensor,
        lse: Tensor,
        lengths: Sequence[int],
        rates: Sequence[int],
        group_name: str,
        *,
        out_val: Any = None,
        **options: Any,
    ) -> int:
        block = block_of(query, group_name, options)
        return _flops(_BACKWARD, query, key, lengths, rates, options, block)
