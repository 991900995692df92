"""What must hold of what a cache is given. Raised: argument, rule, value."""

from __future__ import annotations

import operator
from collections.abc import Sequence

import torch
from torch import Tensor

from ..pattern.bounds import check_bounds
from ..pattern.plain import check_plain

MOST_BRANCHES = 16  # the operators'
_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def check_dtype(dtype: torch.dtype, device: torch.device) -> None:
    allowed = _DTYPES[:-1] if device.type == "cuda" else _DTYPES
    if dtype not in allowed:
        names = [str(one).removeprefix("torch.") for one in allowed]
        raise ValueError(f"dtype must be one of {', '.join(names)} on {device}, got {dtype}")


def check_rows(
    tensor: Tensor, name: str, batch: int, heads: int, like: Tensor, seq_len: int | None = None
) -> None:
    """Raises unless it is [batch, seq_len, heads, head_dim], of the dtype, device and head_dim of
    `like`, and wants no gradient."""
    check_plain(tensor, name)
    shape, head_dim = tuple(tensor.shape), like.shape[-1]
    fits = len(shape) == 4 and (shape[0], *shape[2:]) == (batch, heads, head_dim)
    if not fits or (seq_len is not None and shape[1] != seq_len):
        length = "seq_len" if seq_len is None else seq_len
        raise ValueError(
            f"{name} must be [{batch}, {length}, {heads}, {head_dim}] (batch, seq_len, heads, "
            f"head_dim), got shape {shape}"
        )
    for what in ("dtype", "device"):
        wanted, given = getattr(like, what), getattr(tensor, what)
        if wanted != given:
            wanted, given = (str(one).removeprefix("torch.") for one in (wanted, given))
            raise ValueError(f"{name} must be {wanted}, the {what} of the cache, got {given}")
    if tensor.requires_grad and torch.is_grad_enabled():
        raise ValueError(
            f"{name} must not require a gradient, as a cache gives none (torch.no_grad), "
            "got one that does"
        )


def integers(
    values: Sequence[int] | Tensor, name: str, least: int, end: int | None, count: int | None = None
) -> tuple[int, ...]:
    """As a tuple; raises unless they are `count` integers from `least` to below `end`."""
    try:
        numbers = values.tolist() if isinstance(values, Tensor) else list(values)
        numbers = [operator.index(number) for number in numbers]
    except (TypeError, RuntimeError):  # RuntimeError: torch's, for a tensor without data
        raise TypeError(f"{name} must be a sequence of integers, got {values!r}") from None
    if count is not None and len(numbers) != count:
        raise ValueError(f"{name} must be {count} integers, one a row, got {len(numbers)}")
    for number in numbers:
        check_bounds(least, number, name, end)
    return tuple(numbers)
