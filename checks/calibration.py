"""How often the comparison announces a difference that is not there, covers the one that is, and finds it.

Run as: python checks/calibration.py [--studies 10000] [--out checks/results/calibration.json]

Studies are drawn with a known true effect (`calibration_studies.py`), 10,000 of each kind without an effect and as many
with the one that about four of five should show. Each goes through the functions of `gymtrl.comparison`; beside them
stand the tests that others use, on the same studies.

Held is, at a nominal 5 %:

- tasks that are independent: false positives within 4 and 6 %, coverage with and without an effect within 94 and 96 %;
- tasks in clusters, 15 or more: false positives at most 6.5 %;
- exact tests, which are sign flips of clusters and McNemar's: false positives at most 6 %.

The skewed effects of whole clusters are told and not held to that: with a few clusters that lose much and many that
gain little, no sample of 15 clusters shows what the next ones would be. Ends with status 1 where something is missed.
"""

from __future__ import annotations

import argparse
import itertools
import json
import platform
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
from calibration_studies import Cell, Floats, half_widths, plain_cluster_half_width, studies
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table
from scipy import stats

from gymtrl.comparison.bootstrap import bootstrap_interval, bootstrap_intervals
from gymtrl.comparison.discrete import mcnemar_p
from gymtrl.comparison.estimate import POWER, cluster_mean, cluster_sums, means_and_errors, sign_flip_p, sign_flip_ps

OURS = "paired, CR2"
LEVEL = 0.05
SEED = 20_240
_ROWS = 1_000  # studies whose resampled means are held at a time
_BOOTSTRAPPED = 1_000  # it is held to no limit, and 10,000 draws for every study are the most work of all

INDEPENDENT = [
    Cell(tasks, repeats, rewards, effects)
    for tasks, repeats, rewards, effects in itertools.product(
        (50, 150, 500), (1, 2, 8), ("binary", "fractional"), ("even", "skewed")
    )
]
CLUSTERED = [
    Cell(tasks, repeats, rewards, "even", clusters, sizes)
    for (tasks, clusters, sizes), repeats, rewards in itertools.product(
        ((150, 15, "equal"), (150, 15, "unequal"), (300, 30, "unequal"), (500, 60, "unequal")),
        (1, 4),
        ("binary", "fractional"),
    )
]
SKEWED = [
    Cell(tasks, repeats, "fractional", "skewed", clusters, "unequal")
    for (tasks, clusters), repeats in itertools.product(((150, 15), (500, 60)), (1, 4))
]


@dataclass
class Outcome:
    """What came of the studies of one kind.

    Attributes:
        cell (`Cell`): Their kind.
        effect (`float`): The true effect of those that have one.
        false_positives (`dict[str, float]`): Share announced where there is no effect, by test.
        coverage (`dict[str, float]`): Share of intervals that hold the true effect where there is one.
        power (`dict[str, float]`): Share announced, in the right direction, where there is an effect.
        width (`dict[str, float]`): Mean width of the intervals where there is an effect.
        missed (`list[str]`): Limits that are not kept.
    """

    cell: Cell
    effect: float
    false_positives: dict[str, float]
    coverage: dict[str, float]
    power: dict[str, float]
    width: dict[str, float]
    missed: list[str] = field(default_factory=list)


@dataclass
class _Sample:
    """Many studies: the sum of each cluster's differences, half of each interval, and McNemar's counts."""

    sums: Floats
    sizes: Floats
    half: dict[str, Floats]
    changed: NDArray[np.int_]

    @property
    def means(self) -> Floats:
        means: Floats = self.sums.sum(axis=1) / self.sizes.sum()
        return means


