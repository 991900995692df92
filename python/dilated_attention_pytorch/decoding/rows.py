"""The rows of keys and values that a cache that forgets keeps, and how many positions each text
has."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .. import ops
from ..pattern import Scheme
from .layout import Layout, grows, make_layout

_FIRST_CAPACITY = 64  # of a cache that grows, in positions


class ForgettingRows:
    """key and value [batch, rows, head_dim], lengths [batch], and the table of lattices.

    All rows are there from the beginning, except where a segment is the whole text, of unknown
    length: those double when they are full.
    """

    def __init__(
        self,
        scheme: Scheme,
        shape: tuple[int, int, int, int],
        max_seq_len: int | None,
        like: Tensor,
    ) -> None:
        """shape: batch, heads, kv_heads, head_dim."""
        batch, self._heads, self._kv_heads, head_dim = shape
        self._scheme, self._max_seq_len = scheme, max_seq_len
        self.grows = max_seq_len is None and grows(scheme)
        longest = 0 if self.grows else max(scheme.segment_lengths)
        self.layout = self._make_layout(longest if max_seq_len is None else max_seq_len)
        with torch.inference_mode(False):  # or nobody could write to them outside of it
            rows = (batch, self.layout.rows, head_dim)
            self.key, self.value = (like.new_empty(rows) for _ in "kv")
            self.lengths = like.new_zeros(batch, dtype=torch.int64)
            self._table = self._make_table()

    @property
    def nbytes(self) -> int:
        return self.key.nbytes + self.value.nbytes

    def append(self, key: Tensor, value: Tensor, counts: Tensor | None) -> None:
        """key and value [batch, n, kv_heads, head_dim], of which counts are a text's."""
        ops.decode_append(
            self.key,
            self.value,
            self.lengths,
            key,
            value,
            *self._lattices(),
            counts=counts,
            max_seq_len=self._max_seq_len,
        )

    def step(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        counts: Tensor | None,
        scale: float | None,
    ) -> tuple[Tensor, Tensor]:
        """As `append`, then out and lse of these positions, in one segment of every branch."""
        return ops.decode_step(
            self.key,
            self.value,
            self.lengths,
            query,
            key,
            value,
            *self._lattices(),
            counts=counts,
            scale=scale,
            max_seq_len=self._max_seq_len,
        )

    def reserve(self, length: int) -> None:
        """Room for a text of so many positions."""
        if not self.grows or length <= self.layout.capacity:
            return
        old, old_rows = self.layout, (self.key, self.value)
        self.resize(max(_FIRST_CAPACITY, length, 2 * old.capacity))
        for rows, old_one in zip((self.key, self.value), old_rows, strict=True):
            for to, source in zip(self.layout.lattices, old.lattices, strict=True):
                kept = old_one[:, source.first : source.first + source.rows]
                rows[:, to.first : to.first + source.rows] = kept

    def resize(self, capacity: int) -> None:
        """Rows of anything, for texts of another length."""
        self.layout = self._make_layout(capacity)
        batch, _, head_dim = self.key.shape
        with torch.inference_mode(False):
            rows = (batch, self.layout.rows, head_dim)
            self.key, self.value = (self.key.new_empty(rows) for _ in "kv")
            self._table = self._make_table()

    def select(self, indices: Tensor) -> None:
        """Batch entry i becomes entry indices[i], in the same memory where there are as many."""
        with torch.inference_mode(False):
            for name in ("key", "value", "lengths"):
                old = getattr(self, name)
                new = old.index_select(0, indices)
                setattr(self, name, old.copy_(new) if new.shape == old.shape else new)

    def _lattices(self) -> tuple[Tensor, Sequence[int], Sequence[int]]:
        """What operators take of the layout."""
        return self._table, self.layout.segment_lengths, self.layout.dilation_rates

    def _make_layout(self, capacity: int) -> Layout:
        return make_layout(self._scheme, self._heads, self._kv_heads, capacity, self.grows)

    def _make_table(self) -> Tensor:
        return torch.tensor(self.layout.table, dtype=torch.int64, device=self.key.device)
