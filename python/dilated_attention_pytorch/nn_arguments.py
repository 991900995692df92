"""What callers of nn.MultiheadAttention pass, nn.TransformerEncoderLayer among them."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.compiler import is_compiling

from .ragged import Mask, SeqLens, as_mask, seq_lens_of_mask, stretches
from .ring import Sharding


class NoFusedKernel:
    """What nn.TransformerEncoder finds as in_proj_weight: no tensor for its own fused kernel.

    It asks whether any of its layers' tensors overrides functions, and if so calls the layers.
    """

    @classmethod
    def __torch_function__(cls, *_: Any, **__: Any) -> Any:
        return NotImplemented


def check_weights_and_mask(need_weights: bool, attn_mask: Tensor | None, is_causal: bool) -> None:
    """Raises ValueError where weights are asked for, or attn_mask masks and isn't the causal one.

    Of an attn_mask on a GPU the host waits for one number.
    """
    if need_weights:
        raise ValueError(
            "need_weights must be False, as no weights are kept (plot_pattern shows who attends to "
            f"whom, dilated_attention's return_lse the denominators), got {need_weights}"
        )
    if attn_mask is None or is_causal:
        return
    if not isinstance(attn_mask, Tensor):
        raise TypeError(f"attn_mask must be a tensor or None, got {type(attn_mask).__name__}")
    if is_compiling() or attn_mask.any():
        raise ValueError(
            "attn_mask must mask nothing, or be the causal mask with is_causal=True; for padding "
            "give key_padding_mask or seq_lens, for other masks use FlexAttention, "
            f"got shape {tuple(attn_mask.shape)}"
        )


def padding_of(
    query: Tensor,
    key_padding_mask: Mask | None,
    seq_lens: SeqLens | None,
    sharding: Sharding | None = None,
) -> Tensor | None:
    """int64 [batch, 2] on the CPU, first position and length of each row; None without padding.

    query is [batch, seq_len, embed_dim], with a sharding a shard of each row. Raises TypeError and
    ValueError.
    """
    if key_padding_mask is None and seq_lens is None:
        return None
    if query.is_nested:
        given = "seq_lens" if key_padding_mask is None else "key_padding_mask"
        raise ValueError(
            f"key_padding_mask and seq_lens must be None where query is nested, got {given}"
        )
    batch, seq_len = query.shape[:2]
    if sharding is not None:
        if key_padding_mask is not None:
            raise ValueError(
                "key_padding_mask must be None where a group is given: give seq_lens, as of the "
                "whole mask by seq_lens_of_mask, got a mask"
            )
        seq_len = sum(sharding.lengths(seq_len))
    if key_padding_mask is not None:
        if seq_lens is not None:
            raise ValueError(
                f"seq_lens must be None where key_padding_mask is given, got {seq_lens!r}"
            )
        mask = as_mask(key_padding_mask)
        if mask.shape != (batch, seq_len):
            raise ValueError(
                f"key_padding_mask must be [batch, seq_len] = [{batch}, {seq_len}], "
                f"got shape {tuple(mask.shape)}"
            )
        seq_lens = seq_lens_of_mask(mask)
    return None if seq_lens is None else stretches(seq_lens, batch, seq_len)


def without_padding(kept: Tensor, query: Tensor, key: Tensor, value: Tensor) -> list[Tensor]:
    """Zeros where kept [batch, seq_len, 1] is False, in the inputs and in their gradients.

    What padding holds would else reach the projections' gradients, where 0 x NaN is NaN. Raises
    ValueError if key or value have other rows.
    """
    inputs = {"query": query, "key": key, "value": value}
    for name, x in inputs.items():
        if x.shape[:2] != query.shape[:2]:
            raise ValueError(
                f"{name} must have query's batch and seq_len, {query.size(0)} and {query.size(1)}, "
                f"got shape {tuple(x.shape)}"
            )
    masked = {x: x.where(kept, 0) for x in dict.fromkeys(inputs.values())}
    return [masked[x] for x in inputs.values()]
