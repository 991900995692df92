"""What an attention layer of transformers calls, and the ways it goes from there."""

from __future__ import annotations

from itertools import groupby
from typing import Any

import torch
from torch import Tensor, nn

from ...decoding import dilated_attention_with_kvcache
from ...functional import dilated_attention
from ...varlen import dilated_attention_varlen
from .cache import layer_of
from .masks import Documents, Rows, read
from .settings import settings_of, without_padding

# What models hand on that says nothing about who attends to whom beyond the mask.
_UNRELATED = {
    "cache_position",
    "labels",
    "logits_to_keep",
    "num_items_in_batch",
    "output_hidden_states",
    "output_router_logits",
    "position_ids",
    "return_dict",
    "use_cache",
}
_PACKED = {"cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k"}


def attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Any,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """What an attention layer calls, with [batch, heads, seq_len, head_dim].

    key and value are all that a cache holds, with what a static one has room for; with a
    `DilatedCache` they are the new positions.

    Returns:
        [batch, seq_len, heads, head_dim], and None for the weights.
    """
    mask = read(attention_mask)
    _check(others, isinstance(mask, Documents))
    options: dict[str, Any] = {"scale": scaling, **settings_of(module.config)}
    if is_causal is None:
        config: Any = module.config
        is_causal = getattr(module, "is_causal", True) and getattr(config, "is_causal", True)
    n, keys, layer = query.shape[2], key.shape[2], layer_of(key)
    q, k, v = (x.transpose(1, 2) for x in (query, key, value))
    if isinstance(mask, Documents):
        options |= {"is_causal": bool(is_causal), "dropout_p": dropout}
        return _of_documents(q, k, v, mask, **options), None
    if mask is None and layer is None and keys > n:  # a layer called by itself
        whole = torch.tensor([[0, keys]] * len(key), dtype=torch.int64, device="cpu")
        mask = Rows(whole, keys - n)
    if layer is not None or (mask is not None and mask.begin > 0):
        _check_step(bool(is_causal), dropout)
        options = without_padding(options)
        if layer is not None:
            return layer.attend(q, k, v, mask, **options), None
        assert mask is not None
        return _over_cache(q, k, v, mask, **options), None
    if keys != n and not is_causal:
        raise ValueError(
            f"key must have query's positions, {n}, with dilated attention that is not causal, "
            f"got {keys}"
        )
    out: Tensor = dilated_attention(
        q,
        k[:, :n],
        v[:, :n],
        is_causal=bool(is_causal),
        dropout_p=dropout,
        seq_lens=None if mask is None else mask.stretches,
        **options,
    )
    return out, None


def _of_documents(
    query: Tensor, key: Tensor, value: Tensor, mask: Documents, **options: Any
) -> Tensor:
    q, k, v = (x.flatten(0, 1) for x in (query, key, value))
    out: Tensor = dilated_attention_varlen(q, k, v, mask.cu_seqlens, **options)
    return out.view(query.shape)


def _over_cache(query: Tensor, key: Tensor, value: Tensor, mask: Rows, **options: Any) -> Tensor:
    """Of queries that a full cache's keys and values lie before; rows alike at once."""
    end = mask.begin + query.shape[1]
    if key.shape[1] < end:
        raise ValueError(
            f"key must have all {end} positions of the cache and of the call, or be what "
            f"DilatedCache.update returned, got {key.shape[1]}"
        )
    out = torch.zeros_like(query, memory_format=torch.contiguous_format)
    last = 0
    for (first, length), alike in groupby(mask.stretches.tolist()):
        entries = slice(last, last := last + len(list(alike)))
        held = slice(first, first + length)
        new = slice(max(first - mask.begin, 0), first + length - mask.begin)
        if new.stop <= new.start:
            continue
        out[entries, new] = dilated_attention_with_kvcache(
            query[entries, new], key[entries, held], value[entries, held], length, **options
        )
    return out


def _check(others: dict[str, Any], is_packed: bool) -> None:
    unrelated = _UNRELATED | _PACKED if is_packed else _UNRELATED
    for name, given in others.items():
        if name not in unrelated and given is not None and given is not False:
            shown = (
                f"a tensor of shape {tuple(given.shape)}"
                if isinstance(given, Tensor)
                else repr(given)
            )
            raise ValueError(f"{name} must be None with dilated attention, got {shown}")


def _check_step(is_causal: bool, dropout: float) -> None:
    if not is_causal:
        raise ValueError("is_causal must be True where a cache is given, got False")
    if dropout > 0.0:
        raise ValueError(f"dropout must be 0 where a cache is given, got {dropout}")
