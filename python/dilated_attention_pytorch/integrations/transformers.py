"""Hugging Face's transformers: dilated attention as an attention implementation, by name."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..functional import dilated_attention
from ..ragged import seq_lens_of_mask

try:
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import bidirectional_mask_function, causal_mask_function
except ImportError as error:
    raise ImportError(
        'this integration needs transformers: pip install "ring-dilated-attention[transformers]"'
    ) from error

_SETTINGS = {"segment_lengths", "dilation_rates", "head_offsets", "padding"}
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


def register(name: str = "dilated") -> None:
    """Makes `attn_implementation=name` dilated attention in every model of transformers.

    A model's config says how: `config.dilated_attention` is a dictionary of `segment_lengths` and
    `dilation_rates`, and if need be `head_offsets` and `padding`, as in `dilated_attention`; it is
    saved with the config. For decoder and encoder models, trained or scored on whole sequences;
    fewer key and value heads, scaling and dropout are the model's. Batches may be padded on either
    side: a row's positions count from its first token, and its padding gets outputs of 0. What else
    a model asks of attention (a cache, sliding windows, soft caps, biases, other masks) raises a
    ValueError that names it, in its forward.

    Raises:
        TypeError: name is not a string.
        ValueError: it is the name of another implementation.
    """
    if not isinstance(name, str):
        raise TypeError(f"name must be a string, got {name!r}")
    if name == "eager" or AttentionInterface().get(name, attend) is not attend:
        raise ValueError(f"name must be of no other attention implementation, got {name!r}")
    AttentionInterface.register(name, attend)
    AttentionMaskInterface.register(name, mask_of)


def attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """What an attention layer calls, with [batch, heads, seq_len, head_dim].

    Returns:
        [batch, seq_len, heads, head_dim], and None for the weights.
    """
    for name, given in others.items():
        if name not in _UNRELATED and given is not None and given is not False:
            raise ValueError(f"{name} must be None with dilated attention, got {_shown(given)}")
    if attention_mask is not None and attention_mask.dtype != torch.int64:  # none of mask_of's
        raise ValueError(
            "attention_mask must be [batch, seq_len] or None with dilated attention, "
            f"got {_shown(attention_mask)}"
        )
    config: Any = module.config
    if getattr(config, "is_encoder_decoder", False) or getattr(
        config, "add_cross_attention", False
    ):
        raise ValueError(
            "config must be of an encoder or a decoder with dilated attention, got "
            f"{type(config).__name__} of a model with cross-attention"
        )
    if query.shape[2] != key.shape[2]:
        raise ValueError(
            "past_key_values must be None or empty with dilated attention (generate with "
            f"use_cache=False), got {key.shape[2]} keys for {query.shape[2]} queries"
        )
    if is_causal is None:
        is_causal = getattr(module, "is_causal", True) and getattr(config, "is_causal", True)
    q, k, v = (x.transpose(1, 2) for x in (query, key, value))
    settings = _settings(config)
    out = dilated_attention(
        q,
        k,
        v,
        is_causal=bool(is_causal),
        scale=scaling,
        dropout_p=dropout,
        seq_lens=attention_mask,
        **settings,
    )
    return out, None


def mask_of(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int = 0,
    kv_offset: int = 0,
    mask_function: Any = causal_mask_function,
    attention_mask: Tensor | None = None,
    local_size: int | None = None,
    **others: Any,
) -> Tensor | None:
    """What a model calls once a forward for the mask that its layers get: `seq_lens`, or None where
    nothing is padding. The host waits for a mask on a GPU.

    Raises ValueError for a mask that dilated attention can't keep to.
    """
    if local_size is not None:
        raise ValueError(
            f"sliding_window must be None with dilated attention, got a window of {local_size}"
        )
    if mask_function not in (causal_mask_function, bidirectional_mask_function):
        raise ValueError(
            "the model's mask must be causal or none with dilated attention, without packed "
            f"position_ids, windows and masks of its own, got {mask_function.__qualname__}"
        )
    if attention_mask is None or attention_mask.all():
        return None
    return seq_lens_of_mask(~attention_mask)


def _settings(config: Any) -> dict[str, Any]:
    settings = getattr(config, "dilated_attention", None)
    if not isinstance(settings, dict):
        raise ValueError(
            "config.dilated_attention must be a dictionary of segment_lengths and dilation_rates, "
            f"got {settings!r}"
        )
    needed = {"segment_lengths", "dilation_rates"}
    if not needed <= settings.keys() <= _SETTINGS:
        raise ValueError(
            "config.dilated_attention must have segment_lengths and dilation_rates, and may have "
            f"head_offsets and padding, got {sorted(settings)}"
        )
    return settings


def _shown(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"a tensor of shape {tuple(value.shape)}"
    return repr(value)
