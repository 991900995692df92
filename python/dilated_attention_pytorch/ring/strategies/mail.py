"""Several tensors' pieces to and from several peers at once: one packet for each peer and dtype."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..group.communicator import Communicator
from ..plans.lattice import Piece
from .packing import Origin, Packet, count_rows


@dataclass(frozen=True, slots=True)
class Item:
    """Pieces of a tensor [B, N, heads, D] whose first row and head are `origin`."""

    rows: Tensor
    pieces: Sequence[Piece]
    origin: Origin


@dataclass(frozen=True, slots=True)
class Expected:
    """Pieces to come, of a tensor with the dtype, batch and head_dim of `like`."""

    like: Tensor
    pieces: Sequence[Piece]


class Mail:
    """Posted at construction. After `wait`, the pieces are read in the order of `incoming`."""

    def __init__(
        self,
        comm: Communicator,
        outgoing: Mapping[int, Sequence[Item]],
        incoming: Mapping[int, Sequence[Expected]],
    ) -> None:
        sends, receives = [], []
        for peer, items in outgoing.items():
            packets = _packets([Expected(item.rows, item.pieces) for item in items])
            for item in items:
                packets[item.rows.dtype].put(item.rows, item.pieces, item.origin)
            sends += [(peer, packet.data) for packet in packets.values()]
        self._packets = {peer: _packets(expected) for peer, expected in incoming.items()}
        for peer, packets in self._packets.items():
            receives += [(peer, packet.data) for packet in packets.values()]
        self._transfer = comm.exchange(
            [message for message in sends if message[1].numel() > 0],
            [message for message in receives if message[1].numel() > 0],
        )

    def wait(self) -> None:
        self._transfer.wait()

    def next(self, peer: int, piece: Piece, like: Tensor) -> Tensor:
        """The next piece of the peer's, packed, [B, slots, heads, D]."""
        return self._packets[peer][like.dtype].next(piece, like.size(3))

    def take(
        self,
        peer: int,
        rows: Tensor,
        pieces: Sequence[Piece],
        origin: Origin,
        *,
        accumulate: bool = False,
    ) -> None:
        """Puts, or adds, the peer's next pieces where they belong in `rows`."""
        packet = self._packets[peer][rows.dtype]
        packet.take(rows, pieces, origin, accumulate=accumulate)


def _packets(contents: Sequence[Expected]) -> dict[torch.dtype, Packet]:
    """Empty packets with room for all, in an order that sender and receiver agree on."""
    sizes: dict[torch.dtype, int] = {}
    for content in contents:
        batch, _, _, head_dim = content.like.shape
        size = batch * count_rows(content.pieces) * head_dim
        sizes[content.like.dtype] = sizes.get(content.like.dtype, 0) + size
    return {
        dtype: Packet(contents[0].like.new_empty(size, dtype=dtype), contents[0].like.size(0))
        for dtype, size in sizes.items()
    }
