"""The keys of one query, from the definition of a pattern."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .branch import Branch, Padding, clip


class RowKeys(NamedTuple):
    """What one query of one head attends to.

    positions: int64 [keys], ascending, each once. counts: int64 [keys], branches that hold each.
    zero_keys: keys of score 0 and value 0 besides.
    """

    positions: Tensor
    counts: Tensor
    zero_keys: int


def row_keys(
    seq_len: int,
    branches: Sequence[Branch],
    offsets: Sequence[int],
    position: int,
    *,
    is_causal: bool = False,
    padding: Padding = "masked",
) -> RowKeys:
    """offsets: the head's in each branch, -1 where it is not in the branch."""
    held, zero_keys = [torch.empty(0, dtype=torch.int64)], 0
    for (segment_length, rate), offset in zip(branches, offsets, strict=True):
        length = clip(segment_length, seq_len)
        begin = position - position % length
        if (position - begin) % rate != offset:
            continue
        end = min(begin + length, seq_len)
        keys = torch.arange(begin + offset, end, rate)
        if is_causal:
            keys = keys[keys <= position]
        elif padding == "zeros":
            zero_keys += -(-length // rate) - len(keys)
        held.append(keys)
    positions, counts = torch.unique(torch.cat(held), return_counts=True)
    return RowKeys(positions, counts, zero_keys)
