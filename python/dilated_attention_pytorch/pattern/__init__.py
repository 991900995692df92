"""Who attends to whom: branches, specifications, planned patterns and their caches.

The floor of the package: it uses `_C`, the planner, and `_load`, and nothing else of the package.
"""

from .branch import Branch, Padding, Scheme, make_branches
from .caches.base_cache import BasePatternCache
from .caches.current_cache import (
    current_pattern_cache,
    default_pattern_cache,
    default_tiered_pattern_cache,
    using_pattern_cache,
)
from .caches.pattern_cache import PatternCache
from .caches.statistics import CacheStatistics, TieredCacheStatistics
from .caches.tiered.cache import TieredPatternCache
from .limits import max_pattern_bytes, set_max_pattern_bytes
from .offsets import HeadOffsets, head_group_offsets
from .pattern import Directions, Pattern, PatternSpec
from .planned import (
    PlannedPatternCounts,
    clear_planned_patterns,
    planned_pattern_counts,
    resize_planned_patterns,
)
from .presets import Preset, preset
from .sequences import Sequences
from .suggest import suggest_branches

__all__ = [
    "BasePatternCache",
    "Branch",
    "CacheStatistics",
    "Directions",
    "HeadOffsets",
    "Padding",
    "Pattern",
    "PatternCache",
    "PatternSpec",
    "PlannedPatternCounts",
    "Preset",
    "Scheme",
    "Sequences",
    "TieredCacheStatistics",
    "TieredPatternCache",
    "clear_planned_patterns",
    "current_pattern_cache",
    "default_pattern_cache",
    "default_tiered_pattern_cache",
    "head_group_offsets",
    "make_branches",
    "max_pattern_bytes",
    "planned_pattern_counts",
    "preset",
    "resize_planned_patterns",
    "set_max_pattern_bytes",
    "suggest_branches",
    "using_pattern_cache",
]
