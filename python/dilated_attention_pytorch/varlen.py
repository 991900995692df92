"""Dilated attention of packed sequences as a function."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, overload

from torch import Tensor

from .functional import CacheArgument, attend, check_cache, check_dropout, check_scale
from .pattern import HeadOffsets, Padding, Scheme
from .ragged import of_offsets
from .ring import Group, Sharding, ShardLayout, Strategy, telling


@overload
def dilated_attention_varlen(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seqlens: Sequence[int] | Tensor,
    segment_lengths: Sequence[int],
    dilation_rates: Sequence[int],
    *,
    head_offsets: HeadOffsets = ...,
    is_causal: bool = ...,
    scale: float | None = ...,
    padding: Padding = ...,
    dropout_p: float = ...,
    return_lse: Literal[False] = ...,
    pattern_cache: CacheArgument = ...,
    group: Group | None = ...,
    shard_lengths: Sequence[int] | None = ...,
    strategy: Strategy = ...,
    shard_layout: ShardLayout = ...,
) -> Tensor: ...
@overload
def dilated_attention_varlen(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seqlens: Sequence[int] | Tensor,
    segment_lengths: Sequence[int],
    dilation_rates: Sequence[int],
    *,
    head_offsets: HeadOffsets = ...,
    is_causal: bool = ...,
    scale: float | None = ...,
    padding: Padding = ...,
    dropout_p: float = ...,
    return_lse: Literal[True],
    pattern_cache: CacheArgument = ...,
    group: Group | None = ...,
    shard_lengths: Sequence[int] | None = ...,
    strategy: Strategy = ...,
    shard_layout: ShardLayout = ...,
) -> tuple[Tensor, Tensor]: ...
@overload
def dilated_attention_varlen(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seqlens: Sequence[int] | Tensor,
    segment_lengths: Sequence[int],
    dilation_rates: Sequence[int],
    *,
    head_offsets: HeadOffsets = ...,
    is_causal: bool = ...,
    scale: float | None = ...,
    padding: Padding = ...,
    dropout_p: float = ...,
    return_lse: bool,
    pattern_cache: CacheArgument = ...,
    group: Group | None = ...,
    shard_lengths: Sequence[int] | None = ...,
    strategy: Strategy = ...,
    shard_layout: ShardLayout = ...,
) -> Tensor | tuple[Tensor, Tensor]: ...
def dilated_attention_varlen(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seqlens: Sequence[int] | Tensor,
    segment_lengths: Sequence[int],
    dilation_rates: Sequence[int],
    *,
    head_offsets: HeadOffsets = "interleaved",
    is_causal: bool = False,
    scale: float | None = None,
    padding: Padding = "masked",
    dropout_p: float = 0.0,
    return_lse: bool = False,
    pattern_cache: CacheArgument = None,
    group: Group | None = None,
    shard_lengths: Sequence[int] | None = None,
    strategy: Strategy = "auto",
    shard_layout: ShardLayout = "contiguous",
) -> Tensor | tuple[Tensor, Tensor]:
    """`dilated_attention` of many sequences in one call, packed one behind the other.

    Each is as if it were called alone: its own positions from 0, its own segments and lattices,
    clipped to its own length; nothing crosses from one to another. The inputs are those of
    flash-attn's flash_attn_varlen_func and torch.nn.attention.varlen.

    Args:
        query: [total, heads, head_dim]; dtypes as in `dilated_attention`.
        key, value: [total, kv_heads, head_dim], in the same places as query.
        cu_seqlens: [sequences + 1], integers: sequence s has the rows from cu_seqlens[s] on, up to
            cu_seqlens[s + 1]. They begin with 0 and don't descend. Rows behind the last are
            padding, which may hold anything: their out is 0, their lse -inf, their gradients are 0.
            A list or a tensor, on the CPU; for one on a GPU the host waits once a call. Under
            torch.compile give a tensor: one program then serves all lengths of the same number.
        group: its ranks hold all these rows one after another, and query, key and value are this
            rank's; a sequence may cross ranks. cu_seqlens are of all rows, alike on all ranks.
        Others: as in `dilated_attention`.

    Returns:
        out, like query; with return_lse (out, lse), lse being [heads, total], float32 (float64 for
        float64). Both are differentiable.

    Raises:
        TypeError, ValueError: naming the argument, what must hold and what was given.
        RuntimeError: a CUDA graph is being captured and the pattern is not on the GPU yet.
    """
    with telling(group):
        scheme = Scheme.recall(segment_lengths, dilation_rates, head_offsets, padding)
        scale = check_scale(scale)
        dropout_p = check_dropout(dropout_p, "dropout_p")
        check_cache(pattern_cache)
        for x, name in ((query, "query"), (key, "key"), (value, "value")):
            if not isinstance(x, Tensor):
                raise TypeError(f"{name} must be a tensor, got {type(x).__name__}")
            if x.is_nested or x.dim() != 3:
                given = "a nested tensor" if x.is_nested else f"shape {tuple(x.shape)}"
                raise ValueError(f"{name} must be [total, heads, head_dim], got {given}")
        sharding = Sharding.make(group, shard_lengths, strategy, shard_layout)
        rows = query.size(0)
        out, lse = attend(
            query[None],
            key[None],
            value[None],
            scheme,
            is_causal=is_causal,
            scale=scale,
            dropout_p=dropout_p,
            pattern_cache=pattern_cache,
            sharding=sharding,
            sequences=of_offsets(
                cu_seqlens, rows if sharding is None else sum(sharding.lengths(rows))
            ),
        )
    out = out.squeeze(0)  # out[0] would take a copy of the gradient, among zeros
    return (out, lse.squeeze(0)) if return_lse else out
