"""torch.ops.dilated.segment_attention: one branch."""

from __future__ import annotations

from torch import Tensor

from .typed import operator


@operator
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
    raise NotImplementedError
