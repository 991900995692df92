"""One pattern in a cache, with its words by device."""

from __future__ import annotations

import torch

from .device_words import Copy, PlainWords
from .pattern import Pattern

CPU = torch.device("cpu")


class Entry:
    """A pattern, its words by device, and how often it was looked up (less as it ages).

    `held` tells whether the cache counts it; what was evicted may still be in a caller's hands.
    """

    __slots__ = ("copies", "held", "host", "pattern", "uses")

    def __init__(self, pattern: Pattern) -> None:
        self.pattern = pattern
        self.host = PlainWords(pattern.words)
        self.copies: dict[torch.device, Copy] = {CPU: self.host}
        self.uses = 0
        self.held = False


def full_device(device: torch.device) -> torch.device:
    """The name under which copies are kept: the CPU has no index, a GPU has one."""
    if device.type == "cuda" and device.index is None:
        return torch.device("cuda", torch.cuda.current_device())
    return CPU if device.type == "cpu" else device
