"""One pattern in a cache, with its words by device."""

from __future__ import annotations

import torch

from ..pattern import Pattern
from .device_words import Copy, PlainWords

CPU = torch.device("cpu")


class Entry:
    """A pattern, its words by device, and how often it was looked up (less as it ages)."""

    __slots__ = ("copies", "host", "nbytes", "pattern", "uses")

    def __init__(self, pattern: Pattern) -> None:
        self.pattern = pattern
        self.nbytes = pattern.nbytes
        self.host = PlainWords(pattern.words)
        self.copies: dict[torch.device, Copy] = {CPU: self.host}
        self.uses = 0

    def copy_on(self, device: torch.device) -> Copy | None:
        """The copy on a device; None if there is none or a borrower wrote into it."""
        copy = self.copies.get(device)
        return copy if copy is not None and copy.is_intact else None


def full_device(device: torch.device) -> torch.device:
    """The name under which copies are kept: the CPU has no index, a GPU has one."""
    if device.type == "cuda" and device.index is None:
        return torch.device("cuda", torch.cuda.current_device())
    return CPU if device.type == "cpu" else device
