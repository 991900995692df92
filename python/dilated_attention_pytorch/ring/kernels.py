"""The kernels of torch.ops.dilated.ring_attention and its backward, on CPU and CUDA.

At the first call of each kind the arguments are checked here and all blocks are planned. The ranks
compare each call; then a strategy runs.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from .. import ops
from ..ops.ring_attention import register_ring_attention
from ..pattern import Padding, Pattern, PatternSpec, make_branches
from .group.agreement import Fields
from .group.communicator import Communicator
from .plans.choose_strategy import Sizes, check_strategy, choose_strategy
from .plans.plan import make_plan
from .strategies.all_to_all import all_to_all_backward, all_to_all_forward, plan_all_to_all
from .strategies.call import Call, Gradients, Results, Running, wide_dtype
from .strategies.ring import plan_ring, ring_backward, ring_forward


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
    shard_lengths: Sequence[int] | None = None
    strategy: str = "auto"


def forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    segment_lengths: Sequence[int],
    dilation_rates: Sequence[int],
    group_name: str,
    **options: object,
) -> Running:
    arguments = Arguments(segment_lengths, dilation_rates, group_name, **options)  # type: ignore[arg-type]
    comm, call = _begin("forward", query, key, value, arguments)
    call = call.with_seed(arguments.dropout_seed)
    run = all_to_all_forward if call.strategy == "all_to_all" else ring_forward
    with _device_of(query):
        return run(call, comm, query, key, value)


def backward(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,
    segment_lengths: Sequence[int],
    dilation_rates: Sequence[int],
    group_name: str,
    **options: object,
) -> Gradients:
    arguments = Arguments(segment_lengths, dilation_rates, group_name, **options)  # type: ignore[arg-type]
    results = Results(out, lse, grad_out, grad_lse)
    comm, call = _begin("backward", query, key, value, arguments, results)
    call = call.with_seed(arguments.dropout_seed)
    run = all_to_all_backward if call.strategy == "all_to_all" else ring_backward
    with _device_of(query):
        return run(call, comm, query, key, value, results)


@dataclass(frozen=True, slots=True)
class _Known:
    """What is kept of a kind of call that the ranks agreed on."""

    call: Call
    fields: Mapping[str, Fields]  # to be compared, of the forward and the backward


def _begin(
    name: str,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    arguments: Arguments,
    results: Results | None = None,
) -> tuple[Communicator, Call]:
    """The call as all ranks make it; nothing is posted before it is checked and planned."""
    comm = Communicator(arguments.group_name)
    with comm.refusing():
        _check_offsets(arguments.head_offsets)
        kind = _identity(query, key, value, arguments)
        known: _Known | None = comm.agreed(kind)
        is_new = known is None
        if known is None:
            known = _check_and_plan(query, key, value, arguments, comm)
        if results is not None:
            _check_results(query, results)
    if is_new:
        largest = partial(_largest, known.call, query, comm.size)
        comm.agree(kind, known, known.fields[name], query.device, largest)
    else:
        comm.repeat(known.fields[name], query.device)
    return comm, known.call


def _check_and_plan(
    query: Tensor, key: Tensor, value: Tensor, arguments: Arguments, comm: Communicator
) -> _Known:
    """Raises ValueError for whatever is wrong with the call."""
    _check(query, key, value, arguments, comm)
    call = _make_call(query, key, arguments, comm.size)
    plan = plan_all_to_all if call.strategy == "all_to_all" else plan_ring
    plan(call, comm.rank)
    fields = _fields(query, key, value, arguments)
    return _Known(call, {name: Fields({"call": name} | fields) for name in ("forward", "backward")})


def _device_of(query: Tensor) -> AbstractContextManager[object]:
    """Makes the tensors' GPU the current one, whose streams the exchange waits for."""
    return torch.cuda.device(query.device) if query.is_cuda else nullcontext()


