"""Numbers as users give them: plain, NumPy's, 0-dim tensors; symbolic while a compiler traces."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch.compiler import is_compiling

_SYMBOLIC = (torch.SymInt, torch.SymFloat)


def is_symbolic(value: Any) -> bool:
    """Whether reading the value would specialize what is being traced to it.

    The operator reads it when it runs.
    """
    return is_compiling() or isinstance(value, _SYMBOLIC)


def index(value: Any) -> int:
    """An integer as Python's, a symbolic one as it is; raises TypeError for anything else."""
    if type(value) is int or isinstance(value, torch.SymInt):
        return value  # type: ignore[return-value, unused-ignore]
    return operator.index(value)


def real(value: Any, name: str) -> float:
    """A real number as Python's, a symbolic one as it is.

    Raises:
        TypeError: anything else.
        ValueError: a tensor that requires a gradient, which it would not get.
    """
    if type(value) is float or type(value) is int:
        return value
    if isinstance(value, _SYMBOLIC):
        return value  # type: ignore[return-value, unused-ignore]
    number = value
    if getattr(value, "ndim", None) == 0 and hasattr(value, "item"):
        if isinstance(value, torch.Tensor) and value.requires_grad and torch.is_grad_enabled():
            raise ValueError(f"{name} must not require a gradient, got one that would get none")
        number = None if getattr(value, "is_meta", False) else value.item()
    if isinstance(number, bool) or not isinstance(number, (int, float)):
        raise TypeError(f"{name} must be a number, got {value!r}")
    return number
