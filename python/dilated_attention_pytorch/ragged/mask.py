"""Padding masks, as nn.MultiheadAttention takes them, to the stretch that each row keeps."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .recall import has_values

Mask = Tensor | Sequence[Sequence[bool]]


def seq_lens_of_mask(key_padding_mask: Mask) -> Tensor:
    """What a padding mask keeps, in the form that every `seq_lens` takes.

    Called once for a batch, it spares each layer its own look at the mask.

    Args:
        key_padding_mask: [batch, seq_len], as nn.MultiheadAttention's: bool, True in padding, or
            floating, 0 and -inf in padding; or lists. For one on a GPU the host waits, once.

    Returns:
        int64 [batch, 2] on the CPU: the first position of each row, and how many there are.

    Raises:
        TypeError, ValueError: the mask is something else, or what it keeps of a row has holes.
    """
    mask = as_mask(key_padding_mask)
    batch, seq_len = mask.shape
    if seq_len == 0:
        return torch.zeros(batch, 2, dtype=torch.int64, device="cpu")
    is_bool = mask.dtype is torch.bool
    kept = ~mask if is_bool else mask == 0
    first, behind = (x.to(torch.uint8).argmax(1) for x in (kept, kept.flip(1)))
    count = kept.sum(1)
    holes = (count > 0) & (first + count + behind != seq_len)
    numbers = torch.zeros_like(holes) if is_bool else ~(kept | mask.isneginf()).all(1)
    table = torch.stack([first, count, holes.long(), numbers.long()], 1).cpu()
    if not has_values(table):  # a length of -1 is for the operator to refuse
        return torch.stack([table[:, 0], table[:, 1].where(table[:, 2:].sum(1) == 0, -1)], 1)
    if table[:, 3].any():
        raise ValueError(
            "key_padding_mask must hold True and False, or 0 and -inf, got other numbers in row "
            f"{int(table[:, 3].argmax())}"
        )
    if table[:, 2].any():
        raise ValueError(
            "key_padding_mask must keep one stretch of each row: move its tokens together, so that "
            f"padding lies before or behind them, got holes in row {int(table[:, 2].argmax())}"
        )
    return table[:, :2]


def kept_rows(pairs: Tensor, positions: Tensor) -> Tensor:
    """bool [batch, rows, 1], of rows at `positions`, on their device: False in padding."""
    table = pairs.to(positions.device, non_blocking=True)[:, :, None, None]
    first, length = table.unbind(1)
    places = positions[:, None]
    return (places >= first) & (places < first + length)


def as_mask(mask: Mask) -> Tensor:
    """As a tensor [batch, seq_len], bool or floating; raises TypeError and ValueError otherwise."""
    try:
        given = mask if isinstance(mask, Tensor) else torch.as_tensor(mask, device="cpu")
        if given.dtype is not torch.bool and not given.is_floating_point():
            raise TypeError
    except (TypeError, ValueError, RuntimeError):
        shown = mask.dtype if isinstance(mask, Tensor) else repr(mask)
        raise TypeError(f"key_padding_mask must be bool or floating, got {shown}") from None
    if given.dim() != 2:
        raise ValueError(
            f"key_padding_mask must be [batch, seq_len], got shape {tuple(given.shape)}"
        )
    return given.detach()
