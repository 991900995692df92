"""What a user chooses: branches (segment length, dilation rate), head offsets and padding."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Literal, NamedTuple

from torch.compiler import is_compiling

from .offsets import HeadOffsets, Offsets, OffsetTable, normalize_head_offsets, offset_table
from .scalars import index, is_symbolic

Padding = Literal["masked", "zeros"]


class Branch(NamedTuple):
    """Segments of `segment_length` positions, of which every `dilation_rate`-th takes part.

    LongNet, arXiv 2307.02486, eqs. 3-5: w and r. Nothing has to divide anything.
    """

    segment_length: int
    dilation_rate: int


def clip(segment_length: int, seq_len: int) -> int:
    """A segment's length within a sequence; an empty sequence counts as one position."""
    return min(segment_length, max(1, seq_len))


def make_branches(
    segment_lengths: Sequence[int], dilation_rates: Sequence[int]
) -> tuple[Branch, ...]:
    """Pairs the two lists, as `PatternSpec` takes them.

    Symbolic lengths, which a compiler traces, stay symbolic; the operator checks their values.

    Raises:
        TypeError: one of them is not a sequence of integers.
        ValueError: they are empty, differ in length, or hold a number below 1 or too large.
    """
    lengths = _integers(segment_lengths, "segment_lengths")
    rates = _integers(dilation_rates, "dilation_rates")
    if len(lengths) != len(rates) or not lengths:
        raise ValueError(
            "segment_lengths and dilation_rates must have the same length, at least 1, "
            f"got {len(lengths)} and {len(rates)}"
        )
    for length, rate in zip(lengths, rates, strict=True):
        if not is_symbolic(length) and not 1 <= length < 2**63:
            raise ValueError(f"segment_lengths must be positive and below 2^63, got {length}")
        if not 1 <= rate < 2**31:
            raise ValueError(f"dilation_rates must be positive and below 2^31, got {rate}")
    return tuple(Branch(length, rate) for length, rate in zip(lengths, rates, strict=True))


def _integers(values: Sequence[int], name: str) -> list[int]:
    try:
        return [index(value) for value in values]
    except (TypeError, RuntimeError):  # RuntimeError: torch's, for a tensor without data
        raise TypeError(f"{name} must be a sequence of integers, got {values!r}") from None


@dataclass(frozen=True, slots=True)
class Scheme:
    """A call's branches, head offsets and padding, checked once.

    `segment_lengths` and `dilation_rates` repeat `branches` in the form that the operators take.
    """

    branches: tuple[Branch, ...]
    head_offsets: Offsets | OffsetTable
    padding: Padding
    segment_lengths: tuple[int, ...]
    dilation_rates: tuple[int, ...]

    @staticmethod
    def make(
        segment_lengths: Sequence[int],
        dilation_rates: Sequence[int],
        head_offsets: HeadOffsets,
        padding: Padding,
    ) -> Scheme:
        """Raises ValueError or TypeError with the argument, what must hold and what was given."""
        branches = make_branches(segment_lengths, dilation_rates)
        if padding != "masked" and padding != "zeros":
            raise ValueError(f"padding must be 'masked' or 'zeros', got {padding!r}")
        rates = tuple(branch.dilation_rate for branch in branches)
        return Scheme(
            branches,
            normalize_head_offsets(head_offsets, rates),
            padding,
            tuple(branch.segment_length for branch in branches),
            rates,
        )

    @staticmethod
    def recall(
        segment_lengths: Sequence[int],
        dilation_rates: Sequence[int],
        head_offsets: HeadOffsets,
        padding: Padding,
    ) -> Scheme:
        """As `make`, but remembers recent schemes, except where torch.compile traces.

        Only those of plain integers and names: other values may be mutable, or equal one that is
        valid, as 2.0 equals 2.
        """
        lists = {type(segment_lengths), type(dilation_rates)} <= _SEQUENCES
        if not is_compiling() and lists and type(head_offsets) is str and type(padding) is str:
            lengths, rates = tuple(segment_lengths), tuple(dilation_rates)
            if {*map(type, lengths), *map(type, rates)} == _INTEGERS:
                return _recall(lengths, rates, head_offsets, padding)
        return Scheme.make(segment_lengths, dilation_rates, head_offsets, padding)

    def offset_table(self, heads: int) -> OffsetTable:
        """[branches, heads]; raises ValueError if an explicit table has another number of heads."""
        return offset_table(self.head_offsets, self.dilation_rates, heads)

    def of_heads(self, heads: int, first: int, count: int) -> Scheme:
        """For `count` of the heads, from `first` on, in a call of their own."""
        table = tuple(row[first : first + count] for row in self.offset_table(heads))
        return replace(self, head_offsets=table)

    def extra_repr(self) -> str:
        """The arguments as a module prints them, without those that have their default."""
        text = f"segment_lengths={list(self.segment_lengths)}"
        text += f", dilation_rates={list(self.dilation_rates)}"
        if self.head_offsets != "interleaved":
            table = isinstance(self.head_offsets, tuple)
            text += f", head_offsets={'table' if table else repr(self.head_offsets)}"
        return text if self.padding == "masked" else f"{text}, padding={self.padding!r}"


_SEQUENCES = {list, tuple}
_INTEGERS = {int}
_recall = lru_cache(maxsize=256)(Scheme.make)
