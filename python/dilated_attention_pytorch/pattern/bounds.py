"""Checks of integers against bounds, worded once."""

from __future__ import annotations

import operator
from typing import Any

SEQ_LEN_END = 2**31 - 1
HEADS_END = 2**16


def at_least(least: int, value: Any, name: str, end: int | None = None) -> int:
    """The value as an int; raises TypeError if it isn't an integer, ValueError if out of bounds."""
    try:
        if isinstance(value, bool):
            raise TypeError
        number = operator.index(value)
    except (TypeError, RuntimeError):  # RuntimeError: torch's, for a tensor without data
        raise TypeError(f"{name} must be an integer, got {value!r}") from None
    check_bounds(least, number, name, end)
    return number


def check_bounds(least: int, number: int, name: str, end: int | None = None) -> None:
    """Raises ValueError unless least <= number < end; a compiler traces it."""
    if number < least or (end is not None and number >= end):
        rule = f"at least {least}" if end is None else f"at least {least} and below {_spell(end)}"
        raise ValueError(f"{name} must be {rule}, got {number}")


def _spell(number: int) -> str:
    """Large powers of two, and what is one less, as such."""
    for less, text in ((0, ""), (1, " - 1")):
        if number >= 2**10 and (number + less).bit_count() == 1:
            return f"2^{(number + less).bit_length() - 1}{text}"
    return str(number)
