"""Creates modules by name, with the defaults of earlier packages."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from .dilated_attention import DilatedAttention
from .multihead_dilated_attention import MultiheadDilatedAttention
from .ring_dilated_attention_v2 import RingDilatedAttentionV2

AttentionType = Literal["auto", "standard", "ring"]
_TYPES: Mapping[str, type[DilatedAttention]] = {
    "auto": RingDilatedAttentionV2,
    "standard": DilatedAttention,
    "ring": RingDilatedAttentionV2,
}
_SEGMENT_LENGTHS = (2048, 4096, 8192)
_DILATION_RATES = (1, 2, 4)


def create_dilated_attention(
    attention_type: AttentionType = "auto",
    *,
    segment_lengths: Sequence[int] | None = None,
    dilation_rates: Sequence[int] | None = None,
    **options: Any,
) -> DilatedAttention:
    """An attention module, [batch, seq_len, heads, head_dim] -> the same.

    Args:
        attention_type: "standard" for `DilatedAttention`; "ring" and "auto" for
            `RingDilatedAttentionV2`.
        segment_lengths, dilation_rates: [2048, 4096, 8192] and [1, 2, 4] by default; give both or
            neither.
        options: any other argument of the class.

    Raises:
        TypeError: an option that the class does not have.
        ValueError: an unknown type, one of the two lists without the other, or a bad value.
    """
    attention_class = _class_of(attention_type)
    lengths, rates = _branches(segment_lengths, dilation_rates)
    _refuse_unknown("create_dilated_attention", options, _keywords(attention_class))
    return attention_class(lengths, rates, **options)


def create_multihead_dilated_attention(
    attention_type: AttentionType = "auto",
    embed_dim: int = 768,
    num_heads: int = 12,
    segment_lengths: Sequence[int] | None = None,
    dilation_rates: Sequence[int] | None = None,
    **options: Any,
) -> MultiheadDilatedAttention:
    """`MultiheadDilatedAttention` around the module that `create_dilated_attention` makes.

    Args:
        attention_type, segment_lengths, dilation_rates: as in `create_dilated_attention`.
        embed_dim, num_heads: as in `MultiheadDilatedAttention`.
        options: any other argument of `MultiheadDilatedAttention` or of the inner class.

    Raises:
        TypeError: an option that neither class has.
        ValueError: an unknown type, one of the two lists without the other, or a bad value.
    """
    inner = _keywords(_class_of(attention_type))
    outer = _keywords(MultiheadDilatedAttention)
    _refuse_unknown("create_multihead_dilated_attention", options, inner | outer)
    lengths, rates = _branches(segment_lengths, dilation_rates)
    module = MultiheadDilatedAttention(
        embed_dim,
        num_heads,
        lengths,
        rates,
        **{name: value for name, value in options.items() if name in outer},
    )
    module.attention = create_dilated_attention(
        attention_type,
        segment_lengths=lengths,
        dilation_rates=rates,
        **{name: value for name, value in options.items() if name in inner},
    )
    return module


def _class_of(attention_type: AttentionType) -> type[DilatedAttention]:
    if not isinstance(attention_type, str) or attention_type not in _TYPES:
        raise ValueError(f"attention_type must be one of {list(_TYPES)}, got {attention_type!r}")
    return _TYPES[attention_type]


def _branches(
    segment_lengths: Sequence[int] | None, dilation_rates: Sequence[int] | None
) -> tuple[Sequence[int], Sequence[int]]:
    if segment_lengths is None and dilation_rates is None:
        return _SEGMENT_LENGTHS, _DILATION_RATES
    if segment_lengths is None or dilation_rates is None:
        raise ValueError(
            "segment_lengths and dilation_rates must be given together, "
            f"got {segment_lengths} and {dilation_rates}"
        )
    return segment_lengths, dilation_rates


def _keywords(module_class: type) -> set[str]:
    """The arguments that may be given as options: all but those that the factories name."""
    named = {"self", "embed_dim", "num_heads", "segment_lengths", "dilation_rates"}
    return set(inspect.signature(module_class).parameters) - named


def _refuse_unknown(function: str, options: Mapping[str, Any], known: set[str]) -> None:
    unknown = [name for name in options if name not in known]
    if unknown:
        raise TypeError(
            f"{function}'s keyword arguments must be among {sorted(known)}, got {unknown}"
        )
