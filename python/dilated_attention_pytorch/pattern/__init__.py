"""Who attends to whom: branches, specifications, planned patterns and their cache.

The floor of the package: it stands on the planner in `_C` and on nothing else of the package.
"""

from .branch import Branch, Padding, Scheme, make_branches
from .cache import CacheStatistics, PatternCache, default_pattern_cache
from .offsets import HeadOffsets, head_group_offsets
from .pattern import Pattern, PatternSpec

__all__ = [
    "Branch",
    "CacheStatistics",
    "HeadOffsets",
    "Padding",
    "Pattern",
    "PatternCache",
    "PatternSpec",
    "Scheme",
    "default_pattern_cache",
    "head_group_offsets",
    "make_branches",
]
