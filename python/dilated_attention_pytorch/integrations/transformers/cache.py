"""A cache of transformers that keeps only what some later query can meet."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin

from ...decoding import DilatedKVCache
from .masks import Rows

_MARK = "_dilated_cache_layer"  # of keys: their layer's cache, which layers don't hand on


class DilatedCache(Cache):  # type: ignore[misc, unused-ignore]
    """The cache of a decoder with dilated attention, `DilatedKVCache`, for each of its layers.

    For `generate` and a model's forward, as their cache. Its memory and the time of a step don't
    grow with the text (docs/decoding.md). Batches may be padded on the left. What takes positions
    back (assisted decoding, `crop`) is refused.

    Args:
        max_seq_len: the longest text, which bounds segments longer than it.
    """

    def __init__(self, *, max_seq_len: int | None = None) -> None:
        super().__init__(layer_class_to_replicate=partial(DilatedCacheLayer, max_seq_len))

    @property
    def nbytes(self) -> int:
        """Bytes of the rows that are kept, of all layers."""
        return sum(layer.nbytes for layer in self.layers)

    def activate_past_recording(self) -> None:
        """What assisted decoding calls first: refused."""
        raise ValueError(
            "cache must keep positions that may be taken back, as in assisted decoding, got a "
            "DilatedCache, whose earlier rows are overwritten: leave it to transformers' own"
        )

    def crop(self, tokens_to_remove: int) -> None:
        """Refused, except for 0: earlier rows are overwritten."""
        if tokens_to_remove != 0:
            raise ValueError(
                "tokens_to_remove must be 0 for a DilatedCache, whose earlier rows are "
                f"overwritten, got {tokens_to_remove}"
            )


class DilatedCacheLayer(CacheLayerMixin):  # type: ignore[misc, unused-ignore]
    """Of one layer. `update` notes that positions come, `attend` appends and attends them."""

    is_sliding = False
    is_compileable = False
    is_croppable = False
    supports_early_init = False

    def __init__(self, max_seq_len: int | None = None) -> None:
        super().__init__()
        self.max_seq_len = max_seq_len
        self.kv_cache: DilatedKVCache | None = None
        self.seen = 0  # positions, padding included
        self.waiting = 0  # of them, those that were not attended

    @property
    def nbytes(self) -> int:
        return 0 if self.kv_cache is None else self.kv_cache.nbytes

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """The new keys and values as they are; [batch, kv_heads, n, head_dim]."""
        if self.waiting > 0:
            raise ValueError(
                "attn_implementation must be dilated attention's name, and attend each position "
                f"once, with a DilatedCache, got {self.waiting} that it did not attend"
            )
        self.waiting = key_states.shape[-2]
        self.seen += self.waiting
        marked = key_states.view_as(key_states)
        setattr(marked, _MARK, self)
        return marked, value_states

    def attend(
        self, query: Tensor, key: Tensor, value: Tensor, mask: Rows | None, **options: Any
    ) -> Tensor:
        """Appends what `update` got, [batch, n, heads, head_dim], and attends; like query."""
        batch, n = query.shape[:2]
        scale = options.pop("scale")
        if self.kv_cache is None:
            self.kv_cache = DilatedKVCache(
                batch,
                *key.shape[2:],
                num_heads=query.shape[2],
                max_seq_len=self.max_seq_len,
                dtype=key.dtype,
                device=key.device,
                **options,
            )
        pairs = [(0, self.seen)] * batch if mask is None else mask.stretches.tolist()
        begin = self.seen - n
        skipped = [max(first - begin, 0) for first, _ in pairs]  # padding before the tokens
        ends = [first + length - begin for first, length in pairs]
        counts = [max(end - skip, 0) for end, skip in zip(ends, skipped, strict=True)]
        self._check_lengths([length for _, length in pairs], counts)
        if any(skipped):
            query, key, value = (_rolled(x, skipped, -1) for x in (query, key, value))
        self.kv_cache.append(key, value, seq_lens=None if min(counts) == n else counts)
        out = self.kv_cache.attend(query, scale=scale)
        self.waiting = 0
        return _rolled(out, skipped, 1) if any(skipped) else out

    def _check_lengths(self, lengths: Sequence[int], counts: Sequence[int]) -> None:
        assert self.kv_cache is not None
        for present, more, length in zip(self.kv_cache.lengths, counts, lengths, strict=True):
            if present + more != length:
                raise ValueError(
                    "attention_mask must keep all tokens in the cache and the new ones, "
                    f"{present} and {more}, got {length}"
                )

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.seen + query_length, 0

    def get_seq_length(self) -> int:
        return self.seen

    def get_max_length(self) -> int:
        return -1 if self.max_seq_len is None else self.max_seq_len

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Nothing: the first `attend` knows the model's settings."""

    def reset(self) -> None:
        self.kv_cache, self.seen, self.waiting = None, 0, 0

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self.batch_select_indices(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        if self.kv_cache is not None:
            self.kv_cache.reorder(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        if self.kv_cache is not None:
            entries = torch.arange(self.kv_cache.batch_size, device="cpu")
            self.kv_cache.reorder(entries.repeat_interleave(repeats))


def layer_of(key: Tensor) -> DilatedCacheLayer | None:
    """The cache that keys came from; None where it is none of ours."""
    layer: DilatedCacheLayer | None = getattr(key, _MARK, None)
    return layer


def _rolled(x: Tensor, steps: Sequence[int], sign: int) -> Tensor:
    """Row b moved by steps[b] positions, backwards where sign is -1, and round the end."""
    n = x.shape[1]
    shift = torch.tensor(steps, dtype=torch.int64)[:, None] * sign
    places = (torch.arange(n) - shift) % n
    index = places.to(x.device)[:, :, None, None].expand(x.shape)
    return x.gather(1, index)
