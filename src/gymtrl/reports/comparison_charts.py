"""The figures of a comparison: intervals on a common axis, and tasks before against after.

Every coordinate lies in a box of `WIDTH` units, which the page draws as wide as there is room.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from gymtrl.comparison.record import Comparison, Effect, TaskDifference

WIDTH = 1000
_DOTS = 625
_CELLS = 25
_WIDEST = 3.0
_RADII = (9.0, 40.0)


@dataclass(frozen=True)
class Strip:
    """An effect, ready to be drawn.

    Attributes:
        candidate (`int`): Place of the candidate.
        name (`str`): The environment's name; `""` for all.
        effect (`Effect`): Its numbers.
        low, at, high (`float`): Ends of the interval and the difference.
        cut (`bool`): The interval goes on beyond the axis.
    """

    candidate: int
    name: str
    effect: Effect
    low: float
    at: float
    high: float
    cut: bool


@dataclass(frozen=True)
class EffectPlot:
    """Effects on a common axis with zero in its middle.

    Attributes:
        strips (`list[Strip]`): Of each candidate its environments, where there are several, and all of them.
        reach (`float`): The difference at the right end.
        counts (`tuple[float, float]`): Where the differences begin that count.
    """

    strips: list[Strip]
    reach: float
    counts: tuple[float, float]


@dataclass(frozen=True)
class Dot:
    """Tasks with the same means, or nearly the same where there are very many.

    Attributes:
        x, y, radius (`float`): Where it is drawn: before to the right, after upwards; its area tells the tasks.
        tone (`str`): `good` where tasks got better, `bad` where they got worse, else `same`.
        tasks (`int`): How many.
        before, after (`float`): Means.
    """

    x: float
    y: float
    radius: float
    tone: str
    tasks: int
    before: float
    after: float


@dataclass(frozen=True)
class Scatter:
    """Tasks before against after.

    Attributes:
        dots (`list[Dot]`): The largest first, so that it hides none.
        low, high (`float`): Ends of both axes.
        gathered (`bool`): Tasks that are near each other share a dot.
    """

    dots: list[Dot]
    low: float
    high: float
    gathered: bool


def effect_plot(comparison: Comparison) -> EffectPlot:
    """Lays out the differences of all candidates and environments.

    Args:
        comparison (`Comparison`): The result.
    """
    rows = [
        (place, name, effect)
        for place, candidate in enumerate(comparison.candidates)
        for name, effect in (
            *([(e.environment, e) for e in candidate.environments] if len(candidate.environments) > 1 else []),
            ("", candidate.overall),
        )
    ]
    reach = _reach(comparison, [effect for _, _, effect in rows])

    def x(value: float) -> float:
        return WIDTH / 2 * (1 + min(max(value / reach, -1.0), 1.0))

    strips = [
        Strip(place, name, effect, x(d.low), x(d.mean), x(d.high), not -reach <= d.low <= d.high <= reach)
        for place, name, effect in rows
        for d in [effect.difference]
    ]
    return EffectPlot(strips, reach, (x(-comparison.min_effect), x(comparison.min_effect)))


def scatter(tasks: Sequence[TaskDifference], *, points: bool) -> Scatter:
    """Lays out tasks; those with the same means share a dot, and of very many also those that are near each other.

    Args:
        tasks (`Sequence[TaskDifference]`): One or more.
        points (`bool`): Values lie within 0 and 1, so that the axes do.
    """
    means = np.array([(task.before, task.after) for task in tasks])
    low, high = (0.0, 1.0) if points else (float(means.min()), float(means.max()))
    if low == high:
        low, high = low - (abs(low) or 1) / 10, high + (abs(high) or 1) / 10
    # Halves, since the width of a range from -1e308 to 1e308 is no float.
    shares = (means / 2 - low / 2) / (high / 2 - low / 2)
    _, places = np.unique(means, axis=0, return_inverse=True)
    gathered = int(places.max()) >= _DOTS
    if gathered:
        signs = np.sign(means[:, 1] / 2 - means[:, 0] / 2)[:, None]
        cells = np.hstack([np.minimum(shares * _CELLS, _CELLS - 1).astype(np.int64), signs.astype(np.int64)])
        _, places = np.unique(cells, axis=0, return_inverse=True)
    counts = np.bincount(places.ravel())
    most = int(counts.max())
    dots = [
        _dot(means[here].mean(axis=0).tolist(), shares[here].mean(axis=0).tolist(), len(here), most)
        for here in np.split(np.argsort(places.ravel(), kind="stable"), np.cumsum(counts)[:-1])
    ]
    return Scatter(sorted(dots, key=lambda dot: -dot.radius), low, high, gathered)


def _dot(means: list[float], shares: list[float], tasks: int, most: int) -> Dot:
    (before, after), (x, y) = means, shares
    least, largest = _RADII
    radius = least if most == 1 else max(least, largest * math.sqrt(tasks / most))
    tone = "same" if before == after else "good" if after > before else "bad"
    return Dot(WIDTH * x, WIDTH * (1 - y), radius, tone, tasks, before, after)


def _reach(comparison: Comparison, effects: Sequence[Effect]) -> float:
    """How far the axis goes: as far as the intervals, unless one of them is so wide that the others would be dots."""
    means = [abs(effect.difference.mean) for effect in effects]
    overall = [candidate.overall.difference for candidate in comparison.candidates]
    needed = max([*means, comparison.min_effect, *(max(abs(d.low), abs(d.high)) for d in overall)])
    widest = max(max(abs(effect.difference.low), abs(effect.difference.high)) for effect in effects)
    reach = min(1.05 * widest, _WIDEST * needed, *([1.0] if comparison.points else []))
    reach = max(reach, 1.05 * comparison.min_effect)
    return reach if 0 < reach < math.inf else 1.0
