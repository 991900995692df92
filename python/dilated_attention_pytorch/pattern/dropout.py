"""The seed of a part of a call, which draws what the whole draws there."""

from __future__ import annotations

_STEP = 0x9E3779B97F4A7C15  # kDropoutStep of csrc/kernels/dropout.h


def seed_steps(first_entry: int, first_head: int) -> int:
    """What to add to an int64 seed, wrapping, for the entries and heads from these on."""
    steps = _STEP * ((first_head << 32) + first_entry) % 2**64
    return steps - 2**64 if steps >= 2**63 else steps
