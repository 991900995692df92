"""One pass that puts the outputs of many strided attention calls together: weighted, or summed.

A *piece* is one residue of one branch with the heads that have it as their offset: the output of
one library call, [segments, rows, heads, D]. On the GPU a Triton kernel reads every piece once and
writes every row once; on the CPU the same in plain PyTorch.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..workloads import Workload
from .calls import UnsupportedError


@dataclass(frozen=True, slots=True)
class Piece:
    """Positions p with (p mod length) mod rate == offset, of the heads range(*heads)."""

    branch: int
    length: int
    rate: int
    offset: int
    heads: tuple[int, int, int]

    def rows(self, x: Tensor) -> Tensor:
        """[B, N, H, D] -> a view [B * segments, rows, heads, D]."""
        batch, seq_len, heads, head_dim = x.shape
        segments = batch * (seq_len // self.length)
        x = x.view(segments, self.length // self.rate, self.rate, heads, head_dim)
        return x[:, :, self.offset, slice(*self.heads)]

    def lse_rows(self, lse: Tensor) -> Tensor:
        """[B, H, N] -> a view [B, heads, segments, rows]."""
        batch, heads, seq_len = lse.shape
        shape = (batch, heads, seq_len // self.length, self.length // self.rate, self.rate)
        return lse.view(shape)[:, slice(*self.heads), :, :, self.offset]


def make_pieces(workload: Workload) -> list[Piece]:
    """All pieces of all branches. Raises UnsupportedError where no zero-copy view exists."""
    if workload.key_heads != workload.heads:
        raise UnsupportedError("grouped key heads have no zero-copy view per offset")
    pieces = []
    table = workload.spec(False).offset_table()
    branches = zip(workload.segment_lengths, workload.dilation_rates, table, strict=True)
    for branch, (length, rate, offsets) in enumerate(branches):
        length = min(length, workload.seq_len)
        if workload.seq_len % length or length % rate:
            raise UnsupportedError(
                f"segments of {length} at rate {rate} do not divide {workload.seq_len} tokens"
            )
        for offset in sorted(set(offsets) - {-1}):
            pieces.append(Piece(branch, length, rate, offset, _as_range(offsets, offset)))
    return pieces


def _as_range(offsets: Sequence[int], offset: int) -> tuple[int, int, int]:
    heads = [head for head, mine in enumerate(offsets) if mine == offset]
    step = heads[1] - heads[0] if len(heads) > 1 else 1
    found = range(heads[0], heads[-1] + 1, step)
    if list(found) != heads:
        raise UnsupportedError(f"heads {heads} of one offset are no arithmetic progression")
    return found.start, found.stop, found.step


def merge(
    pieces: Sequence[Piece], outs: Sequence[Tensor], lses: Sequence[Tensor], like: Tensor
) -> tuple[Tensor, Tensor]:
    """Weights by softmax denominators: out [B, N, H, D] like `like`, lse [B, H, N] float32.

    outs: [segments, rows, heads, D]; lses: [segments, heads, rows]; the segments of all batches.
    """
    batch, seq_len, heads, _ = like.shape
    lse = torch.empty((batch, heads, seq_len), dtype=torch.float32, device=like.device)
    if like.is_cuda:
        out = torch.empty_like(like)
        _launch(pieces, outs, lses, out, lse)
        return out, lse
    lse.fill_(-torch.inf)
    for piece, part in zip(pieces, lses, strict=True):
        view = piece.lse_rows(lse)
        view.copy_(view.logaddexp(_by_batch(part, batch)))
    out = torch.zeros_like(like, dtype=torch.float32)
    for piece, rows, part in zip(pieces, outs, lses, strict=True):
        weight = (_by_batch(part, batch) - piece.lse_rows(lse)).exp()
        weight = weight.permute(0, 2, 3, 1).flatten(0, 1)  # [segments, rows, heads]
        piece.rows(out).addcmul_(rows.float(), weight[..., None])
    return out.to(like.dtype), lse


def add(pieces: Sequence[Piece], parts: Sequence[Tensor], like: Tensor) -> Tensor:
    """The sum of the pieces, each where it belongs; rows of no piece are 0."""
    if like.is_cuda:
        total = torch.empty_like(like)
        _launch(pieces, parts, parts, total, None)
        return total
    total = torch.zeros_like(like, dtype=torch.float32)
    for piece, part in zip(pieces, parts, strict=True):
        piece.rows(total).add_(part)
    return total.to(like.dtype)


def _by_batch(lse: Tensor, batch: int) -> Tensor:
    """[B * segments, heads, rows] -> [B, heads, segments, rows]."""
    return lse.reshape(batch, -1, *lse.shape[1:]).transpose(1, 2)


def _branches(pieces: Sequence[Piece]) -> tuple[int, ...]:
    """The index of each branch's first piece, and the number of pieces."""
    branches = [piece.branch for piece in pieces]
    starts = sorted(branches.index(branch) for branch in set(branches))
    return (*starts, len(pieces))


def _launch(
    pieces: Sequence[Piece],
    parts: Sequence[Tensor],
    lses: Sequence[Tensor],
    out: Tensor,
    lse: Tensor | None,
) -> None:
    from .combine_triton import combine_kernel

    batch, seq_len, heads, head_dim = out.shape
    assert all(part.stride(-1) == 1 for part in parts)
    meta = tuple(
        (piece.length, piece.rate, piece.offset, *piece.heads, *part.stride()[:3], *part_lse)
        for piece, part, part_lse in (
            (piece, part, part_lse.stride()[:3])
            for piece, part, part_lse in zip(pieces, parts, lses, strict=True)
        )
    )
    block = 1 << (max(16, 4096 // head_dim).bit_length() - 1)
    grid: tuple[Any, ...] = (-(-seq_len // block), batch * heads)
    combine_kernel[grid](
        tuple(parts),
        tuple(lses),
        out,
        out if lse is None else lse,
        seq_len,
        META=meta,
        BRANCHES=_branches(pieces),
        HEADS=heads,
        HEAD_DIM=head_dim,
        COLUMNS=max(16, 1 << (head_dim - 1).bit_length()),
        BLOCK=block,
        ALIGNMENT=math.gcd(16, head_dim * out.element_size()),
        WEIGHTED=lse is not None,
    )
