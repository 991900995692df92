"""The loop: while a rank attends to the keys it has, the next ones travel.

Queries stay; keys and values come directly from the ranks that hold them, in the plan's rounds: one
peer at a time ("ring") or all at once ("gather"). out and lse run through the blocks in float32.
The backward repeats the exchange and returns the gradients of keys and values to the ranks that the
rows came from, which add them in the order of the rounds.
"""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor

from ... import ops
from ..group.communicator import Communicator
from ..group.transfer import Transfer
from ..plans.plan import Block, Parcel, Plan, Round, make_plan
from .call import (
    Call,
    Gradients,
    Results,
    Running,
    attend,
    differentiate,
    differentiate_into,
)
from .packing import Packet


def plan_ring(call: Call, rank: int) -> None:
    """Plans all blocks of a rank; raises ValueError where that can't be done."""
    plan = make_plan(call.spec, call.shard_lengths, rank, call.strategy)
    for keys in (plan.queries, *(block.keys for r in plan.rounds for block in r.blocks)):
        call.plan(plan.queries, keys)


def ring_forward(
    call: Call, comm: Communicator, query: Tensor, key: Tensor, value: Tensor
) -> Running:
    """(out in query's dtype, lse) of this rank's rows."""
    plan = make_plan(call.spec, call.shard_lengths, comm.rank, call.strategy)
    own = plan.queries
    if plan.is_alone:
        return attend(call, query, key, value, own, own, partial=False)
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


def ring_backward(
    call: Call, comm: Communicator, query: Tensor, key: Tensor, value: Tensor, results: Results
) -> Gradients:
    """Gradients of this rank's query, key and value, in their dtype."""
    plan = make_plan(call.spec, call.shard_lengths, comm.rank, call.strategy)
    own = plan.queries
    if plan.is_alone:
        return differentiate(call, query, key, value, results, own, own, partial=False)
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
        posted = _Returning(comm, arriving.round, shares, grad_key, own[0])
        if returning is not None:
            returning.add_to(grad_key, grad_value)
        arriving, returning = following, posted
    if returning is not None:
        returning.add_to(grad_key, grad_value)
    grad_query = ops.round_query_sums(sums, query, scale=call.scale)
    return grad_query, grad_key.to(key.dtype), grad_value.to(value.dtype)


def _travel(plan: Plan, comm: Communicator, key: Tensor, value: Tensor) -> Iterator[_Arriving]:
    """Posts a round each time the next is asked for: at most two are under way."""
    for r in plan.rounds:
        yield _Arriving(comm, r, key, value, plan.queries[0])


class _Arriving:
    """A round's keys and values, on their way."""

    def __init__(
        self, comm: Communicator, r: Round, key: Tensor, value: Tensor, begin: int
    ) -> None:
        self.round, self._key = r, key
        sends = []
        for parcel in r.sends:
            packet = _packet(parcel, key)
            for rows in (key, value):
                packet.put(rows, parcel.pieces, (begin, 0))
            sends.append((parcel.peer, packet.data))
        self._received = {parcel.peer: _packet(parcel, key) for parcel in r.receives}
        receives = [(peer, packet.data) for peer, packet in self._received.items()]
        self._transfer: Transfer = comm.exchange(sends, receives)

    def blocks(self) -> Iterator[tuple[Block, Tensor, Tensor]]:
        """The blocks with their keys and values: [B, positions, Hkv, D], the needed rows only."""
        self._transfer.wait()
        batch, _, heads, head_dim = self._key.shape
        for block in self.round.blocks:
            begin, end = block.keys
            key, value = (self._key.new_empty(batch, end - begin, heads, head_dim) for _ in "kv")
            for parcel in block.parcels:
                packet = self._received.pop(parcel.peer)
                for rows in (key, value):
                    packet.take(rows, parcel.pieces, (begin, 0))
            yield block, key, value


class _Returning:
    """Gradients of a round's keys and values, on their way home."""

    def __init__(
        self,
        comm: Communicator,
        r: Round,
        shares: list[tuple[Block, Tensor, Tensor]],
        grad_key: Tensor,
        begin: int,
    ) -> None:
        self._parcels, self._begin = r.sends, begin
        sends = []
        for block, *far_grads in shares:
            for parcel in block.parcels:
                packet = _packet(parcel, grad_key)
                for grad in far_grads:
                    packet.put_once(grad, parcel.pieces, parcel.repeated, (block.keys[0], 0))
                sends.append((parcel.peer, packet.data))
        self._received = [_packet(parcel, grad_key) for parcel in r.sends]
        receives = [
            (parcel.peer, packet.data)
            for parcel, packet in zip(r.sends, self._received, strict=True)
        ]
        self._transfer: Transfer = comm.exchange(sends, receives)

    def add_to(self, grad_key: Tensor, grad_value: Tensor) -> None:
        self._transfer.wait()
        for parcel, packet in zip(self._parcels, self._received, strict=True):
            for grad in (grad_key, grad_value):
                packet.take(grad, parcel.pieces, (self._begin, 0), accumulate=True)


def _packet(parcel: Parcel, like: Tensor) -> Packet:
    """Room for the parcel's rows of keys and of values, or of their gradients."""
    batch, _, _, head_dim = like.shape
    return Packet.empty(2 * parcel.rows, batch, head_dim, like)
