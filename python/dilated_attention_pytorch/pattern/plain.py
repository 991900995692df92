"""Tensors that are rows of numbers, and nothing else."""

from __future__ import annotations

import torch
from torch import Tensor

_OTHERS = {"DTensor", "MaskedTensor"}  # by name: most programs import neither


def check_plain(tensor: Tensor, name: str) -> None:
    """Raises TypeError if it is no tensor, ValueError if nested, masked, sharded, sparse or
    quantized."""
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(tensor).__name__}")
    if type(tensor).__name__ in _OTHERS or tensor.is_nested:
        raise ValueError(f"{name} must be a plain tensor, got a {type(tensor).__name__}")
    if tensor.layout is not torch.strided or tensor.is_quantized:
        kind = "quantized" if tensor.is_quantized else str(tensor.layout).removeprefix("torch.")
        raise ValueError(f"{name} must be a plain tensor, got a {kind} one")


def refuse_masked(tensor: Tensor, name: str) -> None:
    if type(tensor).__name__ == "MaskedTensor":
        raise ValueError(
            f"{name} must be a plain tensor, with seq_lens for what is padding, got a MaskedTensor"
        )
