"""A pattern: its specification, and the words that the planner made of it."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import chain
from typing import NamedTuple

import torch
from torch import Tensor

from .. import _C
from .advice import advise
from .branch import Branch, Padding
from .offsets import OffsetTable, offset_table

_PlanArguments = tuple[
    int, list[int], list[int], list[int], int, int, bool, bool, int, int, int, int, int
]


class PatternSpec(NamedTuple):
    """Everything that a pattern depends on; hashable, so it is the key of the caches.

    `queries` and `keys` are the positions (begin, end) that the rows of the query and of the
    key/value tensors have, end = -1 standing for seq_len: a shard of the sequence in a ring. The
    planner checks the values, with a ValueError that names the field.
    """

    seq_len: int
    branches: tuple[Branch, ...]
    head_offsets: str | OffsetTable
    heads: int
    kv_heads: int
    is_causal: bool = False
    padding: Padding = "masked"
    queries: tuple[int, int] = (0, -1)
    keys: tuple[int, int] = (0, -1)
    row_tile: int = 64

    def offset_table(self) -> OffsetTable:
        """[branches, heads], -1 where a head is not in a branch."""
        rates = [branch.dilation_rate for branch in self.branches]
        return offset_table(self.head_offsets, rates, self.heads)

    def plan_arguments(self) -> _PlanArguments:
        """As `_C.plan` and `_C.report` take them."""
        return (
            self.seq_len,
            [branch.segment_length for branch in self.branches],
            [branch.dilation_rate for branch in self.branches],
            list(chain.from_iterable(self.offset_table())),
            self.heads,
            self.kv_heads,
            self.is_causal,
            self.padding == "zeros",
            *self.queries,
            *self.keys,
            self.row_tile,
        )


@dataclass(frozen=True, slots=True, eq=False)
class Pattern:
    """What the operators take for one specification.

    words: int32 [words], on the CPU; csrc/include/dilated/pattern_layout.h says what they mean.
    head_offsets: int64 [branches, heads] on the CPU, None for the interleaved ones.
    page_locked: whether the words lie in memory that GPUs read by themselves.
    """

    spec: PatternSpec
    words: Tensor
    head_offsets: Tensor | None
    page_locked: bool = False

    @staticmethod
    def plan(spec: PatternSpec) -> Pattern:
        """Plans on the host. Raises ValueError where the specification is wrong; see advice.py."""
        advise(spec)
        # An inference tensor could not be saved for a later call's backward.
        with torch.inference_mode(False):
            words = torch.frombuffer(_C.plan(*spec.plan_arguments()), dtype=torch.int32)
            offsets = None
            if spec.head_offsets != "interleaved":
                offsets = torch.tensor(spec.offset_table(), dtype=torch.int64, device="cpu")
        return Pattern(spec, words, offsets)

    @property
    def nbytes(self) -> int:
        return self.words.nbytes

    def report(self) -> dict[str, int]:
        """(query, key) pairs over all heads, and the pattern's size.

        nominal: every branch on its own; distinct: each pair once; computed: with the empty corners
        of tiles; bytes, tiles, groups, runs.
        """
        return _C.report(*self.spec.plan_arguments())
