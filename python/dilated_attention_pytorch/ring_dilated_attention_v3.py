"""RingDilatedAttentionV3: deprecated, V2 with a cache of two tiers."""

from __future__ import annotations

import warnings
from collections.abc import Sequence

import torch

from .functional import CacheArgument
from .pattern import (
    HeadOffsets,
    Padding,
    TieredPatternCache,
    default_tiered_pattern_cache,
)
from .ring_dilated_attention_v2 import RingDilatedAttentionV2


class RingDilatedAttentionV3(RingDilatedAttentionV2):
    """Deprecated: it is `RingDilatedAttentionV2` with a `TieredPatternCache`, and nothing else.

    Use V2, with that cache where every step has a length that is new and known a step ahead;
    docs/caches.md has the measurements.

    Args:
        cache_on_gpu: False keeps no pattern on the GPU: each call copies its own there.
        pattern_cache: the cache to use; None for `default_tiered_pattern_cache()` or, without
            cache_on_gpu, for one of the module's own.
        Others: as in `RingDilatedAttentionV2`.

    Raises:
        TypeError, ValueError: naming the argument, what must hold and what was given.
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
            "cache_on_gpu, and with pattern_cache=TieredPatternCache() where every step has a "
            "length that is new and known a step ahead.",
            DeprecationWarning,
            stacklevel=2,
        )
        if not cache_on_gpu:
            if pattern_cache is not None:
                raise ValueError(
                    "cache_on_gpu must be True where a pattern_cache is given, got False"
                )
            pattern_cache = TieredPatternCache(hot_bytes=0) if use_pattern_cache else None
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

    @property
    def pattern_cache(self) -> CacheArgument:
        """What the constructor was given, or the process's cache with two tiers."""
        return default_tiered_pattern_cache() if self._given is None else self._given

    @pattern_cache.setter
    def pattern_cache(self, cache: CacheArgument) -> None:
        self._given = cache
