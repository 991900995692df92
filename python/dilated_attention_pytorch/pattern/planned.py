"""The patterns that the operators plan and keep themselves.

A call without a pattern (under torch.compile, from C++, with `pattern_cache=False`) finds the one
that an equal call planned before. They are kept once a process, by device and whole specification;
the least recently used goes first. A forked process begins with none.
"""

from __future__ import annotations

from dataclasses import dataclass

from .. import _C
from .bounds import at_least


@dataclass(frozen=True, slots=True)
class PlannedPatternCounts:
    """A snapshot of what the operators keep.

    Attributes:
        entries, bytes: patterns held, and their words.
        pinned_entries, pinned_bytes: of these, what a CUDA graph captured: it stays, as replays
            read it, and does not count towards the bounds.
        hits, misses, evictions: since `clear_planned_patterns`. A call that waits for another
            thread's plan is a hit.
    """

    entries: int
    bytes: int
    pinned_entries: int
    pinned_bytes: int
    hits: int
    misses: int
    evictions: int


def planned_pattern_counts() -> PlannedPatternCounts:
    """What the operators of this process hold and have counted."""
    return PlannedPatternCounts(**_C.planned_pattern_counts())


def resize_planned_patterns(*, max_entries: int = 128, max_bytes: int = 256 * 2**20) -> None:
    """Bounds what the operators keep, and drops what no longer fits; 0 for nothing.

    Raises:
        TypeError, ValueError: not an integer, or below 0.
    """
    _C.resize_planned_patterns(
        at_least(0, max_entries, "max_entries"), at_least(0, max_bytes, "max_bytes")
    )


def clear_planned_patterns() -> None:
    """Drops all but what CUDA graphs captured, and all counts."""
    _C.clear_planned_patterns()
