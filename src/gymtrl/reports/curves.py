"""Numbers of a training run as curves: gathered by name, thinned for drawing, laid out as paths of an SVG.

A curve is drawn in a box of `WIDTH` by `HEIGHT` units that the page stretches; every coordinate here is in that box.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np

WIDTH, HEIGHT = 1000, 240

BINS = 400
"""Of a longer curve each of so many parts keeps its lowest and its highest point, so that no spike is lost."""

_TREND_POINTS = 60
_TREND_PARTS = 30
_RAGGED = 5.0
_LOG_RATIO = 15.0

Point = tuple[int, float]
Entry = Mapping[str, Any]


@dataclass(frozen=True)
class Curve:
    """A number over the steps of a run.

    Attributes:
        name (`str`): What it is, in words.
        points (`list[Point]`): Steps with their values.
        broken (`list[int]`): Steps at which the value was not finite.
        evaluated (`list[Point]`): The same number on validation rows.
    """

    name: str
    points: list[Point]
    broken: list[int]
    evaluated: list[Point]


@dataclass(frozen=True)
class Line:
    """A curve, ready to be drawn.

    Attributes:
        name (`str`): What it is, in words.
        path (`str`): Of an SVG: all values.
        trend (`str`): Of an SVG: a running mean of a long curve, else empty.
        dots (`str`): Of an SVG: the values on validation rows.
        first, last (`float`, *optional*): Of the values.
        evaluated (`list[Point]`): The values on validation rows.
    """

    name: str
    path: str
    trend: str
    dots: str
    first: float | None
    last: float | None
    evaluated: list[Point]


@dataclass(frozen=True)
class Chart:
    """Curves on common axes.

    Attributes:
        title (`str`): Heading.
        lines (`list[Line]`): The curves.
        first_step, last_step (`int`): Left and right end.
        bottom, top (`float`): Lower and upper end.
        log (`bool`): The upright axis is logarithmic.
        broken (`list[tuple[float, int]]`): Place and step of values that were not finite.
        events (`list[tuple[float, int, str]]`): Place, step and words of what happened to the run.
    """

    title: str
    lines: list[Line]
    first_step: int
    last_step: int
    bottom: float
    top: float
    log: bool
    broken: list[tuple[float, int]]
    events: list[tuple[float, int, str]]


def curve(metrics: Sequence[Entry], key: str, name: str) -> Curve:
    """Gathers a number of the steps, with the one that evaluations give under the same name.

    Args:
        metrics (`Sequence[Entry]`): Lines of `metrics.jsonl`.
        key (`str`): The number's name there.
        name (`str`): What it is, in words.
    """
    broken = {entry["step"] for entry in metrics if _was_not_finite(entry, key)}
    return Curve(name, _points(metrics, key), sorted(broken), _points(metrics, f"eval_{key}"))


def speed(metrics: Sequence[Entry]) -> Curve:
    """Tokens a second, from the tokens and seconds of each step and the one before it."""
    steps = [entry for entry in metrics if _number(entry.get("tokens")) and _number(entry.get("seconds"))]
    points = []
    for before, entry in pairwise(steps):
        seconds, tokens = entry["seconds"] - before["seconds"], entry["tokens"] - before["tokens"]
        if seconds > 0 and tokens > 0:
            points.append((entry["step"], tokens / seconds))
    return Curve("tokens/s", points, [], [])


def events(metrics: Sequence[Entry]) -> list[tuple[int, str]]:
    """What happened to the run, with the steps after which it did."""
    return [(entry["step"], str(entry["event"])) for entry in metrics if "event" in entry]


def chart(
    title: str, curves: Sequence[Curve], marks: Sequence[tuple[int, str]], steps: tuple[int, int]
) -> Chart | None:
    """Lays curves out on common axes.

    Args:
        title (`str`): Heading.
        curves (`Sequence[Curve]`): What to draw; those without any value are left out.
        marks (`Sequence[tuple[int, str]]`): Events to mark.
        steps (`tuple[int, int]`): First and last step of the axis.

    Returns:
        `Chart`, *optional*: `None` where no curve has a value.
    """
    drawn = [found for found in curves if found.points or found.broken or found.evaluated]
    values = [value for found in drawn for _, value in found.points + found.evaluated]
    if not drawn:
        return None
    bottom, top = (min(values), max(values)) if values else (0.0, 1.0)
    log = bottom > 0 and len(values) > 2 and top > _LOG_RATIO * float(np.median(values))
    if not log and bottom == top:
        bottom, top = bottom - (abs(bottom) or 1) / 10, top + (abs(top) or 1) / 10
    first, last = steps
    width = max(1, last - first)

    def x(step: float) -> float:
        return (step - first) / width * WIDTH

    def y(value: float) -> float:
        low, high, at = (math.log(bottom), math.log(top), math.log(value)) if log else (bottom, top, value)
        # Halves, since the difference of the largest floats is not a float.
        return HEIGHT * (1 - (at / 2 - low / 2) / (high / 2 - low / 2))

    def line(found: Curve) -> Line:
        kept = thinned(found.points)
        numbers = [value for _, value in found.points]
        return Line(
            name=found.name,
            path=_path([(x(step), y(value)) for step, value in kept]),
            trend=_path([(x(step), y(value)) for step, value in trend(found.points)]),
            dots=" ".join(f"M{x(step):.1f} {y(value):.1f}h0" for step, value in thinned(found.evaluated)),
            first=numbers[0] if numbers else None,
            last=numbers[-1] if numbers else None,
            evaluated=found.evaluated,
        )

    return Chart(
        title=title,
        lines=[line(found) for found in drawn],
        first_step=first,
        last_step=last,
        bottom=bottom,
        top=top,
        log=log,
        broken=[(x(step), step) for step in sorted({step for found in drawn for step in found.broken})[:BINS]],
        events=[(x(step), step, text) for step, text in marks],
    )


def thinned(points: Sequence[Point], bins: int = BINS) -> list[Point]:
    """Leaves at most two points to each of `bins` equal parts of a long curve: its lowest and its highest.

    Args:
        points (`Sequence[Point]`): In the order of their steps.
        bins (`int`, *optional*, defaults to 400): Parts.

    Returns:
        `list[Point]`: Some of the points, in order; the first and the last are among them.
    """
    if len(points) <= 2 * bins:
        return list(points)
    kept = {0, len(points) - 1}
    edges = np.linspace(0, len(points), bins + 1).astype(int)
    values = np.array([value for _, value in points])
    for start, end in pairwise(edges):
        kept |= {start + int(values[start:end].argmin()), start + int(values[start:end].argmax())}
    return [points[at] for at in sorted(kept)]


def trend(points: Sequence[Point]) -> list[Point]:
    """The means of stretches of a curve that is too ragged to be read; nothing of a short or a smooth one."""
    if len(points) < _TREND_POINTS:
        return []
    window = len(points) // _TREND_PARTS
    values = np.array([value for _, value in points])
    with np.errstate(over="ignore", invalid="ignore"):
        ways = np.abs(np.diff(values)).sum()  # up and down, against once across
        if ways <= _RAGGED * (values.max() - values.min()):
            return []
        means = np.convolve(values, np.ones(window) / window, mode="valid")
    middle = (window - 1) // 2
    smooth = [(points[at + middle][0], float(mean)) for at, mean in enumerate(means) if math.isfinite(mean)]
    return smooth[:: max(1, len(smooth) // BINS)]


def _points(metrics: Sequence[Entry], key: str) -> list[Point]:
    return [(entry["step"], float(entry[key])) for entry in metrics if _number(entry.get(key))]


def _number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _was_not_finite(entry: Entry, key: str) -> bool:
    value = entry.get(key)
    return isinstance(value, float) and not math.isfinite(value)


def _path(points: Sequence[tuple[float, float]]) -> str:
    if len(points) == 1:
        return f"M{points[0][0]:.1f} {points[0][1]:.1f}h0"  # a dot, with round line ends
    return "".join(f"{'L' if at else 'M'}{x:.1f} {y:.1f}" for at, (x, y) in enumerate(points))
