"""The loop: while a rank attends to the keys it has, the next ones travel.

Queries stay; keys and values come from the ranks that have them, straight, in rounds of a plan: one
peer at a time ("ring") or all at once ("gather"). out and lse run through the blocks in float32.
The backward repeats the exchange, and gradients of keys and values return to the ranks that the
rows came from, to be added there in the order of the rounds.
"""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor

from .. import ops
from .block import (
    Call,
    Gradients,
    Results,
    Running,
    attend,
    differentiate,
    differentiate_into,
    query_sums,
)
from .exchange import Peers, Transfer
from .packing import Packet
from .plan import Block, Message, Plan, Round, make_plan


def plan_ring(call: Call, rank: int) -> None:
    """Plans all blocks of a rank; raises ValueError where that can't be done."""
    plan = make_plan(call.spec, call.shard_lengths, rank, call.strategy)
    for keys in (plan.queries, *(block.keys for r in plan.rounds for block in r.blocks)):
        call.plan(plan.queries, keys)


def ring_forward(call: Call, peers: Peers, query: Tensor, key: Tensor, value: Tensor) -> Running:
    """(out in query's dtype, lse) of this rank's rows."""
    plan = make_plan(call.spec, call.shard_lengths, peers.rank, call.strategy)
    own = plan.queries
    if plan.is_alone:
        return attend(call, query, key, value, own, own, partial=False)
    blocks = sum(len(r.blocks) for r in plan.rounds)
    travel = _travel(plan, peers, key, value)
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
    call: Call, peers: Peers, query: Tensor, key: Tensor, value: Tensor, results: Results
) -> Gradients:
    """Gradients of this rank's query, key and value, in their dtype."""
    plan = make_plan(call.spec, call.shard_lengths, peers.rank, call.strategy)
    own = plan.queries
    if plan.is_alone:
        return differentiate(call, query, key, value, results, own, own, partial=False)
    travel = _travel(plan, peers, key, value)
    arriving = next(travel, None)
    sums = query_sums(query)
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
        posted = _Returning(peers, arriving.round, shares, grad_key, own[0])
        if returning is not None:
            returning.add_to(grad_key, grad_value)
        arriving, returning = following, posted
    if returning is not None:
        returning.add_to(grad_key, grad_value)
    grad_query = ops.round_query_sums(sums, query, scale=call.scale)
    return grad_query, grad_key.to(key.dtype), grad_value.to(value.dtype)


def _travel(plan: Plan, peers: Peers, key: Tensor, value: Tensor) -> Iterator[_Arriving]:
    """Posts a round each time it is asked for the next: two are under way at most."""
    for r in plan.rounds:
        yield _Arriving(peers, r, key, value, plan.queries[0])


class _Arriving:
    """A round's keys and values, on their way."""

    def __init__(self, peers: Peers, r: Round, key: Tensor, value: Tensor, begin: int) -> None:
        self.round, self._key = r, key
        sends = []
        for message in r.sends:
            packet = _packet(message, key)
            for rows in (key, value):
                packet.put(rows, message.pieces, (begin, 0))
            sends.append((message.peer, packet.data))
        self._received = {message.peer: _packet(message, key) for message in r.receives}
        receives = [(peer, packet.data) for peer, packet in self._received.items()]
        self._transfer: Transfer = peers.exchange(sends, receives)

    def blocks(self) -> Iterator[tuple[Block, Tensor, Tensor]]:
        """The blocks with their keys and values: [B, positions, Hkv, D], the needed rows only."""
        self._transfer.wait()
        batch, _, heads, head_dim = self._key.shape
        for block in self.round.blocks:
            begin, end = block.keys
            key, value = (self._key.new_empty(batch, end - begin, heads, head_dim) for _ in "kv")
            for message in block.messages:
                packet = self._received.pop(message.peer)
                for rows in (key, value):
                    packet.take(rows, message.pieces, (begin, 0))
            yield block, key, value


class _Returning:
    """Gradients of a round's keys and values, on their way home."""

    def __init__(
        self,
        peers: Peers,
        r: Round,
        shares: list[tuple[Block, Tensor, Tensor]],
        grad_key: Tensor,
        begin: int,
    ) -> None:
        self._messages, self._begin = r.sends, begin
        sends = []
        for block, *far_grads in shares:
            for message in block.messages:
                packet = _packet(message, grad_key)
                for grad in far_grads:
                    packet.put_once(grad, message.pieces, message.repeated, (block.keys[0], 0))
                sends.append((message.peer, packet.data))
        self._received = [_packet(message, grad_key) for message in r.sends]
        receives = [
            (message.peer, packet.data)
            for message, packet in zip(r.sends, self._received, strict=True)
        ]
        self._transfer: Transfer = peers.exchange(sends, receives)

    def add_to(self, grad_key: Tensor, grad_value: Tensor) -> None:
        self._transfer.wait()
        for message, packet in zip(self._messages, self._received, strict=True):
            for grad in (grad_key, grad_value):
                packet.take(grad, message.pieces, (self._begin, 0), accumulate=True)


def _packet(message: Message, like: Tensor) -> Packet:
    """Room for the message's rows of keys and of values, or of their gradients."""
    batch, _, _, head_dim = like.shape
    return Packet.empty(2 * message.rows, batch, head_dim, like)
