"""RingDilatedAttentionV2: dilated attention with a simple cache of patterns."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .decoding import DilatedKVCache
from .dilated_attention import DilatedAttention
from .functional import CacheArgument
from .pattern import HeadOffsets, Padding
from .ragged import SeqLens
from .ring import Group, ShardLayout, Strategy, group_size


class RingDilatedAttentionV2(DilatedAttention):
    """The recommended implementation; "ring" and "auto" in the factories select it.

    Patterns are planned on the host, copied once to each device that uses them and kept in one
    bounded cache. With a group the sequence is sharded over its processes. LongNet, arXiv
    2307.02486, eqs. 3-10.

    Args:
        segment_lengths, dilation_rates, dropout, device, dtype, head_offsets, scale, padding: as in
            `DilatedAttention`.
        ring_size: processes that share the sequence: None, or as many as the group has, 1 without
            a group.
        use_pattern_cache: False means `pattern_cache=False`.
        pattern_cache: the cache to use; None means `current_pattern_cache()`.
        group, shard_lengths, strategy, shard_layout: as in `DilatedAttention`.

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
        *,
        head_offsets: HeadOffsets = "interleaved",
        scale: float | None = None,
        padding: Padding = "masked",
        pattern_cache: CacheArgument = None,
        group: Group | None = None,
        shard_lengths: Sequence[int] | None = None,
        strategy: Strategy = "auto",
        shard_layout: ShardLayout = "contiguous",
    ) -> None:
        if group is None and ring_size is not None and ring_size != 1:
            raise ValueError(
                "ring_size must be None or 1: several processes need a torch.distributed process "
                f"group with that many ranks, and none is given; got {ring_size}"
            )
        if pattern_cache is not None and pattern_cache is not False and not use_pattern_cache:
            raise ValueError(
                "use_pattern_cache must be True where a pattern_cache is given, got False"
            )
        super().__init__(
            segment_lengths,
            dilation_rates,
            head_offsets=head_offsets,
            scale=scale,
            padding=padding,
            dropout=dropout,
            device=device,
            dtype=dtype,
            pattern_cache=pattern_cache if use_pattern_cache else False,
            group=group,
            shard_lengths=shard_lengths,
            strategy=strategy,
            shard_layout=shard_layout,
        )
        self.ring_size = 1 if self.sharding is None else group_size(self.sharding.group_name)
        if ring_size is not None and ring_size != self.ring_size:
            raise ValueError(
                f"ring_size must be None or the group's size, {self.ring_size}, got {ring_size}"
            )

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        is_causal: bool = False,
        *,
        seq_lens: SeqLens | None = None,
        kv_cache: DilatedKVCache | None = None,
    ) -> Tensor:
        """As `DilatedAttention.forward`; is_causal may be given by position."""
        return super().forward(
            query, key, value, is_causal=is_causal, seq_lens=seq_lens, kv_cache=kv_cache
        )
