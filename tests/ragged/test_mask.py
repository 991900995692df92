"""Padding masks to the stretch that each row keeps."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from dilated_attention_pytorch import seq_lens_of_mask
from dilated_attention_pytorch.ragged import kept_rows

STRETCHES = [(0, 5), (0, 3), (2, 3), (1, 2), (4, 1), (0, 0)]


def mask_of(pairs: list[tuple[int, int]], seq_len: int) -> Tensor:
    mask = torch.ones(len(pairs), seq_len, dtype=torch.bool)
    for row, (first, length) in zip(mask, pairs, strict=True):
        row[first : first + length] = False
    return mask


def as_float(mask: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.zeros(mask.shape, dtype=dtype).masked_fill(mask, -torch.inf)


@pytest.mark.parametrize("dtype", [torch.bool, torch.float32, torch.float16, torch.float64])
def test_what_a_row_keeps(dtype: torch.dtype, device: str) -> None:
    mask = mask_of(STRETCHES, 5)
    given = mask if dtype is torch.bool else as_float(mask, dtype)
    pairs = seq_lens_of_mask(given.to(device))
    assert [tuple(pair) for pair in pairs.tolist()] == STRETCHES
    assert pairs.dtype is torch.int64 and pairs.device.type == "cpu"
    kept = kept_rows(pairs, torch.arange(5, device=device))
    assert torch.equal(kept.cpu(), ~mask[:, :, None])


def test_a_mask_may_be_lists() -> None:
    mask = mask_of(STRETCHES, 5)
    assert torch.equal(seq_lens_of_mask(mask.tolist()), seq_lens_of_mask(mask))
    assert torch.equal(seq_lens_of_mask(mask.numpy()), seq_lens_of_mask(mask))


def test_a_batch_without_positions_has_none() -> None:
    assert seq_lens_of_mask(torch.zeros(3, 0, dtype=torch.bool)).tolist() == [[0, 0]] * 3
    assert seq_lens_of_mask(torch.zeros(0, 4, dtype=torch.bool)).shape == (0, 2)


def with_value(value: float) -> Tensor:
    mask = as_float(mask_of(STRETCHES, 5), torch.float32)
    mask[1, 0] = value
    return mask


HOLES = torch.tensor([[0, 0, 1, 1], [0, 1, 0, 1], [1, 1, 1, 1]], dtype=torch.bool)


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        (HOLES, ValueError, "key_padding_mask must keep one stretch .*together.* in row 1"),
        (as_float(HOLES, torch.float32), ValueError, "must keep one stretch of each row.* row 1"),
        (with_value(-1e9), ValueError, "must hold True and False, or 0 and -inf, got .* row 1"),
        (with_value(1.0), ValueError, "key_padding_mask must hold .* row 1"),
        (with_value(torch.nan), ValueError, "key_padding_mask must hold .* row 1"),
        (with_value(torch.inf), ValueError, "key_padding_mask must hold .* row 1"),
        (HOLES.long(), TypeError, "must be bool or floating, got torch.int64"),
        ([[0, 1]], TypeError, r"must be bool or floating, got \[\[0, 1\]\]"),
        ("mask", TypeError, "key_padding_mask must be bool or floating, got 'mask'"),
        ([[True], [True, False]], TypeError, "key_padding_mask must be bool or floating"),
        (HOLES[0], ValueError, r"key_padding_mask must be \[batch, seq_len\], got shape \(4,\)"),
    ],
)
def test_other_masks_are_refused(given: Any, error: Any, message: str) -> None:
    with pytest.raises(error, match=message):
        seq_lens_of_mask(given)
