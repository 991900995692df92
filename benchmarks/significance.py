"""Whether paired measurements differ: an interval and a probability, both by resampling."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean, median

from .timing import percentile

RESAMPLES = 4000
LEVEL = 0.01  # two-sided; and the interval must not hold 1


@dataclass(frozen=True, slots=True)
class Comparison:
    """other / base: the median of the pairs' ratios, its 95 % bootstrap interval, and p.

    p is the probability, were the two alike, of mean log-ratios as far from 0: by flipping signs.
    """

    ratio: float
    low: float
    high: float
    p: float
    pairs: int

    @property
    def is_significant(self) -> bool:
        return self.p < LEVEL and not self.low <= 1.0 <= self.high


def compare(base: Sequence[float], other: Sequence[float], seed: int = 0) -> Comparison:
    """Of measurements made in turn: base[i] and other[i] belong together.

    Raises:
        ValueError: not as many of one as of the other, or none.
    """
    if len(base) != len(other) or not base:
        raise ValueError(f"pairs are needed, got {len(base)} and {len(other)} measurements")
    rng = random.Random(seed)
    ratios = [b / a for a, b in zip(base, other, strict=True)]
    medians = [median(rng.choices(ratios, k=len(ratios))) for _ in range(RESAMPLES)]
    logs = [math.log(ratio) for ratio in ratios]
    seen = abs(fmean(logs))
    as_far = sum(
        abs(fmean(x if rng.random() < 0.5 else -x for x in logs)) >= seen for _ in range(RESAMPLES)
    )
    return Comparison(
        median(ratios),
        percentile(medians, 2.5),
        percentile(medians, 97.5),
        (as_far + 1) / (RESAMPLES + 1),
        len(ratios),
    )
