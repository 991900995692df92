"""Lengths and offsets, as lists or tensors, to sequences."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..pattern.bounds import check_bounds
from ..pattern.transforms import in_transform, is_traced, outside_transforms
from .recall import Table, has_values, recall

SeqLens = Sequence[int] | Sequence[tuple[int, int]] | Tensor
_LENGTHS = "a length for each row of the batch, or a first position and a length"


def stretches(seq_lens: SeqLens, batch: int, seq_len: int) -> Tensor | None:
    """int64 [batch, 2] on the CPU: the first position of each row, and how many there are.

    None where no row has padding, if that can be seen.

    Raises:
        TypeError, ValueError: naming seq_lens, what must hold and what was given.
    """
    given = integers(seq_lens, "seq_lens", _LENGTHS)
    is_pairs = given.dim() == 2 and given.size(1) == 2
    if not (is_pairs or given.dim() == 1) or given.size(0) != batch:
        raise ValueError(
            f"seq_lens must be [{batch}] or [{batch}, 2], {_LENGTHS}, got shape "
            f"{tuple(given.shape)}"
        )
    pairs = given if is_pairs else torch.stack([torch.zeros_like(given), given], 1)
    if batch > 0 and has_values(pairs):
        check_bounds(0, int(pairs.min()), "seq_lens")
        end = max(int(pairs.max()), int(pairs.clamp(max=seq_len).sum(1).max()))
        if end > seq_len:
            raise ValueError(f"seq_lens must end at seq_len, {seq_len}, or before, got {end}")
        if int(pairs[:, 1].min()) == seq_len:
            return None
    return pairs


def of_padded(seq_lens: SeqLens, batch: int, seq_len: int) -> Table | None:
    """The sequences of a padded batch's rows, one row behind the other; else as `stretches`."""
    return recall(_rows, integers(seq_lens, "seq_lens", _LENGTHS), batch, seq_len)


def of_offsets(cu_seqlens: Sequence[int] | Tensor, total: int) -> Table:
    """The sequences between offsets [S + 1]: they begin with 0, don't descend, end within total.

    Raises:
        TypeError, ValueError: naming cu_seqlens, what must hold and what was given.
    """
    offsets = integers(cu_seqlens, "cu_seqlens", "the places between sequences")
    table = recall(_between, offsets, total)
    assert table is not None
    return table


def layout_of(seq_lens: SeqLens, seq_len: int | None) -> tuple[int, Table | None]:
    """The rows and sequences of a batch of these lengths; no sequences where no row has padding.

    seq_len: of a padded batch; None for sequences one behind the other. Raises as `stretches`.
    """
    given = integers(seq_lens, "seq_lens", _LENGTHS)
    if seq_len is not None:
        batch = given.size(0) if given.dim() else 0
        table = of_padded(given, batch, seq_len)
        return (seq_len if table is None else batch * seq_len), table
    if given.dim() != 1:
        raise ValueError(
            f"seq_lens must be [sequences] where seq_len is None, got shape {tuple(given.shape)}"
        )
    check_bounds(0, min(given.tolist(), default=0), "seq_lens")
    total = int(given.sum())
    return total, of_offsets(torch.cat([given.new_zeros(1), given.cumsum(0)]), total)


def _rows(seq_lens: Tensor, batch: int, seq_len: int) -> Tensor | None:
    pairs = stretches(seq_lens, batch, seq_len)
    if pairs is None:
        return None
    rows = torch.arange(batch, dtype=torch.int64, device="cpu")
    return pairs + torch.stack([rows * seq_len, torch.zeros_like(rows)], 1)


def _between(offsets: Tensor, total: int) -> Tensor:
    if offsets.dim() != 1 or offsets.size(0) < 1:
        raise ValueError(
            f"cu_seqlens must be [sequences + 1], at least [1], got shape {tuple(offsets.shape)}"
        )
    lengths = offsets.diff()
    if has_values(offsets):
        if offsets[0] != 0:
            raise ValueError(f"cu_seqlens must begin with 0, got {int(offsets[0])}")
        if (lengths < 0).any():
            at = int(lengths.argmin())
            raise ValueError(
                f"cu_seqlens must not descend, got {int(offsets[at + 1])} after {int(offsets[at])}"
            )
        if offsets[-1] > total:
            raise ValueError(
                f"cu_seqlens must end at the number of rows, {total}, or before, "
                f"got {int(offsets[-1])}"
            )
    return torch.stack([offsets[:-1], lengths], 1)


def integers(values: Any, name: str, what: str) -> Tensor:
    """int64 on the CPU; for a tensor on a GPU the host waits."""
    if in_transform():  # as tensors that are no part of it
        values = values.tolist() if isinstance(values, Tensor) else values
        with outside_transforms():
            return _integers(values, name, what)
    return _integers(values, name, what)


def _integers(values: Any, name: str, what: str) -> Tensor:
    try:
        given = values if isinstance(values, Tensor) else torch.as_tensor(values, device="cpu")
        is_other = given.is_floating_point() or given.is_complex() or given.dtype is torch.bool
        if is_other and given.numel() > 0:  # an empty list has no dtype of its own
            raise TypeError
    except (TypeError, ValueError, RuntimeError):
        raise TypeError(f"{name} must be integers, {what}, got {values!r}") from None
    if given.is_meta and not is_traced():
        raise ValueError(f"{name} must have values, got a tensor on the device meta")
    return given.to("cpu", torch.int64)
