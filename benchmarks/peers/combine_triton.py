"""One pass that puts the outputs of many strided attention calls together: weighted, or summed.

On the GPU; imported there only. A program handles BLOCK rows of one head. In each branch a head
belongs to at most one piece, so a program first finds its piece's tensor, then reads the rows that
are in it: masked loads, one a branch. Triton hands no constants through structures, hence META.
"""

# No "from __future__ import annotations": Triton reads the annotations.
import math
from collections.abc import Sequence

import torch
import triton  # type: ignore[import-not-found, import-untyped, unused-ignore]
import triton.language as tl  # type: ignore[import-not-found, import-untyped, unused-ignore]
from torch import Tensor

from .views import Piece


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def _find_piece(  # type: ignore[no-untyped-def]
    parts, lses, head, META: tl.constexpr, FIRST: tl.constexpr, END: tl.constexpr
):
    """The piece among FIRST .. END - 1 that holds the head: offset (-1: none), strides, addresses.

    The addresses are those of the head's first row.
    """
    offset = tl.full([], -1, tl.int32)
    strides = (tl.full([], 0, tl.int64), tl.full([], 0, tl.int64))
    lse_strides = (tl.full([], 0, tl.int64), tl.full([], 0, tl.int64))
    part = parts[FIRST].to(tl.int64)
    lse = lses[FIRST].to(tl.int64)
    part_bytes: tl.constexpr = parts[FIRST].dtype.element_ty.primitive_bitwidth // 8
    for i in tl.static_range(FIRST, END):
        index = (head - META[i][3]) // META[i][5]
        mine = (head >= META[i][3]) & (head < META[i][4])
        mine &= (head - META[i][3]) % META[i][5] == 0
        offset = tl.where(mine, META[i][2], offset)
        strides = tl.where(mine, META[i][6], strides[0]), tl.where(mine, META[i][7], strides[1])
        lse_strides = (
            tl.where(mine, META[i][9], lse_strides[0]),
            tl.where(mine, META[i][11], lse_strides[1]),
        )
        here = parts[i].to(tl.int64) + index * META[i][8] * part_bytes
        part = tl.where(mine, here, part)
        lse = tl.where(mine, lses[i].to(tl.int64) + index * META[i][10] * 4, lse)
    return offset, strides, lse_strides, part, lse


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]
def combine_kernel(  # type: ignore[no-untyped-def]
    parts,  # tuple of [segments, rows, heads, D]
    lses,  # tuple of [segments, heads, rows] float32; not read unless WEIGHTED
    out,  # [B, N, H, D], contiguous
    lse,  # [B, H, N] float32, contiguous; not written unless WEIGHTED
    seq_len,
    META: tl.constexpr,  # per piece: length, rate, offset, head range (3), strides of part and lse
    BRANCHES: tl.constexpr,  # where each branch's pieces begin, and the number of pieces
    HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    COLUMNS: tl.constexpr,
    BLOCK: tl.constexpr,
    ALIGNMENT: tl.constexpr,  # bytes that divide the address of every row
    WEIGHTED: tl.constexpr,
):
    position = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    batch = tl.program_id(1) // HEADS
    head = tl.program_id(1) % HEADS
    column = tl.arange(0, COLUMNS)
    exists = position < seq_len
    top = tl.full([BLOCK], float("-inf"), tl.float32)
    weights = tl.zeros([BLOCK], tl.float32)
    total = tl.zeros([BLOCK, COLUMNS], tl.float32)
    for b in tl.static_range(len(BRANCHES) - 1):
        offset, strides, lse_strides, part, part_lse = _find_piece(
            parts, lses, head, META, BRANCHES[b], BRANCHES[b + 1]
        )
        inside = position % META[BRANCHES[b]][0]
        segment = batch * (seq_len // META[BRANCHES[b]][0]) + position // META[BRANCHES[b]][0]
        row = inside // META[BRANCHES[b]][1]
        mine = exists & (inside % META[BRANCHES[b]][1] == offset)
        mask = mine[:, None] & (column < HEAD_DIM)[None, :]
        place = segment * strides[0] + row * strides[1]
        pointer = part.to(tl.pointer_type(out.dtype.element_ty), bitcast=True)
        # Addresses were integers: the compiler has to be told that rows are aligned.
        pointers = tl.multiple_of(pointer + place[:, None] + column[None, :], (1, ALIGNMENT))
        values = tl.load(pointers, mask=mask, other=0.0)
        if WEIGHTED:
            place = segment * lse_strides[0] + row * lse_strides[1]
            pointer = part_lse.to(tl.pointer_type(tl.float32), bitcast=True)
            value_lse = tl.load(pointer + place, mask=mine, other=float("-inf"))
            above = tl.maximum(top, value_lse)
            safe = tl.where(above == float("-inf"), 0.0, above)
            keep = tl.exp(top - safe)
            weight = tl.exp(value_lse - safe)
            total = total * keep[:, None] + weight[:, None] * values.to(tl.float32)
            weights = weights * keep + weight
            top = above
        else:
            total += values.to(tl.float32)
    if WEIGHTED:
        total = total / tl.where(weights > 0, weights, 1.0)[:, None]
        place = (batch * HEADS + head).to(tl.int64) * seq_len + position
        tl.store(lse + place, top + tl.log(weights), mask=exists)
    place = ((batch.to(tl.int64) * seq_len + position) * HEADS + head) * HEAD_DIM
    mask = exists[:, None] & (column < HEAD_DIM)[None, :]
    tl.store(out + place[:, None] + column[None, :], total.to(out.dtype.element_ty), mask=mask)


def combine(
    pieces: Sequence[Piece],
    parts: Sequence[Tensor],
    lses: Sequence[Tensor],
    like: Tensor,
    lse: Tensor | None,
) -> Tensor:
    """Every piece read once, every row [B, N, H, D] written once; lse is written if weighted."""
    batch, seq_len, heads, head_dim = like.shape
    assert all(part.stride(-1) == 1 for part in parts)
    out = torch.empty_like(like)
    meta = tuple(
        (x.length, x.rate, x.offset, *x.heads, *part.stride()[:3], *part_lse.stride()[:3])
        for x, part, part_lse in zip(pieces, parts, lses, strict=True)
    )
    branches = [piece.branch for piece in pieces]
    block = 1 << (max(16, 4096 // head_dim).bit_length() - 1)
    combine_kernel[-(-seq_len // block), batch * heads](
        tuple(parts),
        tuple(lses),
        out,
        out if lse is None else lse,
        seq_len,
        META=meta,
        BRANCHES=(*sorted({branches.index(branch) for branch in branches}), len(pieces)),
        HEADS=heads,
        HEAD_DIM=head_dim,
        COLUMNS=max(16, 1 << (head_dim - 1).bit_length()),
        BLOCK=block,
        ALIGNMENT=math.gcd(16, head_dim * out.element_size()),
        WEIGHTED=lse is not None,
    )
    return out
