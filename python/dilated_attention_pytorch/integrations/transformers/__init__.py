"""Hugging Face's transformers: dilated attention as an attention implementation, by name."""

from __future__ import annotations

try:
    from transformers import AttentionInterface, AttentionMaskInterface
except ImportError as error:
    raise ImportError(
        'this integration needs transformers: pip install "ring-dilated-attention[transformers]"'
    ) from error

from .attention import attend
from .cache import DilatedCache
from .masks import mask_of

__all__ = ["DilatedCache", "attend", "mask_of", "register"]


def register(name: str = "dilated") -> None:
    """Makes `attn_implementation=name` dilated attention in every model of transformers.

    A model's config says how: `config.dilated_attention` is a dictionary of `segment_lengths` and
    `dilation_rates`, and if need be `head_offsets` and `padding`, as in `dilated_attention`; it is
    saved with the config. For decoder and encoder models; fewer key and value heads, scaling and
    dropout are the model's. Batches may be padded on either side, or packed by position_ids that
    begin anew: positions count from the first token of a row or document, and padding gets outputs
    of 0. Decoders take transformers' caches, and `DilatedCache`. What else a model asks of
    attention (sliding windows, soft caps, biases, other masks) raises a ValueError that names it,
    in its forward.

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
