"""A ring call's arguments: their checks, what ranks compare, and the call that strategies run."""

from __future__ import annotations

import hashlib
from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .. import ops
from ..pattern import Directions, Padding, Pattern, PatternSpec, Sequences, make_branches
from ..pattern.bounds import SEQ_LEN_END
from .plans.choose_strategy import Sizes, check_strategy, choose_strategy
from .plans.layout import check_layout, count, equal_lengths, shards, stretches_per_rank
from .strategies.call import Call, Results, wide_dtype


@dataclass(frozen=True, slots=True)
class Arguments:
    """What an operator is called with besides tensors of rows, as the dispatcher hands it over."""

    segment_lengths: Sequence[int]
    dilation_rates: Sequence[int]
    group_name: str
    head_offsets: Tensor | None = None
    is_causal: bool = False
    scale: float | None = None
    padding: Padding = "masked"
    dropout_p: float = 0.0
    dropout_seed: Tensor | None = None
    sequences: Tensor | None = None
    shard_lengths: Sequence[int] | None = None
    strategy: str = "auto"
    shard_layout: str = "contiguous"


def make_call(
    query: Tensor,
    key: Tensor,
    arguments: Arguments,
    sequences: Sequences | None,
    reads: Directions,
    size: int,
) -> Call:
    """The call that strategies run.

    reads: the tables of its patterns that it and its backward read. Raises ValueError if
    the planner refuses the specification.
    """
    batch, rows, heads, head_dim = query.shape
    lengths, layout = arguments.shard_lengths, arguments.shard_layout
    shard_lengths = equal_lengths(rows, size, layout) if lengths is None else tuple(lengths)
    offsets = arguments.head_offsets
    spec = PatternSpec(
        sum(shard_lengths),
        make_branches(arguments.segment_lengths, arguments.dilation_rates),
        "interleaved" if offsets is None else tuple(map(tuple, offsets.tolist())),
        heads,
        key.size(2),
        arguments.is_causal,
        arguments.padding,
        directions=reads,
        sequences=sequences,
    )
    Pattern.check(spec)
    strategy = arguments.strategy
    if strategy == "auto":
        sizes = Sizes(batch * head_dim, query.itemsize, wide_dtype(query.dtype).itemsize)
        has_dropout = arguments.dropout_p > 0
        strategy = choose_strategy(
            spec, shard_lengths, sizes, has_dropout=has_dropout, layout=layout, size=size
        )
    return Call(
        spec,
        shard_lengths,
        strategy,
        arguments.scale,
        arguments.dropout_p,
        None,
        layout,
        size,
    )


def identity_of(
    query: Tensor, key: Tensor, value: Tensor, arguments: Arguments, sequences: Sequences | None
) -> tuple[Hashable, ...]:
    """This rank's key of a kind of call: once agreed on, equal calls need no checks."""
    offsets, seed = arguments.head_offsets, arguments.dropout_seed
    lengths = arguments.shard_lengths
    return (
        *((x.shape, x.dtype, x.device) for x in (query, key, value)),
        tuple(arguments.segment_lengths),
        tuple(arguments.dilation_rates),
        None if offsets is None else (offsets.dtype, offsets.device, str(offsets.tolist())),
        arguments.is_causal,
        arguments.scale,
        arguments.padding,
        arguments.dropout_p,
        None if seed is None else (seed.device, seed.dtype, seed.shape),
        sequences,
        None if lengths is None else tuple(lengths),
        arguments.strategy,
        arguments.shard_layout,
    )


def fields_of(
    query: Tensor, key: Tensor, value: Tensor, arguments: Arguments, sequences: Sequences | None
) -> dict[str, str]:
    """What must be equal on all ranks, by name."""
    offsets = arguments.head_offsets
    fields: dict[str, object] = {
        f"{name} without its rows": (*x.shape[:1], *x.shape[2:])
        for name, x in (("query", query), ("key", key), ("value", value))
    }
    if arguments.shard_lengths is None:
        fields["rows of query (shard_lengths were not given)"] = query.size(1)
    fields |= {
        "dtype": query.dtype,
        "device type": query.device.type,
        "segment_lengths": list(arguments.segment_lengths),
        "dilation_rates": list(arguments.dilation_rates),
        "head_offsets": "interleaved" if offsets is None else offsets.tolist(),
        "is_causal": arguments.is_causal,
        "scale": arguments.scale,
        "padding": arguments.padding,
        "dropout_p": arguments.dropout_p,
        "sequences": _told(sequences),
        "shard_lengths": arguments.shard_lengths and list(arguments.shard_lengths),
        "strategy": arguments.strategy,
        "shard_layout": arguments.shard_layout,
    }
    return {name: str(value) for name, value in fields.items()}


