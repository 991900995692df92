"""RingDilatedAttentionV3: deprecated, the same as V2."""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import torch

from .functional import CacheArgument
from .pattern import HeadOffsets, Padding
from .ring_dilated_attention_v2 import RingDilatedAttentionV2


class RingDilatedAttentionV3(RingDilatedAttentionV2):
    """Deprecated: `RingDilatedAttentionV2` under its former name, with the same results.

    Args:
        cache_on_gpu: accepted and without effect: V2's cache keeps one copy of a pattern on each
            device that used it.
        Others: as in `RingDilatedAttentionV2`.
    """

    def __init__(
        self,
        segment_lengths: Sequence[int],
        dilation_rates: Sequence[int],
        dropout: float = 0.0,
        ring_size: int | None = None,
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None,
        use_pattern_cache: bool = True,
        cache_on_gpu: bool = True,
        *,
        head_offsets: HeadOffsets = "interleaved",
        scale: float | None = None,
        padding: Padding = "masked",
        pattern_cache: CacheArgument = None,
    ) -> None:
        warnings.warn(
            "RingDilatedAttentionV3 is deprecated: use RingDilatedAttentionV2 (from "
            "dilated_attention_pytorch.ring_dilated_attention_v2) with the same arguments, without "
            "cache_on_gpu.",
            DeprecationWarning,
            stacklevel=2,
        )
        super().__init__(
            segment_lengths,
            dilation_rates,
            dropout,
            ring_size,
            device,
            dtype,
            use_pattern_cache,
            head_offsets=head_offsets,
            scale=scale,
            padding=padding,
            pattern_cache=pattern_cache,
        )
