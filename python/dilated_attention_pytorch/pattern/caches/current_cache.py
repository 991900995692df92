"""Which cache is used where none is given: the context's, else the process's."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextvars import ContextVar

from .base_cache import BasePatternCache
from .pattern_cache import PatternCache
from .tiered.cache import TieredPatternCache

_default = PatternCache()
_default_tiered = TieredPatternCache()
_current: ContextVar[BasePatternCache] = ContextVar("pattern_cache", default=_default)


def default_pattern_cache() -> PatternCache:
    """The process's cache, used wherever no other is given."""
    return _default


def default_tiered_pattern_cache() -> TieredPatternCache:
    """The process's cache with two tiers, which `RingDilatedAttentionV3` uses."""
    return _default_tiered


def current_pattern_cache() -> BasePatternCache:
    """The cache of the innermost `using_pattern_cache`, else `default_pattern_cache()`."""
    return _current.get()


@contextlib.contextmanager
def using_pattern_cache(cache: BasePatternCache) -> Iterator[BasePatternCache]:
    """Within it, calls and modules that were given no cache use this one.

    In the calling context only (contextvars): other threads keep theirs; asyncio tasks that begin
    within it inherit it.

    Raises:
        TypeError: not a cache.
    """
    if not isinstance(cache, BasePatternCache):
        raise TypeError(
            f"cache must be a PatternCache or a TieredPatternCache, got {type(cache).__name__}"
        )
    token = _current.set(cache)
    try:
        yield cache
    finally:
        _current.reset(token)
