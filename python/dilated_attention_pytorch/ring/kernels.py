"""The kernels of torch.ops.dilated.ring_attention and its backward, on CPU and CUDA.

The first call of each kind checks the arguments and plans all blocks. The ranks compare every call;
then a strategy runs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from ..ops.ring_attention import register_ring_attention
from ..pattern import Directions, Sequences
from .arguments import (
    Arguments,
    check_call,
    check_results,
    check_tables,
    fields_of,
    identity_of,
    make_call,
)
from .group.agreement import Fields
from .group.communicator import Communicator
from .strategies.all_to_all import all_to_all_backward, all_to_all_forward, plan_all_to_all
from .strategies.call import Call, Gradients, Results, Running, wide_dtype
from .strategies.ring import plan_ring, ring_backward, ring_forward


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
    """The call, agreed on by the ranks. It is checked and planned before any message is posted."""
    comm = Communicator(arguments.group_name)
    with comm.refusing():
        sequences = check_tables(arguments)
        is_differentiated = any(x.requires_grad for x in (query, key, value))
        reads: Directions = "both" if name == "backward" or is_differentiated else "forward"
        kind = (*identity_of(query, key, value, arguments, sequences), reads)
        known: _Known | None = comm.agreed(kind)
        is_new = known is None
        if known is None:
            known = _check_and_plan(query, key, value, arguments, sequences, reads, comm)
        if results is not None:
            check_results(query, results)
    if is_new:
        largest = partial(_largest, known.call, query, comm.size)
        weight = 1 if sequences is None else 1 + len(sequences) // 64
        comm.agree(kind, known, known.fields[name], query.device, largest, weight)
    else:
        comm.repeat(known.fields[name], query.device)
    return comm, known.call


def _check_and_plan(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    arguments: Arguments,
    sequences: Sequences | None,
    reads: Directions,
    comm: Communicator,
) -> _Known:
    """Raises ValueError for whatever is wrong with the call."""
    check_call(query, key, value, arguments, comm.rank, comm.size)
    call = make_call(query, key, arguments, sequences, reads, comm.size)
    plan = plan_all_to_all if call.strategy == "all_to_all" else plan_ring
    plan(call, comm.rank)
    fields = fields_of(query, key, value, arguments, sequences)
    return _Known(call, {name: Fields({"call": name} | fields) for name in ("forward", "backward")})


def _device_of(query: Tensor) -> AbstractContextManager[object]:
    """Makes the tensors' GPU the current one, whose streams the exchange waits for."""
    return torch.cuda.device(query.device) if query.is_cuda else nullcontext()


def _largest(call: Call, query: Tensor, size: int) -> int:
    """Bytes of the largest parcel of keys and values, or of their gradients, of any rank."""
    if call.strategy == "all_to_all":
        return 0
    plans = map(call.plan_of, range(size))
    parcels = (parcel for plan in plans for r in plan.rounds for parcel in r.sends)
    rows = max((parcel.rows for parcel in parcels), default=0)
    return 2 * rows * query.size(0) * query.size(3) * wide_dtype(query.dtype).itemsize


library = register_ring_attention(forward, backward)