def measure(cell: Cell, count: int, number: int) -> Outcome:
    """Draws the studies of a cell and tests them.

    Args:
        cell (`Cell`): Their kind.
        count (`int`): Studies without an effect, and with one.
        number (`int`): Of the cell; a part of the seed.
    """
    null = _draw(cell, count, (SEED, number, 0))
    false = {name: float(np.mean(np.abs(null.means) > half)) for name, half in null.half.items()}
    false |= _resampled(null)
    if cell.repeats == 1 and cell.rewards == "binary" and cell.clusters is None:
        false["mcnemar"] = _mcnemar(null.changed)
    effect = float(np.sqrt(np.mean(_errors(null) ** 2))) * _detectable_factor(null)
    shifted = _draw(cell, count, (SEED, number, 1), effect=effect)
    outcome = Outcome(
        cell,
        effect,
        false,
        {name: float(np.mean(np.abs(shifted.means - effect) <= half)) for name, half in shifted.half.items()},
        {name: float(np.mean(shifted.means > half)) for name, half in shifted.half.items()},
        {name: 2 * float(half.mean()) for name, half in shifted.half.items()},
    )
    outcome.missed = list(_missed(outcome))
    return outcome


def _draw(cell: Cell, count: int, seed: tuple[int, ...], *, effect: float = 0.0) -> _Sample:
    sums, halves, changed = [], [], []
    sizes = np.bincount(cell.codes).astype(float)
    for before, after in studies(cell, count, seed, effect=effect):
        differences = after.mean(axis=2, dtype=float) - before.mean(axis=2, dtype=float)
        part, sizes = cluster_sums(differences, cell.codes)
        means, errors, df = means_and_errors(part, sizes)
        ours = stats.t.ppf(1 - LEVEL / 2, df) * errors
        if not sums:
            _check_single(differences[0], cell, means[0] - ours[0], means[0] + ours[0])
        half = {OURS: ours} | half_widths(before, after)
        if cell.clusters is not None:
            half["plain cluster correction"] = plain_cluster_half_width(part, sizes)
        sums.append(part)
        halves.append(half)
        changed.append(np.stack([(differences > 0).sum(axis=1), (differences < 0).sum(axis=1)], axis=1))
    half = {name: np.concatenate([one[name] for one in halves]) for name in halves[0]}
    return _Sample(np.concatenate(sums), sizes, half, np.concatenate(changed))


def _check_single(differences: Floats, cell: Cell, low: float, high: float) -> None:
    """What is simulated is what one comparison says."""
    one = cluster_mean(differences, cell.codes)
    assert np.allclose((one.low, one.high), (low, high), rtol=1e-9, atol=1e-12)
    sums, sizes = cluster_sums(differences[None], cell.codes)
    assert sign_flip_p(differences, cell.codes) == sign_flip_ps(np.repeat(sums, 2, axis=0))[1]
    many = bootstrap_intervals(np.repeat(sums, 2, axis=0), sizes)[1]
    assert np.allclose(bootstrap_interval(differences, cell.codes), many, rtol=1e-9, atol=1e-12)


def _resampled(sample: _Sample) -> dict[str, float]:
    """False positives of sign flips, and of the bootstrap over clusters in the first studies."""
    flips, outside = [], []
    for start in range(0, len(sample.sums), _ROWS):
        sums = sample.sums[start : start + _ROWS]
        flips.append(sign_flip_ps(sums) <= LEVEL)
        if start < _BOOTSTRAPPED:
            limits = bootstrap_intervals(sums, sample.sizes)
            outside.append((limits[:, 0] > 0) | (limits[:, 1] < 0))
    return {"sign flips": float(np.concatenate(flips).mean()), "bootstrap": float(np.concatenate(outside).mean())}


def _mcnemar(changed: NDArray[np.int_]) -> float:
    pairs, times = np.unique(changed, axis=0, return_counts=True)
    announced = [mcnemar_p(int(fixed), int(broken)) <= LEVEL for fixed, broken in pairs]
    return float(times[announced].sum() / times.sum())


def _errors(sample: _Sample) -> Floats:
    return means_and_errors(sample.sums, sample.sizes)[1]


def _detectable_factor(sample: _Sample) -> float:
    df = means_and_errors(sample.sums[:1], sample.sizes)[2]
    return float(stats.t.ppf(1 - LEVEL / 2, df) + stats.t.ppf(POWER, df))


