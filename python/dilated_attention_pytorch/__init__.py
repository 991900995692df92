"""Dilated attention (LongNet, arXiv 2307.02486) with exact gradients, on CPU and GPU."""

# First, since it loads libdilated.so, which registers the operators that the modules below use.
from ._load import cmake_prefix_path, include_path, library_path  # isort: skip
from ._load import cuda_kernels_missing, version as __version__  # isort: skip
from .attention_maps import AttentionWeights, attention_mass, attention_weights
from .decoding import DilatedKVCache, dilated_attention_with_kvcache
from .dilated_attention import DilatedAttention
from .factory import create_dilated_attention, create_multihead_dilated_attention
from .functional import dilated_attention
from .multihead_dilated_attention import MultiheadDilatedAttention
from .pattern import (
    CacheStatistics,
    PatternCache,
    TieredCacheStatistics,
    TieredPatternCache,
    current_pattern_cache,
    default_pattern_cache,
    default_tiered_pattern_cache,
    head_group_offsets,
    preset,
    suggest_branches,
    using_pattern_cache,
)
from .plot import plot_pattern
from .ragged import seq_lens_of_mask
from .ring_dilated_attention_v2 import RingDilatedAttentionV2
from .ring_dilated_attention_v3 import RingDilatedAttentionV3
from .varlen import dilated_attention_varlen

__all__ = [
    "AttentionWeights",
    "CacheStatistics",
    "DilatedAttention",
    "DilatedKVCache",
    "MultiheadDilatedAttention",
    "PatternCache",
    "RingDilatedAttentionV2",
    "RingDilatedAttentionV3",
    "TieredCacheStatistics",
    "TieredPatternCache",
    "__version__",
    "attention_mass",
    "attention_weights",
    "cmake_prefix_path",
    "create_dilated_attention",
    "create_multihead_dilated_attention",
    "cuda_kernels_missing",
    "current_pattern_cache",
    "default_pattern_cache",
    "default_tiered_pattern_cache",
    "dilated_attention",
    "dilated_attention_varlen",
    "dilated_attention_with_kvcache",
    "head_group_offsets",
    "include_path",
    "library_path",
    "plot_pattern",
    "preset",
    "seq_lens_of_mask",
    "suggest_branches",
    "using_pattern_cache",
]
