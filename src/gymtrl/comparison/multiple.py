"""Several tests at once."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


def holm(p_values: Sequence[float]) -> list[float]:
    """Adjusts p-values so that a false one among all of them is as rare as the level says.

    Holm 1979 (Scandinavian Journal of Statistics 6): the i-th smallest of m is multiplied by m - i + 1, and none may
    fall below the one before it.

    Args:
        p_values (`Sequence[float]`): One of each test.

    Returns:
        `list[float]`: The adjusted p-values, in the same order.
    """
    p = np.asarray(p_values, dtype=float)
    order = np.argsort(p, kind="stable")
    adjusted = np.empty_like(p)
    adjusted[order] = np.minimum(np.maximum.accumulate(p[order] * np.arange(len(p), 0, -1)), 1.0)
    return [float(one) for one in adjusted]
