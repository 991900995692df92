"""Dilated attention of a text's last positions to an ordinary cache, which holds all of them."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from itertools import groupby
from operator import index
from typing import Any, Literal, overload

import torch
from torch import Tensor

from .. import ops
from ..functional import CacheArgument, check_cache, check_scale
from ..pattern import HeadOffsets, PatternSpec, Scheme, current_pattern_cache
from ..pattern.plain import check_plain
from .arguments import MOST_BRANCHES, check_rows, integers
from .layout import make_layout

_MOST_STEP = 16  # positions beyond which the kernels of a whole sequence are faster


@overload
def dilated_attention_with_kvcache(
    query: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    cache_seqlens: int | Sequence[int] | Tensor,
    segment_lengths: Sequence[int],
    dilation_rates: Sequence[int],
    *,
    key: Tensor | None = ...,
    value: Tensor | None = ...,
    head_offsets: HeadOffsets = ...,
    scale: float | None = ...,
    return_lse: Literal[False] = ...,
    pattern_cache: CacheArgument = ...,
) -> Tensor: ...
@overload
def dilated_attention_with_kvcache(
    query: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    cache_seqlens: int | Sequence[int] | Tensor,
    segment_lengths: Sequence[int],
    dilation_rates: Sequence[int],
    *,
    key: Tensor | None = ...,
    value: Tensor | None = ...,
    head_offsets: HeadOffsets = ...,
    scale: float | None = ...,
    return_lse: Literal[True],
    pattern_cache: CacheArgument = ...,
) -> tuple[Tensor, Tensor]: ...
def dilated_attention_with_kvcache(
    query: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    cache_seqlens: int | Sequence[int] | Tensor,
    segment_lengths: Sequence[int],
    dilation_rates: Sequence[int],
    *,
    key: Tensor | None = None,
    value: Tensor | None = None,
    head_offsets: HeadOffsets = "interleaved",
    scale: float | None = None,
    return_lse: bool = False,
    pattern_cache: CacheArgument = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Causal dilated attention of the last positions of each text to all of them, kept in a cache.

    Args:
        query: [batch, n, heads, head_dim], the last n positions, those of key included.
        key_cache, value_cache: [batch, max_seq_len, kv_heads, head_dim]; rows past a text's end may
            hold anything. Written in place where key and value are given.
        cache_seqlens: positions of each text before the append; one number is every text's. What a
            tensor on a GPU holds the host does not read where n is at most 16, so that a CUDA graph
            can capture the call, after one that it did not; it is then not checked either.
        key, value: [batch, m, kv_heads, head_dim], to be written at cache_seqlens; m may differ
            from n.
        segment_lengths, dilation_rates, head_offsets, scale, return_lse, pattern_cache: as in
            `dilated_attention`. Where n is more than 16, each length has a pattern of its own.

    Returns:
        What one causal `dilated_attention` over a text gives its last n positions, or that and the
        lse. Without gradients.

    Raises:
        TypeError, ValueError: naming the argument, what must hold and what was given.
    """
    scheme = Scheme.recall(segment_lengths, dilation_rates, head_offsets, "masked")
    scale, pattern_cache = check_scale(scale), check_cache(pattern_cache)
    _check(query, key_cache, value_cache, key, value)
    n, more = query.shape[1], 0 if key is None else key.shape[1]
    is_step = n <= _MOST_STEP and len(scheme.branches) <= MOST_BRANCHES
    room = key_cache.shape[1] - more
    with torch.no_grad(), torch.autocast(query.device.type, enabled=False):
        if is_step and isinstance(cache_seqlens, Tensor) and cache_seqlens.is_cuda:
            ends = _ends_on_device(cache_seqlens, query.shape[0]) + more
        else:
            lengths = _ends_on_host(cache_seqlens, query.shape[0], room, n - more)
            ends = torch.tensor(lengths, device=query.device) + more
        if key is not None and value is not None:
            entries = torch.arange(query.shape[0], device=query.device)[:, None]
            places = ends[:, None] + torch.arange(-more, 0, device=query.device)
            key_cache[entries, places], value_cache[entries, places] = key, value
        operands = (query, key_cache, value_cache)
        branches = (scheme.segment_lengths, scheme.dilation_rates)
        if is_step:
            # Numbers even where a compiler has symbols, as what is constant depends on them.
            heads, kv_heads = index(query.shape[2]), index(key_cache.shape[2])
            table = _table(*branches, scheme.head_offsets, heads, kv_heads, query.device)
            out, lse = ops.decode_attend(*operands, ends, table, *branches, kv_heads, scale=scale)
        else:
            known = [length + more for length in lengths]
            out, lse = _attend_blocks(*operands, known, scheme, scale, pattern_cache)
    return (out, lse) if return_lse else out


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator, unused-ignore]
def _table(*arguments: Any) -> Tensor:
    """In a compiled graph a constant; a compiler would trace through what remembers."""
    return _table_of(*arguments)


