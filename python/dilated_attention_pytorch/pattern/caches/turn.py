"""Who plans a pattern that several threads miss at once."""

from __future__ import annotations

import threading

from .entry import Entry


class Turn:
    """Threads that miss the same pattern take turns; the first leaves its entry to the others.

    A turn holds the lock, which is released however it ends: no thread has to wake the others.
    """

    __slots__ = ("lock", "made")

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.made: Entry | None = None
