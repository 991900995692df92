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

from ..pattern import HeadOffsets, Pattern, PatternSpec, Sequences, make_branches
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
    sequences = options.get("sequences")
    if isinstance(sequences, FakeTensor):  # likewise: as one that has all rows
        sequences = None
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
        sequences=None if sequences is None else Sequences(sequences),
    )
    return batch * 2 * head_dim * products * _distinct(spec)


# What a call computes a part of; None: all of the sequence that its query holds.
BlockOf = Callable[[dict[str, Any]], Block | None]


def _block_of(call: dict[str, Any]) -> Block:
    begins = (int(call["query_begin"]), int(call["key_begin"]))
    rows = (int(call["query"].shape[1]), int(call["key"].shape[1]))
    queries, keys = ((begin, begin + n) for begin, n in zip(begins, rows, strict=True))
    return int(call["seq_len"]), queries, keys


def _register(operator: Any, products: int, block_of: BlockOf) -> None:
    """The formula of an operator, whose arguments are named by its schema."""
    names = [argument.name for argument in operator.default._schema.arguments]

    @register_flop_formula(operator, get_raw=True)
    def formula(*given: Any, out_val: Any = None, **options: Any) -> int:
        call = dict(zip(names, given, strict=False)) | options
        lengths, rates = call["segment_lengths"], call["dilation_rates"]
        return _flops(products, call["query"], call["key"], lengths, rates, call, block_of(call))


_register(_dilated.attention, _FORWARD, lambda call: None)
_register(_dilated.attention_backward, _BACKWARD, lambda call: None)
_register(_dilated.attention_block, _FORWARD, _block_of)
_register(_dilated.attention_block_backward, _BACKWARD, _block_of)
_register(_dilated.attention_block_backward_into, _BACKWARD, _block_of)


def register_ring_flops(block_of: BlockOf) -> None:
    """block_of: what a rank computes, from its call's arguments by name."""
    _register(_dilated.ring_attention, _FORWARD, block_of)
    _register(_dilated.ring_attention_backward, _BACKWARD, block_of)