@lru_cache(maxsize=64)
def _table_of(
    segment_lengths: Sequence[int],
    dilation_rates: Sequence[int],
    head_offsets: HeadOffsets,
    heads: int,
    kv_heads: int,
    device: torch.device,
) -> Tensor:
    scheme = Scheme.make(segment_lengths, dilation_rates, head_offsets, "masked")
    layout = make_layout(scheme, heads, kv_heads, capacity=1, grown=False)
    with torch.inference_mode(False):
        return torch.tensor(layout.table, dtype=torch.int64, device=device)


def _attend_blocks(
    query: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    ends: Sequence[int],
    scheme: Scheme,
    scale: float | None,
    pattern_cache: CacheArgument,
) -> tuple[Tensor, Tensor]:
    """Texts of one length at a time."""
    parts: list[tuple[Tensor, Tensor]] = []
    first = 0
    for end, alike in groupby(ends):
        rows = slice(first, first := first + len(list(alike)))
        operands = (query[rows], key_cache[rows, :end], value_cache[rows, :end])
        parts.append(_attend(*operands, end - query.shape[1], scheme, scale, pattern_cache))
    outs, lses = zip(*parts, strict=True)
    return torch.cat(outs), torch.cat(lses)


def _attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    begin: int,
    scheme: Scheme,
    scale: float | None,
    pattern_cache: CacheArgument,
) -> tuple[Tensor, Tensor]:
    """One block: the text's positions from `begin` on over all of it."""
    end, heads = key.shape[1], query.shape[2]
    spec = PatternSpec(
        end,
        scheme.branches,
        scheme.head_offsets,
        heads,
        key.shape[2],
        is_causal=True,
        queries=(begin, end),
        keys=(0, end),
        directions="forward",
    )
    options: dict[str, Any] = {"is_causal": True, "scale": scale}
    if pattern_cache is False:
        table = torch.tensor(spec.offset_table(), dtype=torch.int64, device="cpu")
        options["head_offsets"] = table
    else:
        cache = current_pattern_cache() if pattern_cache is None else pattern_cache
        pattern, words = cache.lookup(spec, query.device)
        options |= {"head_offsets": pattern.head_offsets, "pattern": words}
    branches = (scheme.segment_lengths, scheme.dilation_rates)
    return ops.attention_block(query, key, value, end, begin, 0, *branches, **options)


def _check(
    query: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    key: Tensor | None,
    value: Tensor | None,
) -> None:
    for tensor, name in ((key_cache, "key_cache"), (query, "query")):
        check_plain(tensor, name)
        if tensor.dim() != 4 or 0 in (tensor.shape[0], tensor.shape[2]):
            raise ValueError(
                f"{name} must be [batch, seq_len, heads, head_dim], got shape {tuple(tensor.shape)}"
            )
    batch, room, kv_heads, _ = key_cache.shape
    heads = query.shape[2]
    if heads % kv_heads != 0:
        raise ValueError(
            f"query must have a multiple of key_cache's heads, {kv_heads}, got {heads}"
        )
    check_rows(key_cache, "key_cache", batch, kv_heads, key_cache)
    check_rows(value_cache, "value_cache", batch, kv_heads, key_cache, room)
    check_rows(query, "query", batch, heads, key_cache)
    if (key is None) != (value is None):
        missing, other = ("key", "value") if key is None else ("value", "key")
        raise ValueError(f"{missing} must be given where {other} is, got None")
    if key is not None and value is not None:
        check_rows(key, "key", batch, kv_heads, key_cache)
        check_rows(value, "value", batch, kv_heads, key_cache, key.shape[1])
        for tensor, name in ((key_cache, "key_cache"), (value_cache, "value_cache")):
            steps = zip(tensor.shape, tensor.stride(), strict=True)
            if any(size > 1 and step == 0 for size, step in steps):
                raise ValueError(
                    f"{name} must have a place for each row, as rows are written into it, got one "
                    f"of strides {tensor.stride()} (expanded)"
                )


def _ends_on_device(cache_seqlens: Tensor, batch: int) -> Tensor:
    fits = cache_seqlens.shape in (torch.Size([]), torch.Size([batch]))
    if not fits or cache_seqlens.is_floating_point():
        raise ValueError(
            f"cache_seqlens must be {batch} integers, one a row, got {cache_seqlens.dtype} "
            f"of shape {tuple(cache_seqlens.shape)}"
        )
    return cache_seqlens.to(torch.int64).expand(batch)


def _ends_on_host(given: Any, batch: int, room: int, least: int) -> tuple[int, ...]:
    """The lengths before the append, checked: at most `room`, at least `least`."""
    if isinstance(given, int) or getattr(given, "ndim", 1) == 0:
        given = (given,) * batch
    lengths = integers(given, "cache_seqlens", 0, room + 1, batch)
    for length in lengths:
        if length < least:
            raise ValueError(
                f"cache_seqlens must leave a text the positions of query, at least {least}, "
                f"got {length}"
            )
    return lengths
