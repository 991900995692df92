"""Lengths and offsets, as lists or tensors, to sequences."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.compiler import is_compiling

from ..pattern.bounds import SEQ_LEN_END, check_bounds

SeqLens = Sequence[int] | Sequence[tuple[int, int]] | Tensor
_LENGTHS = "a length for each row of the batch, or a first position and a length"


def stretches(seq_lens: SeqLens, batch: int, seq_len: int) -> Tensor:
    """int64 [batch, 2] on the CPU: the first position of each row, and how many there are.

    Raises:
        TypeError, ValueError: naming seq_lens, what must hold and what was given.
    """
    given = _integers(seq_lens, "seq_lens", _LENGTHS)
    if given.shape not in ((batch,), (batch, 2)):
        raise ValueError(
            f"seq_lens must be [{batch}] or [{batch}, 2], {_LENGTHS}, got shape "
            f"{tuple(given.shape)}"
        )
    pairs = given if given.dim() == 2 else torch.stack([torch.zeros_like(given), given], 1)
    if batch > 0 and has_values(pairs):
        check_bounds(0, int(pairs.min()), "seq_lens")
        end = int(pairs.sum(1).max())
        if end > seq_len:
            raise ValueError(f"seq_lens must end at seq_len, {seq_len}, or before, got {end}")
    return pairs


def are_whole(pairs: Tensor, seq_len: int) -> bool:
    """Whether no row has padding; False where that can't be seen."""
    return has_values(pairs) and bool((pairs[:, 1] == seq_len).all())


def of_padded(pairs: Tensor, seq_len: int) -> Tensor:
    """The sequences of a padded batch's rows, one row behind the other."""
    begins = torch.arange(pairs.size(0), dtype=torch.int64, device="cpu") * seq_len
    return torch.stack([pairs[:, 0] + begins, pairs[:, 1]], 1)


def layout_of(seq_lens: SeqLens, seq_len: int | None) -> tuple[int, Tensor | None]:
    """The rows and sequences of a batch of these lengths; no sequences where no row has padding.

    seq_len: of a padded batch; None for sequences one behind the other. Raises as `stretches`.
    """
    given = _integers(seq_lens, "seq_lens", _LENGTHS)
    if seq_len is None:
        length = stretches(given, given.numel(), SEQ_LEN_END)[:, 1]
        end = length.cumsum(0)
        return int(length.sum()), torch.stack([end - length, length], 1)
    pairs = stretches(given, len(given) if given.dim() else 0, seq_len)
    if are_whole(pairs, seq_len):
        return seq_len, None
    return len(pairs) * seq_len, of_padded(pairs, seq_len)


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
    return given.detach().to("cpu", torch.int64)
