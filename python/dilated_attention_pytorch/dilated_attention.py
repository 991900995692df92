"""Dilated attention as a module without parameters."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

from .decoding import DilatedKVCache
from .decoding.module_step import append_and_attend
from .functional import (
    CacheArgument,
    attend,
    check_cache,
    check_dropout,
    check_ring_cache,
    check_scale,
    make_spec,
)
from .pattern import HeadOffsets, Padding, Pattern, PatternSpec, Scheme, current_pattern_cache
from .pattern.bounds import at_least
from .ragged import SeqLens, layout_of
from .ring import Group, Sharding, ShardLayout, Strategy, telling


class DilatedAttention(nn.Module):
    """`dilated_attention` as a module that holds its settings; LongNet, arXiv 2307.02486.

    Args:
        segment_lengths, dilation_rates, head_offsets, scale, padding, pattern_cache: as in
            `dilated_attention`; checked here, once.
        dropout: probability of dropping an attention weight, in training mode only.
        device, dtype: accepted like other modules' and ignored: there are no parameters, and inputs
            may be on any device and of any supported dtype.
        group, shard_lengths, strategy, shard_layout: as in `dilated_attention`; the input is then
            this rank's rows. The module keeps the group's name, not the group: copies use the same
            group, and a process that unpickles one must have a group of that name.

    Raises:
        TypeError, ValueError: naming the argument, what must hold and what was given.
    """

    def __init__(
        self,
        segment_lengths: Sequence[int],
        dilation_rates: Sequence[int],
        *,
        head_offsets: HeadOffsets = "interleaved",
        scale: float | None = None,
        padding: Padding = "masked",
        dropout: float = 0.0,
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None,
        pattern_cache: CacheArgument = None,
        group: Group | None = None,
        shard_lengths: Sequence[int] | None = None,
        strategy: Strategy = "auto",
        shard_layout: ShardLayout = "contiguous",
    ) -> None:
        super().__init__()
        self.scheme = Scheme.make(segment_lengths, dilation_rates, head_offsets, padding)
        self.scale = check_scale(scale)
        self.dropout = check_dropout(dropout)
        self.pattern_cache = check_cache(pattern_cache)
        self.sharding = Sharding.make(group, shard_lengths, strategy, shard_layout)
        if self.sharding is not None:
            check_ring_cache(self.pattern_cache)

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *,
        is_causal: bool = False,
        seq_lens: SeqLens | None = None,
        kv_cache: DilatedKVCache | None = None,
    ) -> Tensor:
        """query [batch, seq_len, heads, head_dim] -> the same shape.

        key and value: [batch, seq_len, kv_heads, head_dim]. seq_lens, nested tensors: as in
        `dilated_attention`. kv_cache: holds the positions before these, which are appended to it;
        is_causal must be True, and seq_lens None. Raises TypeError and ValueError.
        """
        with telling(self.sharding):
            if kv_cache is not None:
                return append_and_attend(
                    kv_cache,
                    query,
                    key,
                    value,
                    self.scheme,
                    is_causal=is_causal,
                    scale=self.scale,
                    dropout_p=self.dropout if self.training else 0.0,
                    group=self.sharding,
                    seq_lens=seq_lens,
                )
            out, _ = attend(
                query,
                key,
                value,
                self.scheme,
                is_causal=is_causal,
                scale=self.scale,
                dropout_p=self.dropout if self.training else 0.0,
                pattern_cache=self.pattern_cache,
                sharding=self.sharding,
                seq_lens=seq_lens,
            )
        return out

    def prefetch(
        self,
        seq_lens: Iterable[int],
        device: torch.device | str,
        *,
        heads: int,
        kv_heads: int | None = None,
        is_causal: bool = False,
    ) -> None:
        """Plans the patterns of these lengths and copies them to `device`, in the background.

        A call that comes earlier waits only for its own pattern. heads, kv_heads: of query, and of
        key and value; kv_heads is heads by default.

        Raises:
            ValueError: the module has a group or no cache, or the numbers fit no pattern.
            RuntimeError: a CUDA graph is being captured.
        """
        kv_heads = heads if kv_heads is None else kv_heads
        # Elements of a tensor are no keys that a cache finds again.
        lengths = [at_least(0, n, "seq_lens") for n in seq_lens]
        specs = [make_spec(self.scheme, n, heads, kv_heads, is_causal) for n in lengths]
        self._announce(specs, device)

    def prefetch_batch(
        self,
        seq_lens: SeqLens,
        device: torch.device | str,
        *,
        heads: int,
        kv_heads: int | None = None,
        seq_len: int | None = None,
        is_causal: bool = False,
    ) -> None:
        """As `prefetch`, for one batch of several lengths, whose pattern is joined of theirs.

        seq_lens: what the call will get, or of a packed or nested batch the length of each
        sequence, one behind the other. seq_len: of a padded batch, None of others.
        """
        kv_heads = heads if kv_heads is None else kv_heads
        rows, sequences = layout_of(seq_lens, seq_len)
        assert not isinstance(sequences, torch.Tensor)
        spec = make_spec(self.scheme, rows, heads, kv_heads, is_causal, sequences)
        self._announce([spec], device)

    def _announce(self, specs: Sequence[PatternSpec], device: torch.device | str) -> None:
        cache = current_pattern_cache() if self.pattern_cache is None else self.pattern_cache
        if self.sharding is not None or cache is False:
            raise ValueError(
                "pattern_cache must be a cache, and group None, where patterns are prefetched, got "
                f"{self.pattern_cache!r} and {self.sharding!r}"
            )
        for spec in specs:
            Pattern.check(spec)
        cache.announce(specs, torch.device(device))

    def extra_repr(self) -> str:
        text = self.scheme.extra_repr()
        if self.scale is not None:
            text += f", scale={self.scale}"
        if self.dropout:
            text += f", dropout={self.dropout}"
        return text if self.sharding is None else f"{text}, {self.sharding.extra_repr()}"
