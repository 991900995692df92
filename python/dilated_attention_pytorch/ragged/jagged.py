"""Nested tensors of layout torch.jagged to sequences, and rows back to nested tensors."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.compiler import is_compiling

from ..pattern import Sequences
from .recall import Table, has_values


def of_jagged(query: Tensor, key: Tensor, value: Tensor) -> Table:
    """The sequences of nested tensors [batch, ragged, heads, head_dim], which all three share.

    Raises:
        TypeError, ValueError: naming the argument, what must hold and what was given.
    """
    inputs: dict[str, Any] = {"query": query, "key": key, "value": value}
    for name, x in inputs.items():
        if not x.is_nested:
            raise TypeError(f"{name} must be nested where another tensor is, got a padded one")
        if x._ragged_idx != 1:
            raise ValueError(
                f"{name} must be [batch, ragged, heads, head_dim], got shape {tuple(x.shape)}"
            )
    sequences = _table(query)
    for name, x in inputs.items():
        # Tensors made of one another share the symbol of their lengths; others may have equal ones.
        if x.shape[:2] == query.shape[:2]:
            continue
        if is_compiling() or not torch.equal(_table(x), sequences):
            raise ValueError(
                f"{name} must have query's sequences, in the same places, got shape "
                f"{tuple(x.shape)} where query has {tuple(query.shape)}"
            )
    return Sequences(sequences) if has_values(sequences) else sequences


def like_jagged(values: Tensor, nested: Any) -> Tensor:
    """Rows [T, ...] as a nested tensor with another's sequences."""
    lengths = nested.offsets(), nested.lengths()
    made: Tensor = torch.nested.nested_tensor_from_jagged(values, *lengths)
    return made


def _table(nested: Any) -> Tensor:
    """On a GPU the host waits for it."""
    offsets, lengths = nested.offsets(), nested.lengths()
    table = torch.stack([offsets[:-1], offsets.diff() if lengths is None else lengths], 1)
    return table.to("cpu", torch.int64)
