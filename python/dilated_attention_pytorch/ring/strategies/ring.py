"""The loop: while a rank attends to the keys it has, the next ones travel.

Queries stay; keys and values come directly from the ranks that hold them, in the plan's rounds: one
peer at a time ("ring") or all at once ("gather"). In a ring, out and lse run through the blocks in
float32; "gather" computes each row once, over its own and the others' keys together. The backward
repeats the exchange and returns the gradients of keys and values to the ranks that the
rows came from, which add them in the order of the rounds.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from ... import ops
from ..group.communicator import Communicator
from ..group.transfer import Transfer
from ..plans.layout import Stretches, count, halves, holds, place_origin
from ..plans.plan import Block, Parcel, Plan, Round
from .call import (
    Call,
    Gradients,
    Results,
    Running,
    Where,
    attend,
    attend_into,
    differentiate,
    differentiate_into,
    make_results,
)
from .packing import Packet


def plan_ring(call: Call, rank: int) -> None:
    """Plans all blocks of a rank; raises ValueError where that can't be done."""
    plan = call.plan_of(rank)
    own = plan.queries
    blocks = [block.keys for r in plan.rounds for block in r.blocks]
    if call.strategy == "gather" and not plan.is_alone:
        for far in blocks or [()]:
            call.plan(Where(own, own, far, "near"))
            call.plan(Where(own, own, far, "far"))
        own_blocks: tuple[Stretches, ...] = halves(own)
        is_read = call.spec.directions == "both"
    else:
        own_blocks, is_read = (own,), True
    for keys in (*own_blocks, *blocks) if is_read else ():
        call.plan(Where(own, keys))


def ring_forward(
    call: Call, comm: Communicator, query: Tensor, key: Tensor, value: Tensor
) -> Running:
    """(out in query's dtype, lse) of this rank's rows."""
    plan = call.plan_of(comm.rank)
    own = plan.queries
    if plan.is_alone:
        return attend(call, query, key, value, own, own, partial=False)
    if call.strategy == "gather":
        return _gather_forward(call, comm, plan, query, key, value)
    blocks = sum(len(r.blocks) for r in plan.rounds)
    travel = _travel(plan, comm, key, value)
    arriving = next(travel, None)
    running = attend(call, query, key, value, own, own, partial=blocks > 0)
    while arriving is not None:
        following = next(travel, None)
        for block, far_key, far_value in arriving.blocks():
            blocks -= 1
            running = attend(
                call,
                query,
                far_key,
                far_value,
                own,
                block.keys,
                running=running,
                partial=blocks > 0,
            )
        arriving = following
    return running


def _gather_forward(
    call: Call, comm: Communicator, plan: Plan, query: Tensor, key: Tensor, value: Tensor
) -> Running:
    """Rows whose keys are all own while the others' keys travel, then the other rows, once."""
    own, (r,) = plan.queries, plan.rounds
    arriving = _Arriving(comm, r, key, value, own)
    results = make_results(call, query)
    far = r.blocks[0].keys if r.blocks else ()
    attend_into(results, call, query, (key, value), None, Where(own, own, far, "near"))
    for block, far_key, far_value in arriving.blocks():
        where = Where(own, own, block.keys, "far")
        attend_into(results, call, query, (key, value), (far_key, far_value), where)
    return results


def ring_backward(
    call: Call, comm: Communicator, query: Tensor, key: Tensor, value: Tensor, results: Results
) -> Gradients:
    """Gradients of this rank's query, key and value, in their dtype."""
    plan = call.plan_of(comm.rank)
    own = plan.queries
    if plan.is_alone:
        return differentiate(call, query, key, value, results, own, own, partial=False)
    if call.strategy == "gather":
        return _gather_backward(call, comm, plan, query, key, value, results)
    travel = _travel(plan, comm, key, value)
    arriving = next(travel, None)
    sums = ops.make_query_sums(query)
    grad_key, grad_value = differentiate_into(sums, call, query, key, value, results, own, own)
    returning: _Returning | None = None
    while arriving is not None:
        following = next(travel, None)
        shares = []
        for block, far_key, far_value in arriving.blocks():
            far_grads = differentiate_into(
                sums, call, query, far_key, far_value, results, own, block.keys
            )
            shares.append((block, *far_grads))
        posted = _Returning(comm, arriving.round, shares, grad_key)
        if returning is not None:
            returning.add_to((own, grad_key, grad_value))
        arriving, returning = following, posted
    if returning is not None:
        returning.add_to((own, grad_key, grad_value))
    grad_query = ops.round_query_sums(sums, query, scale=call.scale)
    return grad_query, grad_key.to(key.dtype), grad_value.to(value.dtype)


