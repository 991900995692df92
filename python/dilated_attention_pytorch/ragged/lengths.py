"""Lengths and offsets, as lists or tensors, to sequences."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.compiler import is_compiling

from ..pattern.bounds import check_bounds

SeqLens = Sequence[int] | Sequence[tuple[int, int]] | Tensor
_LENGTHS = "a length for each row of the batch, or a first position and a length"


def stretches(seq_lens: SeqLens, batch: int, seq_len: int) -> Tensor | None:
    """int64 [batch, 2] on the CPU: the first position of each row, and how many there are.

    None where no row has padding, if that can be seen.

    Raises:
        TypeError, ValueError: naming seq_lens, what must hold and what was given.
    """
    given = _integers(seq_lens, "seq_lens", _LENGTHS)
    is_pairs = given.dim() == 2 and given.size(1) == 2
    if not (is_pairs or given.dim() == 1) or given.size(0) != batch:
        raise ValueError(
            f"seq_lens must be [{batch}] or [{batch}, 2], {_LENGTHS}, got shape "
            f"{tuple(given.shape)}"
        )
    pairs = given if is_pairs else torch.stack([torch.zeros_like(given), given], 1)
    if batch > 0 and has_values(pairs):
        check_bounds(0, int(pairs.min()), "seq_lens")
        end = int(pairs.sum(1).max())
        if end > seq_len:
            raise ValueError(f"seq_lens must end at seq_len, {seq_len}, or before, got {end}")
        if int(pairs[:, 1].min()) == seq_len:
            return None
    return pairs


def of_padded(pairs: Tensor, seq_len: int) -> Tensor:
    """The sequences of a padded batch's rows, one row behind the other."""
    rows = torch.arange(pairs.size(0), dtype=torch.int64, device="cpu")
    return pairs + torch.stack([rows * seq_len, torch.zeros_like(rows)], 1)


def layout_of(seq_lens: SeqLens, seq_len: int | None) -> tuple[int, Tensor | None]:
    """The rows and sequences of a batch of these lengths; no sequences where no row has padding.

    seq_len: of a padded batch; None for sequences one behind the other. Raises as `stretches`.
    """
    given = _integers(seq_lens, "seq_lens", _LENGTHS)
    batch = given.size(0) if given.dim() else 0
    if seq_len is not None:
        pairs = stretches(given, batch, seq_len)
        return (seq_len, None) if pairs is None else (batch * seq_len, of_padded(pairs, seq_len))
    if given.dim() != 1:
        raise ValueError(
            f"seq_lens must be [sequences] where seq_len is None, got shape {tuple(given.shape)}"
        )
    check_bounds(0, min(given.tolist(), default=0), "seq_lens")
    return int(given.sum()), torch.stack([given.cumsum(0) - given, given], 1)


def of_offsets(cu_seqlens: Sequence[int] | Tensor, total: int) -> Tensor:
    """The sequences between offsets [S + 1]: they begin with 0, don't descend, end within total.

    Raises:
        TypeError, ValueError: naming cu_seqlens, what must hold and what was given.
    """
    offsets = _integers(cu_seqlens, "cu_seqlens", "the places between sequences")
    if offsets.dim() != 1 or offsets.size(0) < 1:
        raise ValueError(
            f"cu_seqlens must be [sequences + 1], at least [1], got shape {tuple(offsets.shape)}"
        )
    if has_values(offsets):
        values = offsets.tolist()
        if values[0] != 0:
            raise ValueError(f"cu_seqlens must begin with 0, got {values[0]}")
        if values != sorted(values):
            at = int(offsets.diff().argmin())
            raise ValueError(
                f"cu_seqlens must not descend, got {values[at + 1]} after {values[at]}"
            )
        if values[-1] > total:
            raise ValueError(
                f"cu_seqlens must end at the number of rows, {total}, or before, got {values[-1]}"
            )
    return torch.stack([offsets[:-1], offsets.diff()], 1)


def has_values(x: Tensor) -> bool:
    """Whether values can be looked at: not while a compiler traces, nor those of fake tensors."""
    return not is_compiling() and type(x) is Tensor and not x.is_meta


def _integers(values: Any, name: str, what: str) -> Tensor:
    """int64 on the CPU; for a tensor on a GPU the host waits."""
    try:
        given = values if isinstance(values, Tensor) else torch.as_tensor(values, device="cpu")
        is_other = given.is_floating_point() or given.is_complex() or given.dtype is torch.bool
        if is_other and given.numel() > 0:  # an empty list has no dtype of its own
            raise TypeError
    except (TypeError, ValueError, RuntimeError):
        raise TypeError(f"{name} must be integers, {what}, got {values!r}") from None
    return given.to("cpu", torch.int64)
