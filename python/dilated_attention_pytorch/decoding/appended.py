"""The last append to a cache, and which of its batch entries are alike."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import groupby
from typing import NamedTuple

from torch import Tensor


class Run(NamedTuple):
    """Neighbouring batch entries that have the same length and append as many positions."""

    entries: slice
    begin: int
    size: int


class Appended(NamedTuple):
    """key and value [batch, n, kv_heads, head_dim], and how many of the n positions are each batch
    entry's."""

    key: Tensor
    value: Tensor
    counts: tuple[int, ...]

    def runs(self, lengths: Sequence[int]) -> Iterator[Run]:
        """Those that append something to texts of these lengths."""
        first = 0
        for (begin, count), alike in groupby(zip(lengths, self.counts, strict=True)):
            entries = slice(first, first := first + len(list(alike)))
            if count > 0:
                yield Run(entries, begin, count)

    def lengths_after(self, lengths: Sequence[int]) -> list[int]:
        return [length + count for length, count in zip(lengths, self.counts, strict=True)]

    def select(self, indices: Tensor) -> Appended:
        """Of these batch entries."""
        key, value = (x.index_select(0, indices) for x in (self.key, self.value))
        return Appended(key, value, tuple(self.counts[i] for i in indices.tolist()))
