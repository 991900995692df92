"""Checks of the caches' numbers."""

from __future__ import annotations

import operator


def at_least(least: int, value: int, name: str) -> int:
    """The value; raises TypeError if it is no integer, ValueError if it is too small."""
    try:
        if isinstance(value, bool):
            raise TypeError
        number = operator.index(value)
    except TypeError:
        raise TypeError(f"{name} must be an integer, got {value!r}") from None
    if number < least:
        raise ValueError(f"{name} must be at least {least}, got {value}")
    return number
