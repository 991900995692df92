"""A check of integers against a lower bound."""

from __future__ import annotations

import operator


def at_least(least: int, value: int, name: str) -> int:
    """The value as an int; raises TypeError if it isn't an integer, ValueError if too small."""
    try:
        if isinstance(value, bool):
            raise TypeError
        number = operator.index(value)
    except TypeError:
        raise TypeError(f"{name} must be an integer, got {value!r}") from None
    if number < least:
        raise ValueError(f"{name} must be at least {least}, got {value}")
    return number
