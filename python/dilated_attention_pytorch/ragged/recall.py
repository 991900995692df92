"""Sequences that were made before, as for every layer of a model at each of its steps."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from functools import lru_cache

import torch
from torch import Tensor

from ..pattern import Sequences
from ..pattern.transforms import is_traced, outside_transforms

Table = Sequences | Tensor  # int64 [S, 2] on the CPU; a tensor where its values can't be looked at
Make = Callable[..., Tensor | None]


def has_values(x: Tensor) -> bool:
    """Whether values can be looked at: not while a compiler or torch.jit traces, nor those of fake
    tensors."""
    return not is_traced() and type(x) is Tensor and not x.is_meta


def recall(make: Make, numbers: Tensor, *sizes: int) -> Table | None:
    """make(numbers, *sizes), for numbers int64 on the CPU, checked and made once for equal ones.

    As it is, and not remembered, where values can't be looked at.
    """
    if not has_values(numbers):
        return make(numbers, *sizes)
    numbers = numbers.contiguous()
    values = ctypes.string_at(numbers.data_ptr(), numbers.nbytes)
    return _make(make, values, tuple(numbers.shape), sizes)


@lru_cache(maxsize=64)
def _make(
    make: Make, values: bytes, shape: tuple[int, ...], sizes: tuple[int, ...]
) -> Sequences | None:
    with outside_transforms():
        return _made(make, values, shape, sizes)


def _made(
    make: Make, values: bytes, shape: tuple[int, ...], sizes: tuple[int, ...]
) -> Sequences | None:
    numbers = torch.tensor([*memoryview(values).cast("q")], dtype=torch.int64, device="cpu")
    table = make(numbers.reshape(shape), *sizes)
    return None if table is None else Sequences(table)
