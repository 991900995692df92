"""A module's call with a cache: what must hold between the two, then append and attend."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..pattern import Scheme
from ..ragged import SeqLens, stretches
from .arguments import check_rows
from .kv_cache import DilatedKVCache


def append_and_attend(
    kv_cache: DilatedKVCache,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scheme: Scheme,
    *,
    is_causal: bool,
    scale: float | None,
    dropout_p: float,
    group: object,
    seq_lens: SeqLens | None,
) -> Tensor:
    """out, like query, of new positions after those in the cache.

    scheme, scale, dropout_p, group: the module's. seq_lens: as in `dilated_attention`; a text gets
    the rows that are not padding, which may be before them or behind. Raises TypeError and
    ValueError where the cache is for another pattern, or the call is none that a cache can answer.
    """
    if not isinstance(kv_cache, DilatedKVCache):
        raise TypeError(f"kv_cache must be a DilatedKVCache, got {type(kv_cache).__name__}")
    if group is not None:
        raise ValueError(f"kv_cache must be None where the module has a group, {group}, got one")
    if is_causal is not True:
        raise ValueError(f"is_causal must be True where kv_cache is given, got {is_causal!r}")
    if dropout_p > 0.0:
        raise ValueError(
            "dropout must be 0, or the module in evaluation mode, where kv_cache is given, "
            f"got {dropout_p}"
        )
    if kv_cache.scheme != scheme:
        _check_scheme(kv_cache, scheme)
    batch, like = kv_cache.batch_size, kv_cache._like
    check_rows(key, "key", batch, kv_cache.num_kv_heads, like)
    check_rows(query, "query", batch, kv_cache.num_heads, like, key.shape[1])  # before the append
    pairs = None if seq_lens is None else stretches(seq_lens, batch, key.shape[1])
    if pairs is None:
        kv_cache.append(key, value)
        return kv_cache.attend(query, scale=scale)
    begins = pairs[:, 0].tolist()
    key, value, query = (_rolled(x, [-begin for begin in begins]) for x in (key, value, query))
    kv_cache.append(key, value, seq_lens=pairs[:, 1])
    return _rolled(kv_cache.attend(query, scale=scale), begins)


def _rolled(rows: Tensor, shifts: Sequence[int]) -> Tensor:
    """rows [batch, n, ...], those of each batch entry moved by so many positions, round and
    round."""
    if not any(shifts):
        return rows
    moved = zip(rows.unbind(), shifts, strict=True)
    return torch.stack([row.roll(shift, 0) for row, shift in moved])


def _check_scheme(kv_cache: DilatedKVCache, scheme: Scheme) -> None:
    """All but the padding, which means nothing to a causal call."""
    heads, own = kv_cache.num_heads, kv_cache.scheme
    for name, given, wanted in (
        ("segment_lengths", own.segment_lengths, scheme.segment_lengths),
        ("dilation_rates", own.dilation_rates, scheme.dilation_rates),
        ("head_offsets", own.offset_table(heads), scheme.offset_table(heads)),
    ):
        if given != wanted:
            raise ValueError(f"kv_cache must have the module's {name}, {wanted}, got {given}")
