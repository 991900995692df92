"""Which lattice of a dilated segment each head takes: tables [branches, heads] of offsets.

Position p takes part in a branch (w, r) for head h iff (p mod w) mod r is the head's offset there.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Literal

import torch

from .bounds import HEADS_END, check_bounds

Offsets = Literal["interleaved", "blocked"]
HeadOffsets = Offsets | Sequence[Sequence[int]] | torch.Tensor
OffsetTable = tuple[tuple[int, ...], ...]


def normalize_head_offsets(
    head_offsets: HeadOffsets, dilation_rates: Sequence[int]
) -> Offsets | OffsetTable:
    """A name as it is, a table as tuples.

    Raises:
        TypeError: neither a name nor a table of integers.
        ValueError: an unknown name; a table without one row per branch, with rows of different
            lengths, or with an offset outside -1 <= offset < rate; a tensor without data.
    """
    if isinstance(head_offsets, str):
        if head_offsets in ("interleaved", "blocked"):
            return head_offsets
        raise ValueError(
            "head_offsets must be 'interleaved', 'blocked' or a table [branches, heads], "
            f"got {head_offsets!r}"
        )
    table = _tuples(head_offsets)
    if len(table) != len(dilation_rates) or len({len(row) for row in table}) > 1:
        raise ValueError(
            f"head_offsets must be [branches, heads] with {len(dilation_rates)} branches, "
            f"got rows of {[len(row) for row in table]} offsets"
        )
    for branch, (row, rate) in enumerate(zip(table, dilation_rates, strict=True)):
        for offset in row:
            if not -1 <= offset < rate:
                raise ValueError(
                    "head_offsets must be -1 (head not in the branch) or at least 0 and below the "
                    f"branch's dilation rate, {rate}, got {offset} in branch {branch}"
                )
    return table


def _tuples(table: Sequence[Sequence[int]] | torch.Tensor) -> OffsetTable:
    if isinstance(table, torch.Tensor) and (table.is_meta or table.layout != torch.strided):
        raise ValueError(
            "head_offsets must be a dense tensor with data, "
            f"got a {table.layout} one on {table.device}"
        )
    rows: Sequence[Sequence[int]] = table.tolist() if isinstance(table, torch.Tensor) else table
    try:
        return tuple(tuple(operator.index(offset) for offset in row) for row in rows)
    except TypeError:
        raise TypeError(
            "head_offsets must be 'interleaved', 'blocked' or a table of integers "
            f"[branches, heads], got {table!r}"
        ) from None


def offset_table(
    head_offsets: Offsets | OffsetTable, dilation_rates: Sequence[int], heads: int
) -> OffsetTable:
    """[branches, heads] for a normalized `head_offsets`.

    "interleaved" is h mod r, the paper's (arXiv 2307.02486, section 2.2, s_j = j mod r); "blocked"
    is h // ceil(heads / r), torchscale's. In Python, not in `_C`, for torch.compile to trace.
    Raises ValueError for a number of heads that the table, or any pattern, does not have.
    """
    check_bounds(1, heads, "heads", HEADS_END)
    if isinstance(head_offsets, tuple):
        if len(head_offsets[0]) != heads:
            raise ValueError(
                f"head_offsets must have one column for each of the {heads} heads, "
                f"got {len(head_offsets[0])}"
            )
        return head_offsets
    if head_offsets == "interleaved":
        return tuple(tuple(head % rate for head in range(heads)) for rate in dilation_rates)
    blocks = [-(-heads // rate) for rate in dilation_rates]
    return tuple(tuple(head // block for head in range(heads)) for block in blocks)


def head_group_offsets(dilation_rates: Sequence[int], heads: int) -> OffsetTable:
    """A table for `head_offsets` in which every head is in one branch only.

    Branch i gets the i-th group of heads, with offset i mod r_i; heads are split evenly and the
    first groups take one more where they do not divide. That is how fkodom's
    dilated-attention-pytorch and packages derived from it assign heads, unlike the paper, in which
    every head is in every branch.

    Args:
        dilation_rates: r of each branch.
        heads: query heads, at least as many as branches.

    Returns:
        [branches, heads] of offsets, -1 where the head is not in the branch.

    Raises:
        ValueError: a rate below 1, or fewer heads than branches, which would leave a branch empty.
    """
    dilation_rates = [operator.index(rate) for rate in dilation_rates]
    branches = len(dilation_rates)
    if not 1 <= branches <= heads:
        raise ValueError(
            "heads must be at least the number of branches (len(dilation_rates)), itself at least "
            f"1, got {heads} heads and {branches} branches"
        )
    if min(dilation_rates) < 1:
        raise ValueError(f"dilation_rates must be positive, got {list(dilation_rates)}")
    size, extra = divmod(heads, branches)
    group_of: list[int] = []
    for branch in range(branches):
        group_of += [branch] * (size + (branch < extra))
    return tuple(
        tuple(branch % rate if group == branch else -1 for group in group_of)
        for branch, rate in enumerate(dilation_rates)
    )
