"""What the caches count."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class CacheStatistics:
    """A snapshot of a cache.

    The seconds are the host's. Hits are not timed: reading a clock twice costs about as much as a
    hit.

    Attributes:
        size: patterns held.
        bytes: of their words, on the host and on all devices.
        device_bytes: of these, on devices.
        hits, misses: look-ups of patterns that were planned already, and of others.
        evictions: patterns dropped to stay within the bounds.
        transfers: copies to devices, a batch being one.
        bytes_transferred: by them.
        planning_seconds: spent planning.
        transfer_seconds: spent enqueuing copies, or waiting for them.
        waiting_seconds: spent waiting for a plan that another thread was making.
    """

    size: int
    bytes: int
    device_bytes: int
    hits: int
    misses: int
    evictions: int
    transfers: int
    bytes_transferred: int
    planning_seconds: float
    transfer_seconds: float
    waiting_seconds: float

    @property
    def hit_rate(self) -> float:
        """hits / look-ups, 0 before the first."""
        lookups = self.hits + self.misses
        return self.hits / lookups if lookups else 0.0


@dataclass(frozen=True, slots=True)
class TieredCacheStatistics(CacheStatistics):
    """`CacheStatistics` by tier: hot is on a device, cold on the host.

    Attributes:
        hot_size: copies on devices.
        hot_hits, cold_hits: hits of patterns whose words the device had, which includes those on
            their way, and of others.
        promotions, demotions: copies that came to stay on a device, and that had to go.
        prefetches: copies that were made ahead.
        prefetch_hits, wasted_prefetches: of these, used, and dropped unused.
    """

    hot_size: int
    hot_hits: int
    cold_hits: int
    promotions: int
    demotions: int
    prefetches: int
    prefetch_hits: int
    wasted_prefetches: int

    @property
    def hot_bytes(self) -> int:
        """Bytes of the hot tiers; `bytes - hot_bytes` are the cold one's."""
        return self.device_bytes
