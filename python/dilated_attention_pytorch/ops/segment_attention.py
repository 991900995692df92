"""torch.ops.dilated.segment_attention: one branch."""

from __future__ import annotations

from torch import Tensor
from typing_extensions import Unpack

from .options import PatternOptions
from .typed import operator


@operator
def segment_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    segment_length: int,
    dilation_rate: int,
    **options: Unpack[PatternOptions],
) -> tuple[Tensor, Tensor]:
    """(out [B, N, H, D], lse [B, H, N]) of a single branch, as `attention` of lists of one.

    head_offsets is int64 [1, H].
    """
    raise NotImplementedError
