"""What torch's FlopCounterMode counts for the operators: each pair of positions once.

A pair costs two products of head_dim, four operations each, forward; five products backward, the
scores' recomputation among them, as torch counts its own attention. How many branches hold the pair
plays no part. segment_attention is counted as what it is composed of.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._subclasses import FakeTensor
from torch.utils.flop_counter import register_flop_formula

from ..pattern import HeadOffsets, Pattern, PatternSpec, Sequences, make_branches
from ..pattern.offsets import normalize_head_offsets
from ..pattern.pattern import QueryRows

_dilated = torch.ops.dilated
_FORWARD, _BACKWARD = 2, 5  # products of head_dim a pair
Stretches = tuple[int, ...]  # begin, end, begin, end, ...


class Block(NamedTuple):
    """Positions within a sequence, as PatternSpec has them."""

    seq_len: int
    queries: Stretches
    keys: Stretches
    far_keys: Stretches = ()
    rows: QueryRows = "all"


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
    block = block or Block(rows, (0, rows), (0, rows))
    lengths = [int(length) for length in lengths]
    table: HeadOffsets | None = options.get("head_offsets")
    if table is None or isinstance(table, FakeTensor):  # one without data counts as the default
        table = "interleaved"
    sequences = options.get("sequences")
    if isinstance(sequences, FakeTensor):  # likewise: as one that has all rows
        sequences = None
    spec = PatternSpec(
        block.seq_len,
        make_branches(lengths, rates),
        normalize_head_offsets(table, rates),
        heads,
        int(key.shape[2]),
        options.get("is_causal", False),
        queries=block.queries,
        keys=block.keys,
        far_keys=block.far_keys,
        rows=block.rows,
        directions="forward",
        sequences=None if sequences is None else Sequences(sequences),
    )
    return batch * 2 * head_dim * products * _distinct(spec)


# What a call computes a part of; None: all of the sequence that its query holds.
BlockOf = Callable[[dict[str, Any]], Block | None]


def _block_of(call: dict[str, Any]) -> Block:
    queries = _stretches(call["queries"], call["query"])
    return Block(int(call["seq_len"]), queries, _stretches(call["keys"], call["key"]))


def _into_block_of(call: dict[str, Any]) -> Block:
    far_keys = _stretches(call["far_keys"], call["far_key"])
    return _block_of(call)._replace(far_keys=far_keys, rows=call.get("rows", "all"))


def _stretches(given: int | Sequence[int], rows: Tensor | None) -> Stretches:
    """As the operators take them, with the last end."""
    numbers = [given] if isinstance(given, int) else [int(number) for number in given]
    if len(numbers) % 2 and rows is not None:
        pairs = zip(numbers[:-1:2], numbers[1::2], strict=True)
        numbers.append(numbers[-1] + int(rows.shape[1]) - sum(end - begin for begin, end in pairs))
    return tuple(numbers)


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
_register(_dilated.attention_block_into, _FORWARD, _into_block_of)
_register(_dilated.attention_block_backward, _BACKWARD, _block_of)
_register(_dilated.attention_block_backward_into, _BACKWARD, _block_of)


def register_ring_flops(block_of: BlockOf) -> None:
    """block_of: what a rank computes, from its call's arguments by name."""
    _register(_dilated.ring_attention, _FORWARD, block_of)
    _register(_dilated.ring_attention_backward, _BACKWARD, block_of)
