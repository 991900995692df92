"""Rows of pieces, packed one after the other into a flat tensor, and put back."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import lru_cache

import torch
from torch import Tensor

from ... import ops
from ..plans.lattice import Piece

Origin = tuple[int, int]  # position of row 0 and number of head 0 of a tensor [B, N, H, D]


def count_rows(*pieces: Iterable[Piece]) -> int:
    """Rows of all these pieces for one batch entry."""
    return sum(piece.rows for some in pieces for piece in some)


class Packet:
    """A flat tensor that is written, or read, from its beginning to its end.

    Writer and reader name the same pieces in the same order.
    """

    def __init__(self, data: Tensor, batch: int) -> None:
        self.data, self._batch, self._at = data, batch, 0

    @staticmethod
    def empty(rows: int, batch: int, head_dim: int, like: Tensor) -> Packet:
        """Room for so many rows, with the dtype and on the device of `like`."""
        return Packet(like.new_empty(batch * rows * head_dim), batch)

    def next(self, piece: Piece, head_dim: int) -> Tensor:
        """[batch, slots, heads, head_dim], the part of the data that comes next."""
        begin = self._at
        self._at += self._batch * piece.rows * head_dim
        shape = (self._batch, piece.slots, piece.heads, head_dim)
        return self.data[begin : self._at].view(shape)

    def put(self, rows: Tensor, pieces: Sequence[Piece], origin: Origin) -> None:
        """Writes the pieces of `rows`."""
        for piece in pieces:
            gather_piece(self.next(piece, rows.size(3)), rows, piece, origin)

    def put_once(
        self, rows: Tensor, pieces: Sequence[Piece], repeated: Sequence[bool], origin: Origin
    ) -> None:
        """As `put`, but a row of several pieces goes into the first; the others get zeros.

        Clears such rows of `rows`. repeated: whether a piece has rows that are in a later one too.
        """
        for piece, is_repeated in zip(pieces, repeated, strict=True):
            packed = self.next(piece, rows.size(3))
            gather_piece(packed, rows, piece, origin)
            if is_repeated:
                scatter_piece(rows, torch.zeros_like(packed), piece, origin)

    def take(
        self, rows: Tensor, pieces: Sequence[Piece], origin: Origin, *, accumulate: bool = False
    ) -> None:
        """Copies the pieces to where they belong in `rows`, or adds them there."""
        for piece in pieces:
            packed = self.next(piece, rows.size(3))
            scatter_piece(rows, packed, piece, origin, accumulate=accumulate)


def gather_piece(packed: Tensor, rows: Tensor, piece: Piece, origin: Origin) -> None:
    """packed [B, slots, heads, D] <- the piece's rows of a tensor that begins at `origin`."""
    ops.gather_into(
        packed,
        _window(rows, piece, origin),
        piece.end,
        piece.rate,
        head_offsets=_offsets(piece.residues, piece.rate),
        start=piece.begin,
    )


def scatter_piece(
    rows: Tensor, packed: Tensor, piece: Piece, origin: Origin, *, accumulate: bool = False
) -> None:
    """The piece's rows of a tensor that begins at `origin` <- packed, or += packed."""
    ops.scatter_into(
        _window(rows, piece, origin),
        packed,
        piece.end,
        piece.rate,
        head_offsets=_offsets(piece.residues, piece.rate),
        start=piece.begin,
        accumulate=accumulate,
    )


def _window(rows: Tensor, piece: Piece, origin: Origin) -> Tensor:
    position, head = origin
    heads = rows[:, :, piece.first_head - head : piece.first_head - head + piece.heads]
    return heads[:, piece.begin - position : piece.end - position]


@lru_cache(maxsize=1024)
def _offsets(residues: tuple[int, ...], rate: int) -> Tensor | None:
    """As gather takes them: in one segment that begins at position 0, offsets are residues."""
    if all(residue == head % rate for head, residue in enumerate(residues)):
        return None
    return torch.tensor(residues, dtype=torch.int64, device="cpu")