def _gather_backward(
    call: Call,
    comm: Communicator,
    plan: Plan,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    results: Results,
) -> Gradients:
    """Half of the own keys while the others' travel, those, and the other half while their
    gradients return.
    """
    own, (r,) = plan.queries, plan.rounds
    arriving = _Arriving(comm, r, key, value, own)
    sums = ops.make_query_sums(query)
    first, second = halves(own)
    cut = count(first)

    def grads_of(keys: Stretches, key: Tensor, value: Tensor) -> tuple[Stretches, Tensor, Tensor]:
        return keys, *differentiate_into(sums, call, query, key, value, results, own, keys)

    parts = [grads_of(first, key[:, :cut], value[:, :cut])]
    shares = [
        (block, *grads_of(block.keys, far_key, far_value)[1:])
        for block, far_key, far_value in arriving.blocks()
    ]
    returning = _Returning(comm, r, shares, parts[0][1])
    parts.append(grads_of(second, key[:, cut:], value[:, cut:]))
    returning.add_to(*parts)
    grad_key, grad_value = (
        torch.empty_like(x, memory_format=torch.contiguous_format) for x in (key, value)
    )
    for rows, part in zip((slice(cut), slice(cut, None)), parts, strict=True):
        grad_key[:, rows] = part[1]
        grad_value[:, rows] = part[2]
    return ops.round_query_sums(sums, query, scale=call.scale), grad_key, grad_value


def _travel(plan: Plan, comm: Communicator, key: Tensor, value: Tensor) -> Iterator[_Arriving]:
    """Posts a round each time the next is asked for: at most two are under way."""
    for r in plan.rounds:
        yield _Arriving(comm, r, key, value, plan.queries)


class _Arriving:
    """A round's keys and values, on their way."""

    def __init__(
        self, comm: Communicator, r: Round, key: Tensor, value: Tensor, own: Stretches
    ) -> None:
        self.round, self._key = r, key
        sends = []
        for parcel in r.sends:
            packet = _packet(parcel, key)
            for rows in (key, value):
                for piece in parcel.pieces:
                    packet.put(rows, (piece,), place_origin(own, piece))
            sends.append((parcel.peer, packet.data))
        self._received = {parcel.peer: _packet(parcel, key) for parcel in r.receives}
        receives = [(peer, packet.data) for peer, packet in self._received.items()]
        self._transfer: Transfer = comm.exchange(sends, receives)

    def blocks(self) -> Iterator[tuple[Block, Tensor, Tensor]]:
        """The blocks with their keys and values: [B, positions, Hkv, D], the needed rows only."""
        self._transfer.wait()
        batch, _, heads, head_dim = self._key.shape
        for block in self.round.blocks:
            shape = (batch, count(block.keys), heads, head_dim)
            key, value = (self._key.new_empty(shape) for _ in "kv")
            for parcel in block.parcels:
                packet = self._received.pop(parcel.peer)
                for rows in (key, value):
                    for piece in parcel.pieces:
                        packet.take(rows, (piece,), place_origin(block.keys, piece))
            yield block, key, value


class _Returning:
    """Gradients of a round's keys and values, on their way home."""

    def __init__(
        self,
        comm: Communicator,
        r: Round,
        shares: list[tuple[Block, Tensor, Tensor]],
        grad_key: Tensor,
    ) -> None:
        self._parcels = r.sends
        sends = []
        for block, *far_grads in shares:
            for parcel in block.parcels:
                packet = _packet(parcel, grad_key)
                for grad in far_grads:
                    for piece, repeated in zip(parcel.pieces, parcel.repeated, strict=True):
                        origin = place_origin(block.keys, piece)
                        packet.put_once(grad, (piece,), (repeated,), origin)
                sends.append((parcel.peer, packet.data))
        self._received = [_packet(parcel, grad_key) for parcel in r.sends]
        receives = [
            (parcel.peer, packet.data)
            for parcel, packet in zip(r.sends, self._received, strict=True)
        ]
        self._transfer: Transfer = comm.exchange(sends, receives)

    def add_to(self, *parts: tuple[Stretches, Tensor, Tensor]) -> None:
        """parts: own positions, and the gradients of their keys and values."""
        self._transfer.wait()
        for parcel, packet in zip(self._parcels, self._received, strict=True):
            for i in (0, 1):
                for piece in parcel.pieces:
                    own, *grads = next(part for part in parts if holds(part[0], piece))
                    packet.take(grads[i], (piece,), place_origin(own, piece), accumulate=True)


def _packet(parcel: Parcel, like: Tensor) -> Packet:
    """Room for the parcel's rows of keys and of values, or of their gradients."""
    batch, _, _, head_dim = like.shape
    return Packet.empty(2 * parcel.rows, batch, head_dim, like)
