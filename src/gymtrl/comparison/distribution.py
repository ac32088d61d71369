"""How rollouts are distributed before and after, in bins that both sides share."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from gymtrl.comparison.collection import Collection
from gymtrl.comparison.measures import COSTS, MEASURES
from gymtrl.comparison.pairing import Pairing
from gymtrl.comparison.record import Distribution, SharedBin

_MANY = 12
"""Of up to so many distinct values each has a bin of its own; else there are so many bins."""


def distributions(pairing: Pairing, before: Collection, after: Collection) -> tuple[Distribution, ...]:
    """The rollouts of paired tasks by the metric and by what they took, where that is not the same in all.

    Args:
        pairing (`Pairing`): The tasks.
        before, after (`Collection`): The collections.
    """
    halves = ((before, pairing.before), (after, pairing.after))
    values = [side.values[half.rows] for side, half in halves]
    found = [Distribution("", shared_bins(*values))]
    for name in COSTS:
        taken = [side.measures[MEASURES.index(name)][half.rows] for side, half in halves]
        known = [some[np.isfinite(some)] for some in taken]
        if len(known[0]) and len(known[1]) and len(np.unique(np.concatenate(known))) > 1:
            found.append(Distribution(name, shared_bins(*known)))
    return tuple(found)


def shared_bins(before: NDArray[np.float64], after: NDArray[np.float64]) -> tuple[SharedBin, ...]:
    """Counts the values of both sides in the same bins.

    Args:
        before, after (`ndarray` of `float64`): Finite values, one at least.

    Returns:
        `tuple[SharedBin, ...]`: One for each distinct value where there are few, else of equal width.
    """
    distinct = np.unique(np.concatenate([before, after]))
    if len(distinct) <= _MANY:
        counts = [np.bincount(np.searchsorted(distinct, side), minlength=len(distinct)) for side in (before, after)]
        edges = list(zip(distinct.tolist(), distinct.tolist(), strict=True))
    else:
        # Halves, since the width of a range from -1e308 to 1e308 is no float.
        bounds = 2 * np.linspace(distinct[0] / 2, distinct[-1] / 2, _MANY + 1)
        bounds[[0, -1]] = distinct[[0, -1]]
        counts = [np.histogram(side / 2, bounds / 2)[0] for side in (before, after)]
        edges = list(zip(bounds[:-1].tolist(), bounds[1:].tolist(), strict=True))
    return tuple(SharedBin(low, high, int(x), int(y)) for (low, high), x, y in zip(edges, *counts, strict=True))
