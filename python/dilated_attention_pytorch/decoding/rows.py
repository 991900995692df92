"""The rows of keys and values that a cache keeps of one branch."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..pattern.bounds import SEQ_LEN_END
from .layout import BranchLayout

Index = slice | Tensor
_FIRST_ROWS = 64  # of a buffer that grows


class BranchRows:
    """key and value, [batch, buffers, rows, head_dim], contiguous; row j of a buffer is the j-th
    position of its lattice in the open segment.

    All rows of the longest segment are there from the beginning, except where a segment is the
    whole text, of unknown length: those double when they are full.
    """

    def __init__(
        self,
        layout: BranchLayout,
        batch_size: int,
        head_dim: int,
        max_seq_len: int | None,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.layout = layout
        known = layout.segment_length if max_seq_len is None else max_seq_len
        rows = layout.rows(known) if known < SEQ_LEN_END else 0
        shape = (batch_size, layout.buffers, rows, head_dim)
        with torch.inference_mode(False):  # or nobody could write to them outside of it
            self.key, self.value = (torch.empty(shape, dtype=dtype, device=device) for _ in "kv")
        self.heads = [_index(lattice.heads, device) for lattice in layout.lattices]
        self.kv_heads = [_index(lattice.kv_heads, device) for lattice in layout.lattices]

    @property
    def nbytes(self) -> int:
        return self.key.nbytes + self.value.nbytes

    def write(self, entries: slice, begin: int, key: Tensor, value: Tensor) -> None:
        """Stores key and value [entries, n, kv_heads, head_dim] of positions from `begin` on, all
        in one segment."""
        end, rate = begin + key.shape[1], self.layout.dilation_rate
        self._reserve(self.layout.rows((end - 1) % self.layout.segment_length + 1))
        for lattice, kv_heads in zip(self.layout.lattices, self.kv_heads, strict=True):
            first, row, size = self.layout.places(lattice.offset, begin, end)
            if size == 0:
                continue
            buffers = slice(lattice.first, lattice.first + len(lattice.kv_heads))
            for rows, source in ((self.key, key), (self.value, value)):
                new = source[:, first::rate, kv_heads].transpose(1, 2)
                rows[entries, buffers, row : row + size] = new

    def _reserve(self, rows: int) -> None:
        batch, buffers, present, head_dim = self.key.shape
        if rows <= present:
            return
        more = max(_FIRST_ROWS, rows, 2 * present) - present
        with torch.inference_mode(False):
            room = self.key.new_empty(batch, buffers, more, head_dim)
            self.key, self.value = (torch.cat([x, room], 2) for x in (self.key, self.value))


def _index(numbers: Sequence[int], device: torch.device) -> Index:
    """What selects these along a dimension: a slice, which copies nothing, where they allow it."""
    step = numbers[1] - numbers[0] if len(numbers) > 1 else 1
    if list(numbers) == list(range(numbers[0], numbers[-1] + 1, step)):
        return slice(numbers[0], numbers[-1] + 1, step)
    return torch.tensor(numbers, dtype=torch.int64, device=device)
