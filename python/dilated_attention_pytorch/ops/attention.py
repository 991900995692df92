"""torch.ops.dilated.attention and its backward."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor
from typing_extensions import Unpack

from .options import PatternOptions
from .typed import operator


@operator
def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    segment_lengths: Sequence[int],
    dilation_rates: Sequence[int],
    **options: Unpack[PatternOptions],
) -> tuple[Tensor, Tensor]:
    """(out [B, N, H, D], lse [B, H, N]), both differentiable.

    Options are those of `PatternOptions`.
    """
    raise NotImplementedError


@operator
def attention_backward(
    grad_out: Tensor,
    grad_lse: Tensor | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,
    segment_lengths: Sequence[int],
    dilation_rates: Sequence[int],
    **options: Unpack[PatternOptions],
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of query, key and value, from what `attention` took and returned."""
    raise NotImplementedError
