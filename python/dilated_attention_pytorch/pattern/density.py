"""Where the pairs of a pattern lie: how many branches hold a pair, averaged over cells."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .branch import Branch, clip


def pair_density(
    seq_len: int, branches: Sequence[Branch], offsets: Sequence[int], is_causal: bool, cells: int
) -> Tensor:
    """float64 [cells, cells]: the number of branches that hold a pair of query and key, on average.

    From the definition, not from the planner. offsets: one head's in each branch, -1 where it is
    not in the branch. The sequence is cut into `cells` stretches as even as positions allow, from
    the top down for queries and from the left for keys; with as many as positions each is a pair.
    Takes time and memory for cells times the number of segments.
    """
    positions = torch.arange(seq_len)
    cell = positions * cells // seq_len
    pairs = torch.zeros(cells, cells, dtype=torch.float64)
    for (segment_length, rate), offset in zip(branches, offsets, strict=True):
        length = clip(segment_length, seq_len)
        held = positions[positions % length % rate == offset]
        if offset < 0 or not len(held):
            continue
        counts = torch.zeros(-(-seq_len // length), cells, dtype=torch.float64)
        ones = torch.ones(len(held), dtype=torch.float64)
        counts.index_put_((held // length, cell[held]), ones, accumulate=True)
        products = counts.T @ counts
        if is_causal:
            # Within a cell and a segment, the pairs (a, b) with b <= a.
            diagonal = (counts * (counts + 1) / 2).sum(0)
            products = products.tril(-1) + diagonal.diag()
        pairs += products
    sizes = torch.bincount(cell, minlength=cells).double()
    return pairs / (sizes[:, None] * sizes)
