"""V3: V2 with a cache of two tiers, and what may be announced to it."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch

from dilated_attention_pytorch import (
    PatternCache,
    RingDilatedAttentionV3,
    TieredPatternCache,
    default_pattern_cache,
    default_tiered_pattern_cache,
    dilated_attention,
)
from tests.conftest import make_qkv

BRANCHES = ([16, 32, 96], [1, 2, 4])


def make(**options: object) -> RingDilatedAttentionV3:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        return RingDilatedAttentionV3(*BRANCHES, **options)


def test_modules_share_the_process_cache_with_two_tiers():
    q, k, v = make_qkv(47)
    one, other = make(), copy.deepcopy(make())
    assert one.pattern_cache is other.pattern_cache is default_tiered_pattern_cache()
    before = default_tiered_pattern_cache().statistics()
    plain = default_pattern_cache().statistics()
    for module in (one, other, one):
        out = module(q, k, v)
    assert torch.equal(out, dilated_attention(q, k, v, *BRANCHES, pattern_cache=False))
    after = default_tiered_pattern_cache().statistics()
    assert after.hits + after.misses == before.hits + before.misses + 3
    assert after.hits >= before.hits + 2
    assert default_pattern_cache().statistics() == plain


def test_without_cache_on_gpu_nothing_is_hot():
    module = make(cache_on_gpu=False)
    assert isinstance(module.pattern_cache, TieredPatternCache)
    assert module.pattern_cache.hot_bytes == 0
    assert make(cache_on_gpu=False).pattern_cache is not module.pattern_cache
    assert make(cache_on_gpu=False, use_pattern_cache=False).pattern_cache is False
    with pytest.raises(ValueError, match="cache_on_gpu must be True where a pattern_cache"):
        make(cache_on_gpu=False, pattern_cache=PatternCache())


@pytest.mark.parametrize("is_causal", [False, True])
def test_announced_calls_find_their_patterns(device, is_causal):
    cache = TieredPatternCache()
    module = make(pattern_cache=cache, head_offsets="blocked", padding="zeros")
    module.prefetch([50, 51], device, heads=4, kv_heads=2, is_causal=is_causal)
    cache.drain()
    for n in (50, 51):
        q, k, v = make_qkv(n, kv_heads=2, dtype=torch.float32, device=device)
        module(q, k, v, is_causal)
    statistics = cache.statistics()
    assert (statistics.hits, statistics.misses, statistics.size) == (2, 0, 2)
    assert statistics.prefetch_hits == (2 if device == "cuda" else 0)


def test_announcing_needs_a_cache():
    with pytest.raises(
        ValueError, match="pattern_cache must be a cache, and group None, .* got False and None"
    ):
        make(use_pattern_cache=False).prefetch([50], "cpu", heads=4)
