"""What the caches count."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class CacheStatistics:
    """A snapshot. `size` counts patterns; `bytes` their words on the host and on all devices.

    `device_bytes` are those on devices. A look-up is a hit if the pattern was planned already, else
    a miss. `transfers` counts copies to devices, a batch being one, and `bytes_transferred` their
    bytes. The seconds are the host's: spent planning, spent enqueuing copies (or waiting for them),
    and spent waiting for a plan that another thread was making. Hits are not timed: reading a clock
    twice costs about as much as a hit.
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
    """The same, by tier: hot is on a device, cold on the host.

    `hot_size` counts copies on devices. A hit is hot if the device had the words, which includes
    those on their way. `prefetches` counts copies that were made ahead, `prefetch_hits` those that
    were then used, `wasted_prefetches` those that were dropped unused.
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
