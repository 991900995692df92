"""A sum that stays right whatever exception ends an update."""

from __future__ import annotations

from collections.abc import Callable


class Tally:
    """A number kept up to date by differences, between `begin` and `end`.

    An exception, such as a signal handler's, may end an update halfway. So the number is unknown
    from `begin` to `end`; a read that finds it unknown counts anew.
    """

    def __init__(self, count: Callable[[], int]) -> None:
        self._count = count
        self._value: int | None = None

    def read(self) -> int:
        if self._value is None:
            self._value = self._count()
        return self._value

    def begin(self) -> int:
        """The number before the update."""
        value = self.read()
        self._value = None
        return value

    def end(self, value: int) -> None:
        self._value = value

    def forget(self) -> None:
        """Makes the next read count anew."""
        self._value = None
