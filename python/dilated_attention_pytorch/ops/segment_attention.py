"""torch.ops.dilated.segment_attention: one branch."""

from __future__ import annotations

import torch
from torch import Tensor

_segment_attention = torch.ops.dilated.segment_attention.default


def segment_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    segment_length: int,
    dilation_rate: int,
    *,
    head_offsets: Tensor | None = None,
    is_causal: bool = False,
    scale: float | None = None,
    padding: str = "masked",
    dropout_p: float = 0.0,
    dropout_seed: Tensor | None = None,
    pattern: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """(out [B, N, H, D], lse [B, H, N]) of a single branch; head_offsets is int64 [1, H]."""
    result: tuple[Tensor, Tensor] = _segment_attention(
        query,
        key,
        value,
        segment_length,
        dilation_rate,
        head_offsets=head_offsets,
        is_causal=is_causal,
        scale=scale,
        padding=padding,
        dropout_p=dropout_p,
        dropout_seed=dropout_seed,
        pattern=pattern,
    )
    return result
