"""Where the sequences of a batch lie in its tensors."""

from __future__ import annotations

import ctypes
from array import array
from collections.abc import Sequence
from itertools import chain

import torch
from torch import Tensor


class Sequences:
    """(first row, length) of each sequence: what `PatternSpec` and the operators' option take.

    Immutable and hashable. Sequences ascend and don't overlap; lengths may be 0, and rows between
    sequences are padding. What depends on the number of rows is checked where they are used.

    Args:
        table: int64 [sequences, 2] on the CPU, which is copied, or a list of pairs.

    Raises:
        TypeError, ValueError: it is no such table.
    """

    __slots__ = ("_numbers", "tensor")

    tensor: Tensor  # int64 [sequences, 2] on the CPU, not to be written to

    def __init__(self, table: Tensor | Sequence[tuple[int, int]]) -> None:
        # An inference tensor could not be saved for a later call's backward.
        with torch.inference_mode(False):
            if isinstance(table, Tensor):
                _check(table)
                self.tensor = table.detach().clone(memory_format=torch.contiguous_format)
            else:
                self.tensor = _read(table)
        if len(self.tensor) > 0 and (least := int(self.tensor[:, 1].min())) < 0:
            raise ValueError(f"sequences must have lengths of at least 0, got {least}")
        self._numbers = ctypes.string_at(self.tensor.data_ptr(), self.tensor.nbytes)

    def lengths(self) -> list[int]:
        """The distinct ones, the longest first; 0 only where there is no other."""
        return sorted({*self.tensor[:, 1].tolist()} - {0}, reverse=True) or [0]

    def numbers(self) -> bytes:
        """The table as it lies in memory."""
        return self._numbers

    def __len__(self) -> int:
        return len(self.tensor)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Sequences) and self._numbers == other._numbers

    def __hash__(self) -> int:
        return hash(self._numbers)

    def __repr__(self) -> str:
        shown = [*map(tuple, self.tensor[:8].tolist())]
        return f"Sequences({shown})" if len(self) <= 8 else f"Sequences({len(self)} of them)"

    def __reduce__(self) -> tuple[type[Sequences], tuple[Tensor]]:
        return Sequences, (self.tensor,)


def _check(table: Tensor) -> None:
    if table.dtype != torch.int64 or table.device.type != "cpu" or table.shape[1:] != (2,):
        raise ValueError(
            "sequences must be int64 [sequences, 2] on the CPU, got "
            f"{str(table.dtype).removeprefix('torch.')} {list(table.shape)} on {table.device}"
        )


def _read(table: Sequence[tuple[int, int]]) -> Tensor:
    try:
        if not {*map(len, table)} <= {2}:
            raise TypeError
        # Fast for thousands: torch.tensor looks at each pair.
        numbers = array("q", chain.from_iterable(table))
    except (TypeError, OverflowError):
        raise TypeError(
            f"sequences must be pairs (first row, length) of integers, got {table!r}"
        ) from None
    if not numbers:
        return torch.empty(0, 2, dtype=torch.int64, device="cpu")
    return torch.frombuffer(numbers, dtype=torch.int64).view(-1, 2)
