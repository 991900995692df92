"""Branches for a length, where no paper and no checkpoint gives them."""

from __future__ import annotations

from .. import _C
from .bounds import SEQ_LEN_END, at_least


def suggest_branches(
    seq_len: int, *, dense: int = 2048, growth: int = 4
) -> tuple[list[int], list[int]]:
    """Segment lengths and dilation rates that grow together until one segment holds the sequence.

    Each branch gives a query that takes part in it `dense` keys, so that the mean over heads is
    below dense * growth / (growth - 1) keys, however long the sequence: LongNet, arXiv 2307.02486,
    section 3.1. The lengths are nested and divisible by their rates. Where a rate is above the
    number of heads, as in the paper, some positions are in that branch for no head.

    Args:
        seq_len: positions of the longest sequence.
        dense: the length of the first segments, whose rate is 1, in positions: the neighbourhood
            that is seen whole. At least 64, the kernels' tile.
        growth: factor of length and rate from one branch to the next.

    Returns:
        (segment_lengths, dilation_rates), lists of equal length; for 131072 positions [2048, 8192,
        32768, 131072] and [1, 4, 16, 64].

    Raises:
        TypeError, ValueError: naming the argument, what must hold and what was given.
    """
    seq_len = at_least(1, seq_len, "seq_len", SEQ_LEN_END)
    dense = at_least(_C.TILES[0][0], dense, "dense", 2**31)
    growth = at_least(2, growth, "growth", 2**31)
    lengths, rates = [dense], [1]
    while lengths[-1] < seq_len:
        lengths.append(lengths[-1] * growth)
        rates.append(rates[-1] * growth)
    if rates[-1] >= 2**31:
        raise ValueError(f"growth must keep dilation rates below 2^31, got {growth}")
    return lengths, rates
