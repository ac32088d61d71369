"""Whether noisy numbers rise or fall: medians of the first and the last third, with a margin for the noise."""

from __future__ import annotations

import math
from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from statistics import median

FEWEST = 12
"""Values below which nothing is said: four in a third are the fewest whose median is worth its name (ours)."""

_MARGIN = 3.0
"""Standard errors; chance alone goes beyond them about once in 400 times."""

_FEW = 4.0
"""Noise that is judged by a few values is often judged too small: with four in a third the margin is twice as wide."""


@dataclass(frozen=True)
class Trend:
    """How a series went.

    Attributes:
        first, last (`float`): Medians of its first and last third.
        margin (`float`): Most by which noise alone would make the two differ.
        noise (`float`): Standard deviation from one value to the next that is not the trend.
    """

    first: float
    last: float
    margin: float
    noise: float

    @property
    def change(self) -> float:
        """By how much it rose."""
        return self.last - self.first


def trend(values: Sequence[float]) -> Trend | None:
    """How a series went; `None` for fewer than 12 values."""
    if len(values) < FEWEST:
        return None
    third = len(values) // 3
    head, tail = values[:third], values[-third:]
    whole = noise(values)
    # Few values can be alike by chance, so that no part is taken for quieter than the whole. The standard error of a
    # median is that of a mean, and a quarter more.
    errors = [math.sqrt(math.pi / 2 / third) * max(whole, noise(part)) for part in (head, tail)]
    margin = _MARGIN * (1 + _FEW / third) * math.hypot(*errors)
    return Trend(median(head), median(tail), margin, whole)


def noise(values: Sequence[float]) -> float:
    """The standard deviation of values about their trend, from the steps between neighbours and deaf to outliers."""
    steps = [after - before for before, after in pairwise(values)]
    if not steps:
        return 0.0
    middle = median(steps)
    # 1.4826 makes the median deviation that of a normal distribution; a difference has the noise of two values.
    return 1.4826 * median(abs(step - middle) for step in steps) / math.sqrt(2)


def above(values: Sequence[float], others: Sequence[float]) -> bool:
    """Whether values lie above others by their ranks, which holds for batches of several kinds, too.

    Three standard errors of the Mann-Whitney statistic; every value above every other where there are too few for that.
    """
    pairs = len(values) * len(others)
    ordered = sorted(others)
    wins = sum(bisect_left(ordered, value) + bisect_right(ordered, value) for value in values) / 2
    error = math.sqrt(pairs * (len(values) + len(others) + 1) / 12)
    return wins - pairs / 2 > _MARGIN * error or wins == pairs
