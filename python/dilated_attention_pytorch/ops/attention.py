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

    query [B, N, H, D], key and value [B, N, Hkv, D]; segment_lengths and dilation_rates are w and r
    of each branch, options those of `PatternOptions`. Raises ValueError, naming the argument, and
    NotImplementedError on a GPU where the build has no CUDA kernels.
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
    """Gradients of query, key and value, from what `attention` took and returned.

    grad_out [B, N, H, D]; grad_lse [B, H, N], None for zeros. Raises as `attention` does.
    """
    raise NotImplementedError