def _missed(found: Outcome) -> Iterator[str]:
    cell, false = found.cell, found.false_positives
    if cell.clusters is None:
        if not 0.04 <= false[OURS] <= 0.06:
            yield f"false positives {false[OURS]:.2%}"
        if not 0.94 <= found.coverage[OURS] <= 0.96:
            yield f"coverage {found.coverage[OURS]:.2%}"
    elif cell.effects == "even" and false[OURS] > 0.065:
        yield f"false positives {false[OURS]:.2%}"
    for name in ("sign flips", "mcnemar"):
        if (cell.clusters is None or cell.effects == "even") and false.get(name, 0) > 0.06:
            yield f"{name}: false positives {false[name]:.2%}"


def summary(outcomes: list[Outcome]) -> dict[str, Any]:
    """Ranges over the cells: of false positives and coverage by test, and our width and power over the others'."""
    groups = {
        "independent": [one for one in outcomes if one.cell.clusters is None],
        "clusters": [one for one in outcomes if one.cell.clusters and one.cell.effects == "even"],
        "clusters, skewed": [one for one in outcomes if one.cell.clusters and one.cell.effects == "skewed"],
    }
    return {name: {"cells": len(group)} | _ranges(group) for name, group in groups.items() if group}


def _ranges(group: list[Outcome]) -> dict[str, Any]:
    tests = dict.fromkeys(name for one in group for name in one.false_positives)

    def over(kind: str, name: str) -> list[float] | None:
        found = [getattr(one, kind)[name] for one in group if name in getattr(one, kind)]
        return [round(x, 4) for x in (min(found), float(np.mean(found)), max(found))] if found else None

    def ratio(kind: str, name: str) -> list[float] | None:
        found = [getattr(one, kind)[OURS] / values[name] for one in group if name in (values := getattr(one, kind))]
        return [round(x, 3) for x in (min(found), float(np.mean(found)), max(found))] if found else None

    return {
        name: {
            "false_positives": over("false_positives", name),
            "coverage": over("coverage", name),
            "power": over("power", name),
            "our_width_over_this": ratio("width", name),
            "our_power_over_this": ratio("power", name),
        }
        for name in tests
    }


def show(found: dict[str, Any]) -> Table:
    """A line for each test of each group: the least and the largest over its cells."""
    heads = ("false positives", "coverage", "power", "our width / its", "our power / its")
    table = Table("tasks", "test", *heads)
    for group, tests in found.items():
        for name, values in tests.items():
            if name == "cells":
                continue
            cells = []
            for key, ranges in values.items():
                form = "{:.2f}" if key.startswith("our") else "{:.1%}"
                cells.append("–".join(form.format(ranges[i]) for i in (0, 2)) if ranges else "")
            table.add_row(group, name, *cells)
    return table


def results(outcomes: list[Outcome], count: int, start: float) -> dict[str, Any]:
    """What the JSON file holds."""
    return {
        "missed": sum(bool(one.missed) for one in outcomes),
        "studies": count,
        "bootstrapped": min(count, _BOOTSTRAPPED),
        "seed": SEED,
        "cpu_seconds": round(time.process_time() - start),
        "versions": {"python": platform.python_version()}
        | {name: metadata.version(name) for name in ("gymtrl", "numpy", "scipy")},
        "summary": summary(outcomes),
        "cells": [asdict(one) for one in outcomes],
    }


def main() -> int:
    """Checks, prints a table and writes the results."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--studies", type=int, default=10_000, help="of each kind, with and without an effect")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "calibration.json")
    options = parser.parse_args()
    start = time.process_time()
    cells = CLUSTERED + SKEWED + INDEPENDENT
    outcomes = []
    for number, cell in enumerate(cells):
        outcomes.append(measure(cell, options.studies, number))
        told = ", ".join(outcomes[-1].missed) or "as nominal"
        print(f"{number + 1}/{len(cells)} {cell}: {told}", file=sys.stderr, flush=True)
        found = results(outcomes, options.studies, start) | {"complete": len(outcomes) == len(cells)}
        # An interrupted run leaves what it had come to.
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    Console(width=140).print(show(found["summary"]))
    print(f"{found['missed']} of {len(cells)} cells miss a limit, in {found['cpu_seconds']} s of CPU")
    return 1 if found["missed"] else 0


if __name__ == "__main__":
    sys.exit(main())