def _largest(call: Call, query: Tensor, size: int) -> int:
    """Bytes of the largest parcel of keys and values, or of their gradients, of any rank."""
    if call.strategy == "all_to_all":
        return 0
    plans = (make_plan(call.spec, call.shard_lengths, rank, call.strategy) for rank in range(size))
    parcels = (parcel for plan in plans for r in plan.rounds for parcel in r.sends)
    rows = max((parcel.rows for parcel in parcels), default=0)
    return 2 * rows * query.size(0) * query.size(3) * wide_dtype(query.dtype).itemsize


def _make_call(query: Tensor, key: Tensor, arguments: Arguments, size: int) -> Call:
    batch, rows, heads, head_dim = query.shape
    lengths = arguments.shard_lengths
    shard_lengths = (rows,) * size if lengths is None else tuple(lengths)
    offsets = arguments.head_offsets
    spec = PatternSpec(
        sum(shard_lengths),
        make_branches(arguments.segment_lengths, arguments.dilation_rates),
        "interleaved" if offsets is None else tuple(map(tuple, offsets.tolist())),
        heads,
        key.size(2),
        arguments.is_causal,
        arguments.padding,
    )
    # No rows: all but the tensors is checked, the offsets by their values.
    Pattern.plan(spec._replace(queries=(0, 0), keys=(0, 0)))
    strategy = arguments.strategy
    if strategy == "auto":
        sizes = Sizes(batch * head_dim, query.itemsize, wide_dtype(query.dtype).itemsize)
        has_dropout = arguments.dropout_p > 0
        strategy = choose_strategy(spec, shard_lengths, sizes, has_dropout=has_dropout)
    return Call(
        spec,
        shard_lengths,
        strategy,
        arguments.scale,
        arguments.dropout_p,
        None,
    )


def _identity(query: Tensor, key: Tensor, value: Tensor, arguments: Arguments) -> Hashable:
    """Equal for calls that need no more checks once one was agreed on: this rank's side of it."""
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
        None if lengths is None else tuple(lengths),
        arguments.strategy,
    )


def _fields(query: Tensor, key: Tensor, value: Tensor, arguments: Arguments) -> dict[str, str]:
    """What has to be equal on all ranks, by name."""
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
        "shard_lengths": arguments.shard_lengths and list(arguments.shard_lengths),
        "strategy": arguments.strategy,
    }
    return {name: str(value) for name, value in fields.items()}


def _check(
    query: Tensor, key: Tensor, value: Tensor, arguments: Arguments, comm: Communicator
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
    )
    check_strategy(arguments.strategy)
    if arguments.strategy == "all_to_all" and arguments.dropout_p > 0:
        raise ValueError(
            "strategy: must not be 'all_to_all' with dropout, which depends on where a head is "
            f"computed, got dropout_p={arguments.dropout_p}"
        )
    lengths = arguments.shard_lengths
    if lengths is not None:
        check_shard_lengths(lengths, comm.size)
        if lengths[comm.rank] != query.size(1):
            raise ValueError(
                f"query: must have shard_lengths[rank] = {lengths[comm.rank]} rows on rank "
                f"{comm.rank}, got {query.size(1)}"
            )


def _check_offsets(offsets: Tensor | None) -> None:
    """Raises ValueError unless the values can be read here."""
    if offsets is not None and not offsets.is_cpu:
        raise ValueError(f"head_offsets: must be on the CPU, got a table on {offsets.device}")


def _check_results(query: Tensor, results: Results) -> None:
    """Raises ValueError unless they are as the forward gives them. At every call: it costs 2 us."""
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


def check_shard_lengths(shard_lengths: Sequence[int], size: int) -> None:
    """Raises ValueError unless there is one for each rank, none negative, below 2^31 - 1 in all."""
    if len(shard_lengths) != size or min(shard_lengths) < 0:
        raise ValueError(
            f"shard_lengths: must be one length for each of the group's {size} ranks, at least 0, "
            f"got {list(shard_lengths)}"
        )
    if sum(shard_lengths) >= 2**31 - 1:
        raise ValueError(
            f"shard_lengths: must add up to less than 2^31 - 1, got {list(shard_lengths)}"
        )


library = register_ring_attention(forward, backward)