def _told(sequences: Sequences | None) -> str:
    """What ranks compare, which need not see thousands of numbers."""
    if sequences is None:
        return "None"
    digest = hashlib.blake2b(sequences.numbers(), digest_size=8).hexdigest()
    return f"{sequences!r}, hash {digest}"


def check_call(
    query: Tensor, key: Tensor, value: Tensor, arguments: Arguments, rank: int, size: int
) -> None:
    """Raises ValueError with the argument, what must hold and what was given."""
    for name, x in (("key", key), ("value", value), ("dropout_seed", arguments.dropout_seed)):
        if x is not None and x.device != query.device:
            raise ValueError(f"{name}: must be on query's device, {query.device}, got {x.device}")
    fakes = [torch.empty_like(x, device="meta") for x in (query, key, value)]
    seed = arguments.dropout_seed
    ops.attention(
        fakes[0],
        fakes[1],
        fakes[2],
        arguments.segment_lengths,
        arguments.dilation_rates,
        head_offsets=arguments.head_offsets,
        is_causal=arguments.is_causal,
        scale=arguments.scale,
        padding=arguments.padding,
        dropout_p=arguments.dropout_p,
        dropout_seed=None if seed is None else torch.empty_like(seed, device="meta"),
        sequences=arguments.sequences,
    )
    check_strategy(arguments.strategy)
    layout = check_layout(arguments.shard_layout)
    if arguments.strategy == "all_to_all" and layout != "contiguous":
        raise ValueError(
            "shard_layout: must be 'contiguous' with strategy 'all_to_all', which divides causal "
            f"work evenly anyway, got {layout!r}"
        )
    if arguments.strategy == "all_to_all" and arguments.sequences is not None:
        raise ValueError(
            "strategy: must not be 'all_to_all' with sequences, got a batch of "
            f"{arguments.sequences.size(0)}"
        )
    if arguments.strategy == "all_to_all" and arguments.dropout_p > 0:
        raise ValueError(
            "strategy: must not be 'all_to_all' with dropout, which depends on where a head is "
            f"computed, got dropout_p={arguments.dropout_p}"
        )
    lengths = arguments.shard_lengths
    if lengths is None:
        equal_lengths(query.size(1), size, layout)
        return
    check_shard_lengths(lengths, size, layout, is_batch=arguments.sequences is not None)
    check_rows(count(shards(lengths, layout, size)[rank]), query.size(1), rank)


def check_rows(expected: int, given: int, rank: int) -> None:
    """Raises ValueError unless a rank has the rows that shard_lengths say."""
    if given != expected:
        raise ValueError(
            f"query: must have the rows of rank {rank} by shard_lengths, {expected}, got {given}"
        )


def check_tables(arguments: Arguments) -> Sequences | None:
    """The sequences; raises ValueError unless the tables' values can be read here."""
    for name, table in (
        ("head_offsets", arguments.head_offsets),
        ("sequences", arguments.sequences),
    ):
        if table is not None and not table.is_cpu:
            raise ValueError(f"{name}: must be on the CPU, got a table on {table.device}")
    return None if arguments.sequences is None else Sequences(arguments.sequences)


def check_results(query: Tensor, results: Results) -> None:
    """Raises ValueError unless shapes, dtypes and devices are the forward's. Takes 2 us a call."""
    batch, rows, heads, _ = query.shape
    rows_like = (query.shape, query.dtype, query.device)
    lse_like = (torch.Size((batch, heads, rows)), wide_dtype(query.dtype), query.device)
    for name, x, expected in (
        ("grad_out", results.grad_out, rows_like),
        ("out", results.out, rows_like),
        ("lse", results.lse, lse_like),
        ("grad_lse", results.grad_lse, lse_like),
    ):
        if x is not None and (x.shape, x.dtype, x.device) != expected:
            shape, dtype, device = expected
            raise ValueError(
                f"{name}: must be {list(shape)}, {dtype}, on {device}, "
                f"got {list(x.shape)}, {x.dtype}, on {x.device}"
            )


def check_shard_lengths(
    shard_lengths: Sequence[int], size: int, layout: str = "contiguous", *, is_batch: bool = False
) -> None:
    """Raises ValueError unless there is one for each stretch, at least 0, below 2^31 - 1 in all.

    is_batch: of several sequences, the first's and so on.
    """
    each = stretches_per_rank(layout)
    given = len(shard_lengths)
    is_number = given > 0 and given % (each * size) == 0 if is_batch else given == each * size
    if not is_number or min(shard_lengths) < 0:
        number = "one length" if each == 1 else f"{each} lengths"
        raise ValueError(
            f"shard_lengths: must be {number} for each of the group's {size} ranks, at least 0"
            f"{', for one sequence after another' if is_batch else ''}, got {list(shard_lengths)}"
        )
    if sum(shard_lengths) >= SEQ_LEN_END:
        raise ValueError(
            f"shard_lengths: must add up to a seq_len below 2^31 - 1, got {list(shard_lengths)}"
        )
