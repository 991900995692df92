"""The last append to a cache."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class Appended(NamedTuple):
    """key and value [batch, n, kv_heads, head_dim], and how many of the n positions are each batch
    entry's; None: all of them."""

    key: Tensor
    value: Tensor
    counts: tuple[int, ...] | None

    @property
    def size(self) -> int:
        return self.key.shape[1]

    def lengths_after(self, lengths: Sequence[int]) -> list[int]:
        counts = self.counts or (self.size,) * len(lengths)
        return [length + count for length, count in zip(lengths, counts, strict=True)]

    def counts_of(self, begin: int, end: int) -> Tensor | None:
        """Of the positions begin to end, on the device."""
        if self.counts is None:
            return None
        counts = [min(max(count - begin, 0), end - begin) for count in self.counts]
        return torch.tensor(counts, dtype=torch.int64, device=self.key.device)

    def select(self, indices: Tensor) -> Appended:
        """Of these batch entries."""
        key, value = (x.index_select(0, indices) for x in (self.key, self.value))
        counts = self.counts and tuple(self.counts[i] for i in indices.tolist())
        return Appended(key, value, counts)
