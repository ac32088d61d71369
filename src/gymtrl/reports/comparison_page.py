"""A comparison as one HTML page that needs nothing else.

Verdict, effects, what became worse, tasks, flips, distributions, costs.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice, zip_longest
from pathlib import Path

import msgspec
from jinja2 import Environment

from gymtrl.comparison.record import Candidate, Comparison, Flip, SharedBin, Side, TaskDifference
from gymtrl.doctor.worse import diagnose_comparison
from gymtrl.rollouts.outputs import check_output
from gymtrl.rollouts.reader import read_at

from .comparison_charts import WIDTH, Scatter, effect_plot, scatter
from .page import figure, page_environment, page_script, write_whole
from .trajectory import Trajectory, trajectory

REPORT = "report.html"
"""The page in a folder that holds a comparison."""

FLIPS = 50
"""Flips in a page, over all candidates."""

_ENVIRONMENTS = 100
_SCATTERS = 12
_NAME = 80


@dataclass(frozen=True)
class ShownFlip:
    """A flip with the two rollouts that show it best.

    Attributes:
        flip (`Flip`): The flip.
        candidate (`int`): Place of the candidate.
        task (`TaskDifference`): The task.
        before, after (`Trajectory`): One rollout of each side.
    """

    flip: Flip
    candidate: int
    task: TaskDifference
    before: Trajectory
    after: Trajectory


def write_page(comparison: Comparison, html: Path) -> None:
    """Writes the page of a comparison, whole or not at all.

    Args:
        comparison (`Comparison`): The result; the rollouts that it names are still there.
        html (`Path`): The page to write; one of that name is replaced.

    Raises:
        `UserError`: If rollouts are gone or have changed since; if the page cannot be written or would overwrite one of
            them.
    """
    flips = [flip for candidate in comparison.candidates for flip in candidate.flips]
    check_output(html, sorted({Path(origin.file) for flip in flips for origin in (*flip.before, *flip.after)}))
    write_whole(comparison_page(comparison), html)


def comparison_page(comparison: Comparison) -> str:
    """Renders a comparison.

    Args:
        comparison (`Comparison`): The result; the rollouts that it names are still there.

    Returns:
        `str`: A whole HTML document without any reference to another one.

    Raises:
        `UserError`: If rollouts are gone, or have changed since.
    """
    environment = page_environment()
    _add_numbers(environment, 100.0 if comparison.points else 1.0)
    flips = list(shown_flips(comparison))
    names = _names(comparison)
    few = _largest_environments(comparison)
    return environment.get_template("comparison.html.j2").render(
        comparison=few,
        title=f"{comparison.metric}, before and after",
        unit="points" if comparison.points else "difference",
        names=names,
        tones={"improved": "good", "regressed": "bad", "not shown": "context"},
        plot=effect_plot(few),
        hidden=_environments(comparison) - _environments(few),
        scatters=[_scatters(candidate, comparison.points) for candidate in comparison.candidates],
        findings=diagnose_comparison(comparison),
        flips=flips,
        all_flips=sum(len(candidate.flips) for candidate in comparison.candidates),
        agents=sorted({shown.flip.environment for shown in flips}),
        sides=[
            (name, side.name, _lines(side))
            for name, side in zip(
                ["before", *names], [comparison.before, *(c.after for c in comparison.candidates)], strict=True
            )
        ],
        **page_script(environment, "comparison.js"),
    )


def shown_flips(comparison: Comparison, most: int = FLIPS) -> Iterator[ShownFlip]:
    """Chooses flips, of each candidate, kind and environment in turn the largest, and reads their rollouts again.

    Args:
        comparison (`Comparison`): The result.
        most (`int`, *optional*, defaults to 50): How many.

    Raises:
        `UserError`: If rollouts are gone, or have changed since.
    """
    groups: dict[tuple[str, int, str], list[tuple[int, TaskDifference, Flip]]] = defaultdict(list)
    for place, candidate in enumerate(comparison.candidates):
        tasks = {(task.environment, task.key): task for task in candidate.tasks}
        for flip in candidate.flips:
            task = tasks[flip.environment, flip.key]
            groups[flip.kind, place, flip.environment].append((place, task, flip))
    ranked = [sorted(groups[key], key=_size, reverse=True) for key in sorted(groups)]
    in_turn = (found for turn in zip_longest(*ranked) for found in turn if found is not None)
    chosen = sorted(islice(in_turn, most), key=lambda found: (found[0], found[2].kind, found[2].environment))
    for place, task, flip in chosen:
        before, after = (trajectory(read_at(side[0])) for side in (flip.before, flip.after))
        yield ShownFlip(flip, place, task, before, after)


def _size(found: tuple[int, TaskDifference, Flip]) -> float:
    return abs(found[1].after / 2 - found[1].before / 2)


def _add_numbers(environment: Environment, scale: float) -> None:
    digits = ".1f" if scale != 1 else ".3g"
    environment.filters.update(
        difference=lambda value: f"{value * scale:+{digits}}".replace("-", "−"),
        size=lambda value: f"{value * scale:{digits}}",
        signed=lambda value: f"{value:+,.3g}".replace("-", "−"),
        p=lambda value: f"{value:.2g}" if value >= 0.001 else "< 0.001",
        points=lambda value: f"{100 * value:+.1f}".replace("-", "−"),
        at=lambda value: f"{value:.1f}",
        name=lambda text: text if len(text) <= _NAME else f"{text[: _NAME - 1]}…",
        bin_label=_bin_label,
    )
    environment.globals["width"] = WIDTH


def _bin_label(bin: SharedBin) -> str:
    return figure(bin.low) if bin.low == bin.high else f"{figure(bin.low)} … {figure(bin.high)}"


def _names(comparison: Comparison) -> list[str]:
    """The candidates, without the folders that all of them have in common."""
    names = [candidate.after.name for candidate in comparison.candidates]
    if len(names) == 1:
        return ["after"]
    parts = [Path(name).parts for name in names]
    shared = 0
    while all(len(some) > shared + 1 and some[shared] == parts[0][shared] for some in parts):
        shared += 1
    return [str(Path(*some[shared:])) for some in parts]


def _largest_environments(comparison: Comparison) -> Comparison:
    """The comparison with the environments that have most tasks only, where there are very many."""
    most = max(1, _ENVIRONMENTS // len(comparison.candidates))
    candidates = [
        msgspec.structs.replace(
            candidate,
            environments=tuple(sorted(candidate.environments, key=lambda effect: -effect.difference.n)[:most]),
        )
        for candidate in comparison.candidates
    ]
    return msgspec.structs.replace(comparison, candidates=tuple(candidates))


def _scatters(candidate: Candidate, points: bool) -> list[tuple[str, int, Scatter]]:
    """All tasks, and those of each environment where there are several: name, tasks, dots."""
    of: dict[str, list[TaskDifference]] = defaultdict(list)
    for task in candidate.tasks:
        of[task.environment].append(task)
    found = [("", candidate.tasks), *(sorted(of.items(), key=lambda item: -len(item[1])) if len(of) > 1 else [])]
    return [(name, len(tasks), scatter(tasks, points=points)) for name, tasks in found[: _SCATTERS + 1]]


def _environments(comparison: Comparison) -> int:
    return sum(len(candidate.environments) for candidate in comparison.candidates)


def _lines(side: Side) -> list[tuple[str, str]]:
    """What became of the lines of a side, as names and values."""
    found = [("lines", side.lines), ("rollouts with a valid value", side.rollouts)]
    found += [(reason.replace("_", " "), number) for reason, number in sorted(side.left_out.items())]
    found += [("rows beside the rollouts", side.skipped), ("asked for and not there", side.missing or 0)]
    found += [("answers that are no sound chat; they count", side.refused)]
    found += [(f"attempts that the world failed: {name}", n) for name, n in sorted(side.failed_attempts.items())[:12]]
    return [(name, f"{number:,}") for name, number in found if number]
