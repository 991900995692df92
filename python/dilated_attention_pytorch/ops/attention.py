"""torch.ops.dilated.attention and its backward."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from .typed import operator


@operator
def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    segment_lengths: Sequence[int],
    dilation_rates: Sequence[int],
    *,
    head_offsets: Tensor | None = None,
    is_causal: bool = False,
    scale: float | None = None,
    padding: str = "masked",
    dropout_p: float = 0.0,
    dropout_seed: Tensor | None = None,
    pattern: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """(out [B, N, H, D], lse [B, H, N]), both differentiable.

    head_offsets: int64 [branches, H] on the CPU, None for h mod r. scale: finite in float32
    (float64 for float64). dropout_seed: int64 [1] on query's device, needed if dropout_p > 0.
    pattern: int32 on query's device, from the planner; without one the operator plans by itself.
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
    *,
    head_offsets: Tensor | None = None,
    is_causal: bool = False,
    scale: float | None = None,
    padding: str = "masked",
    dropout_p: float = 0.0,
    dropout_seed: Tensor | None = None,
    pattern: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of query, key and value, given what `attention` was given and returned."""
    raise NotImplementedError
