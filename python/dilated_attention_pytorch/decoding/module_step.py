"""A module's call with a cache: what must hold between the two, then append and attend."""

from __future__ import annotations

from torch import Tensor

from ..pattern import Scheme
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
    seq_lens: object,
) -> Tensor:
    """out, like query, of new positions after those in the cache.

    scheme, scale, dropout_p, group: the module's; seq_lens: the call's. Raises TypeError and
    ValueError where the cache is for another pattern, or the call is none that a cache can answer.
    """
    if not isinstance(kv_cache, DilatedKVCache):
        raise TypeError(f"kv_cache must be a DilatedKVCache, got {type(kv_cache).__name__}")
    if group is not None:
        raise ValueError(f"kv_cache must be None where the module has a group, {group}, got one")
    if seq_lens is not None:
        raise ValueError(
            "seq_lens, or key_padding_mask, must be None where kv_cache is given, "
            f"got {seq_lens}: DilatedKVCache.append takes them"
        )
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
    kv_cache.append(key, value)
    return kv_cache.attend(query, scale=scale)


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
