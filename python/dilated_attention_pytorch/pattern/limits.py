"""How large a pattern may become."""

from __future__ import annotations

from .. import _C
from .bounds import at_least


def max_pattern_bytes() -> int:
    """The most bytes that a pattern may take on the host: 512 MiB unless it was set."""
    return _C.max_pattern_bytes()


def set_max_pattern_bytes(nbytes: int) -> None:
    """Sets `max_pattern_bytes` for the whole process, the operators included.

    Planning a larger pattern raises a ValueError that names dilation_rates, and so does planning
    that takes more than nbytes + 2^24 steps, which bounds its time. Until then planning takes at
    most a few times nbytes of memory. All ranks of a group must set the same limit, or only some of
    them refuse.

    Raises:
        TypeError, ValueError: not an integer, or below 1.
    """
    _C.set_max_pattern_bytes(at_least(1, nbytes, "nbytes"))
