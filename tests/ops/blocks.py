"""Attention in blocks: queries and keys cut to pieces, every pair of pieces a call of
attention_block, the results continued and the gradients summed.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from tests.ops.calls import Result, Tensors, output_gradients

Piece = tuple[int, int]
# What a block gets in place of key and value: (tensors, queries, keys) -> (query, key, value).
Select = Callable[[Tensors, Piece, Piece], Tensors]


def pieces(length: int, cuts: Sequence[int]) -> list[Piece]:
    """(begin, end) between neighbouring cuts; equal cuts give empty pieces."""
    edges = [0, *sorted(cuts), length]
    return list(zip(edges, edges[1:], strict=False))


def random_cuts(length: int, rng: random.Random) -> list[int]:
    """Up to five, some of them equal, some at the ends."""
    cuts = [rng.randint(0, length) for _ in range(rng.randint(0, 4))]
    return cuts + rng.choice([[], [0], [length], cuts[:1]])


def make_query_sums(query: Tensor) -> Tensor:
    """Zeros for grad_query."""
    batch, rows, heads, head_dim = query.shape
    dtype = torch.float64 if query.dtype == torch.float64 else torch.float32
    return query.new_zeros(batch, heads, rows, -(-head_dim // 16) * 16, dtype=dtype)


def select_rows(tensors: Tensors, queries: Piece, keys: Piece) -> Tensors:
    query, key, value = tensors
    return query[:, slice(*queries)], key[:, slice(*keys)], value[:, slice(*keys)]


def forward_in_blocks(
    tensors: Tensors,
    branches: tuple[Sequence[int], Sequence[int]],
    queries: Piece,
    key_pieces: Sequence[Piece],
    *,
    select: Select = select_rows,
    **options: Any,
) -> tuple[Tensor, Tensor]:
    """out and lse of one piece of queries, over the key pieces in the order given."""
    seq_len = tensors[0].shape[1]
    running: dict[str, Tensor] = {}
    for i, keys in enumerate(key_pieces):
        out, lse = torch.ops.dilated.attention_block(
            *select(tensors, queries, keys),
            seq_len,
            queries[0],
            keys[0],
            *branches,
            **running,
            **options,
            partial=i + 1 < len(key_pieces),
        )
        running = {"out": out, "lse": lse}
    return running["out"], running["lse"]


def backward_in_blocks(
    tensors: Tensors,
    branches: tuple[Sequence[int], Sequence[int]],
    forward: tuple[Tensor, Tensor],
    blocks: Sequence[tuple[Piece, Piece]],
    *,
    select: Select = select_rows,
    in_place: bool = False,
    **options: Any,
) -> list[Tensor]:
    """The gradients, summed over (queries, keys) in the order given, in the dtype of the shares.

    in_place: the blocks of the same queries add grad_query up by themselves.
    """
    out, lse = forward
    grad_out, grad_lse = output_gradients(tensors[0])
    sums = [torch.zeros_like(x, dtype=lse.dtype) for x in tensors]
    query_sums = {queries: make_query_sums(tensors[0][:, slice(*queries)]) for queries, _ in blocks}
    for queries, keys in blocks:
        rows = slice(*queries)
        block = (
            grad_out[:, rows],
            grad_lse[:, :, rows],
            *select(tensors, queries, keys),
            out[:, rows],
            lse[:, :, rows],
            tensors[0].shape[1],
            queries[0],
            keys[0],
            *branches,
        )
        if in_place:
            into = torch.ops.dilated.attention_block_backward_into
            shares = (None, *into(query_sums[queries], *block, **options))
        else:
            backward = torch.ops.dilated.attention_block_backward
            shares = backward(*block, **options, partial=True)
        for total, share, piece in zip(sums, shares, (queries, keys, keys), strict=True):
            if share is not None:
                assert share.dtype == total.dtype
                total[:, slice(*piece)] += share
    if in_place:
        for queries, running in query_sums.items():
            rows = slice(*queries)
            sums[0][:, rows] = torch.ops.dilated.round_query_sums(
                running, tensors[0][:, rows], scale=options.get("scale")
            )
    return sums


def run_in_blocks(
    tensors: Tensors,
    segment_lengths: Sequence[int],
    dilation_rates: Sequence[int],
    query_cuts: Sequence[int],
    key_cuts: Sequence[int],
    *,
    seed: int = 0,
    in_place: bool = False,
    **options: Any,
) -> Result:
    """What calls.run_operator gives, from blocks in a random order; gradients in lse's dtype."""
    rng = random.Random(seed)
    branches = (segment_lengths, dilation_rates)
    seq_len = tensors[0].shape[1]
    key_pieces = pieces(seq_len, key_cuts)
    query_pieces = pieces(seq_len, query_cuts)
    results = [
        forward_in_blocks(
            tensors, branches, queries, rng.sample(key_pieces, len(key_pieces)), **options
        )
        for queries in query_pieces
    ]
    out = torch.cat([out for out, _ in results], 1)
    lse = torch.cat([lse for _, lse in results], 2)
    blocks = [(queries, keys) for queries in query_pieces for keys in key_pieces]
    rng.shuffle(blocks)
    grads = backward_in_blocks(tensors, branches, (out, lse), blocks, in_place=in_place, **options)
    return Result(out, lse, *grads)
