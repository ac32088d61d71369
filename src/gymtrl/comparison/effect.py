"""The difference between paired tasks: means, intervals, tests, flips, pass@k, and what the rollouts took."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import msgspec
import numpy as np
from numpy.typing import NDArray
from scipy import special

from gymtrl.comparison.bootstrap import bootstrap_interval
from gymtrl.comparison.collection import Collection
from gymtrl.comparison.discrete import mcnemar_p, pass_at_k
from gymtrl.comparison.estimate import LEVEL, ROUNDING, MeanEstimate, cluster_mean, sign_flip_p
from gymtrl.comparison.measures import COSTS, FORMS, HABITS, MEASURES
from gymtrl.comparison.multiple import holm
from gymtrl.comparison.pairing import Half, Pairing
from gymtrl.comparison.record import Cost, Effect, Habits, Outcome, PassAtK
from gymtrl.errors import UserError
from gymtrl.rollouts.quality import default_threshold

FEW_CLUSTERS = 15
"""Below this an interval can be too narrow; the sign-flip test must then agree."""
SURE_CLUSTERS = 30
"""Below this a warning is due: where a few clusters lose much and many gain little, the interval is too narrow."""
_EXAMPLES = 3
_TIE = 1e-12  # of a task's values: means that lie no further apart are the same, summed in another order


class Scores(NamedTuple):
    """Paired tasks in columns.

    Attributes:
        environments (`ndarray` of `int64`): Place of each task's environment among `names`.
        names (`list[str]`): The environments.
        clusters (`ndarray` of `int64`): Each task's cluster.
        thresholds (`ndarray` of `float64`): Value at which a rollout passes, by environment.
        binary (`ndarray` of `bool`): Whether values are one of two, by environment.
        means, counts, passes (`ndarray` of shape (2, tasks)): Means of values, rollouts and those that pass, before
            and after.
    """

    environments: NDArray[np.int64]
    names: list[str]
    clusters: NDArray[np.int64]
    thresholds: NDArray[np.float64]
    binary: NDArray[np.bool_]
    means: NDArray[np.float64]
    counts: NDArray[np.int64]
    passes: NDArray[np.int64]

    def flips(self) -> NDArray[np.int64]:
        """1 for tasks that were fixed, -1 for broken ones, else 0: most of their rollouts pass after, or before."""
        passing = (2 * self.passes > self.counts).astype(np.int64)
        found: NDArray[np.int64] = passing[1] - passing[0]
        return found

    def of(self, tasks: NDArray[np.bool_]) -> Scores:
        """Some of the tasks."""
        return self._replace(
            environments=self.environments[tasks],
            clusters=self.clusters[tasks],
            means=self.means[:, tasks],
            counts=self.counts[:, tasks],
            passes=self.passes[:, tasks],
        )


def score(pairing: Pairing, before: Collection, after: Collection) -> Scores:
    """Takes the means of paired tasks."""
    names = sorted({asked.environment for asked in pairing.asked})
    environments = _codes([asked.environment for asked in pairing.asked])
    halves = ((before, pairing.before), (after, pairing.after))
    values = [side.values[half.rows] for side, half in halves]
    thresholds, binary = np.zeros(len(names)), np.zeros(len(names), dtype=bool)
    for place in range(len(names)):
        here = [v[environments[half.tasks] == place] for v, (_, half) in zip(values, halves, strict=True)]
        distinct = np.unique(np.concatenate(here))
        threshold, _ = default_threshold(distinct.tolist())
        thresholds[place] = distinct[0] / 2 + distinct[-1] / 2 if threshold is None else threshold
        binary[place] = len(distinct) <= 2
    n = len(pairing.keys)
    tasks = [half.tasks for _, half in halves]
    counts = np.array([np.bincount(t, minlength=n) for t in tasks])
    passing = [v >= thresholds[environments[t]] for v, t in zip(values, tasks, strict=True)]
    return Scores(
        environments,
        names,
        _codes([asked.cluster_key for asked in pairing.asked]),
        thresholds,
        binary,
        _means(tasks, values, counts),
        counts,
        np.array([np.bincount(t[p], minlength=n) for t, p in zip(tasks, passing, strict=True)]),
    )


def _means(
    tasks: Sequence[NDArray[np.int64]], values: Sequence[NDArray[np.float64]], counts: NDArray[np.int64]
) -> NDArray[np.float64]:
    """Task means before and after, the same where only rounding lies between them."""
    n = counts.shape[1]
    before, after = (np.bincount(t, v, n) / count for t, v, count in zip(tasks, values, counts, strict=True))
    sizes = [np.bincount(t, np.abs(v), n) / count for t, v, count in zip(tasks, values, counts, strict=True)]
    with np.errstate(over="ignore", invalid="ignore"):
        tied = np.abs(after - before) <= _TIE * sizes[0] + _TIE * sizes[1]
    return np.array([before, np.where(tied, before, after)])


def estimate(scores: Scores, environment: str, min_effect: float) -> Effect:
    """The difference over paired tasks of two clusters or more; several tests at once are not yet allowed for.

    Raises:
        UserError: Values so large that their mean, or the width of its interval, is no finite number.
    """
    (before, after), clusters = scores.means, scores.clusters
    with np.errstate(over="ignore", invalid="ignore"):
        changes = after - before
        means = [cluster_mean(values, clusters) for values in (before, after, changes)]
    if not np.isfinite([(mean.low, mean.high) for mean in means]).all():
        raise UserError(
            f"values of up to {np.abs(scores.means).max():g} are too large for an interval of their difference",
            remedy="look at them with 'gymtrl inspect'; a --metric with a bound takes values of any size",
        )
    difference = means[2]
    flipped = _flipped(changes, clusters)
    p = _p(changes, clusters, difference, flipped, min_effect)
    flips = scores.flips()
    better, worse = int(np.sum(changes > 0)), int(np.sum(changes < 0))
    fixed, broken = int(np.sum(flips > 0)), int(np.sum(flips < 0))
    present = np.unique(scores.environments)
    thresholds = np.unique(scores.thresholds[present])
    once = bool(np.all(scores.counts == 1)) and bool(np.all(scores.binary[present]))
    return Effect(
        environment=environment,
        outcome=outcome_of(difference, p),
        before=means[0],
        after=means[1],
        difference=difference,
        p=p,
        p_adjusted=p,
        bootstrap=bootstrap_interval(changes, clusters),
        sign_flip_p=flipped,
        mcnemar_p=mcnemar_p(better, worse) if once and difference.clusters == difference.n else None,
        better=better,
        worse=worse,
        equal=int(np.sum(changes == 0)),
        fixed=fixed,
        broken=broken,
        pass_threshold=float(thresholds[0]) if len(thresholds) == 1 else None,
        repeats=(int(scores.counts.min()), int(scores.counts.max())),
        pass_at=_pass_at(scores),
    )


def adjusted(effects: Sequence[Effect]) -> tuple[Effect, ...]:
    """Effects whose p-values and outcomes allow for there being several (Holm)."""
    p = holm([effect.p for effect in effects]) if effects else []
    return tuple(
        msgspec.structs.replace(effect, p_adjusted=q, outcome=outcome_of(effect.difference, q))
        for effect, q in zip(effects, p, strict=True)
    )


def outcome_of(difference: MeanEstimate, p: float) -> Outcome:
    """What is shown at 5 %."""
    if not p <= 1 - LEVEL:
        return "not shown"
    return "improved" if difference.mean > 0 else "regressed"


def costs(
    pairing: Pairing, before: Collection, after: Collection, scores: Scores
) -> tuple[tuple[Cost, ...], tuple[Habits, ...]]:
    """What the rollouts of paired tasks took, and how they went in each environment, where there is something of it."""
    n = len(pairing.keys)
    halves = ((before, pairing.before), (after, pairing.after))
    means = np.array([[_known_means(values, half, n) for values in side.measures] for side, half in halves])
    overall = [cost for cost in _costs(means, scores.clusters) if cost.name in COSTS]
    found = []
    for place, name in enumerate(scores.names):
        here = scores.environments == place
        if each := _costs(means[:, :, here], scores.clusters[here]):
            found.append(Habits(name, tuple(_with_examples(cost, after, pairing.after, here) for cost in each)))
    return tuple(overall), tuple(found)


def _costs(means: NDArray[np.float64], clusters: NDArray[np.int64]) -> list[Cost]:
    """The differences of what is known in two clusters or more; `means` has the shape (2, len(MEASURES), tasks)."""
    found = []
    for name, (x, y) in zip(MEASURES, means.swapaxes(0, 1), strict=True):
        known = np.isfinite(x) & np.isfinite(y)
        x, y = x[known], y[known]
        if not (x.any() or y.any()) or len(np.unique(clusters[known])) < 2:
            continue
        difference = cluster_mean(y - x, clusters[known])
        found.append(Cost(name, float(x.mean()), float(y.mean()), difference, int(known.sum())))
    return found


def _with_examples(cost: Cost, after: Collection, half: Half, tasks: NDArray[np.bool_]) -> Cost:
    if cost.name not in (*HABITS, "truncated"):
        return cost
    values = after.measures[MEASURES.index(cost.name)][half.rows]
    # Where a form was lost, rollouts without it show what became of it.
    shows = values == 0 if cost.name in FORMS and cost.difference.mean < 0 else values > 0
    shown = half.rows[tasks[half.tasks] & shows]
    return msgspec.structs.replace(cost, examples=tuple(str(after.origin(row)) for row in shown[:_EXAMPLES].tolist()))


def _known_means(values: NDArray[np.float64], half: Half, n: int) -> NDArray[np.float64]:
    """Of each task the mean over the rollouts of which it is known; NaN where it is known of none."""
    taken = values[half.rows]
    known = np.isfinite(taken)
    counts = np.bincount(half.tasks[known], minlength=n)
    sums = np.bincount(half.tasks[known], taken[known], n)
    means = np.full(n, np.nan)
    np.divide(sums, counts, out=means, where=counts > 0)
    return means


def _p(
    changes: NDArray[np.float64], clusters: NDArray[np.int64], d: MeanEstimate, flipped: float, min_effect: float
) -> float:
    """p-value that the true difference lies within the smallest that counts, on the side where it was seen."""
    beyond = abs(d.mean) - min_effect
    if beyond <= ROUNDING * abs(d.mean):
        return 1.0
    if min_effect:
        flipped = _flipped(changes - np.sign(d.mean) * min_effect, clusters)
    if d.alike:
        return flipped
    p = float(2 * special.stdtr(d.degrees_of_freedom, -beyond / d.standard_error))
    return max(p, flipped) if d.clusters < FEW_CLUSTERS else p


def _flipped(changes: NDArray[np.float64], clusters: NDArray[np.int64]) -> float:
    """The sign-flip test on the clusters with a task that changed; to flip the others changes nothing."""
    moved = np.isin(clusters, np.unique(clusters[changes != 0]))
    return sign_flip_p(changes[moved], clusters[moved]) if moved.any() else 1.0


def _pass_at(scores: Scores) -> tuple[PassAtK, ...]:
    """pass@k for 1, 2, 4 … and for all repeats, as long as half of the tasks have so many on both sides."""
    least = scores.counts.min(axis=0)
    most = int(np.median(least))
    found = []
    for k in sorted({*(2**i for i in range(most.bit_length())), most}):
        there = least >= k
        at_k, at_one = (
            np.array([pass_at_k(scores.counts[i, there], scores.passes[i, there], j) for i in (0, 1)]) for j in (k, 1)
        )
        clusters = scores.clusters[there]
        several = len(np.unique(clusters)) > 1
        difference = cluster_mean(at_k[1] - at_k[0], clusters) if several else None
        means = (*at_k.mean(axis=1).tolist(), difference, *at_one.mean(axis=1).tolist())
        found.append(PassAtK(k, int(there.sum()), *means))
    return tuple(found)


def _codes(names: Sequence[str]) -> NDArray[np.int64]:
    """Each name's place among the sorted ones."""
    places = {name: place for place, name in enumerate(sorted(set(names)))}
    return np.array([places[name] for name in names], dtype=np.int64)
