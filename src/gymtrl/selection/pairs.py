"""Pairs of a good and a bad rollout of the same task."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence, Set
from dataclasses import dataclass
from itertools import groupby, islice
from typing import Literal, NamedTuple

import polars as pl

from .labels import labelled
from .pool import Candidate, Pool

Strategy = Literal["auto", "margin", "max_min", "sweet_spot", "length_matched"]

FRACTIONAL_MARGIN = 0.2
_ROUNDING = 1e-9  # 0.9 - 0.7 is a margin of 0.2


@dataclass(frozen=True)
class PairRules:
    """Which pairs are made.

    Attributes:
        strategy (`str`): Which bad rollout is set against the best good ones. `margin`: the one with the largest gap.
            `max_min`: the same, however small the gap where `margin` is not set. `sweet_spot`: the one nearest to mean
            − 2·std of the task's rewards (arXiv 2502.16825: the worst is too easy). `length_matched`: the one nearest
            in length, so that length is not what is learned. `auto`: `length_matched` where rewards are binary, else
            `sweet_spot`.
        pairs_per_task (`int`): Most pairs of one task.
        margin (`float`, *optional*): Least gap between the rewards of a pair. `None`: 0 for `max_min`, half their
            range where rewards are binary (0.5 for 0 and 1), else 0.2; ours.
        seed (`int`): For the choice among equals.
    """

    strategy: Strategy = "auto"
    pairs_per_task: int = 1
    margin: float | None = None
    seed: int = 0


@dataclass(frozen=True)
class Pair:
    """A good rollout and a bad one, both whole, that were asked the same.

    Attributes:
        task (`int`): As in `Pool.rows`.
        chosen (`Candidate`), rejected (`Candidate`): The good one and the bad one.
    """

    task: int
    chosen: Candidate
    rejected: Candidate


class _Row(NamedTuple):
    task: int
    number: int
    good: bool
    task_key: str
    reward: float
    length: int
    target: float


@dataclass(frozen=True)
class PairChoice:
    """Pairs.

    Attributes:
        pairs (`list[Pair]`): In the order of the tasks.
        strategy (`str`): How they were made.
        margin (`float`): Least gap between their rewards.
        unused (`pl.DataFrame`): Every line that is in no pair, as `Pool.unused` gives it.
        pool (`Pool`): What was chosen from.
        fit (`pl.DataFrame`): Its rows that may be in a pair, best first within each task.
        pairs_per_task (`int`): Most pairs of one task.
    """

    pairs: list[Pair]
    strategy: Strategy
    margin: float
    unused: pl.DataFrame
    pool: Pool
    fit: pl.DataFrame
    pairs_per_task: int

    def others(self, tasks: Set[int]) -> Iterator[list[Pair]]:
        """The next best pairs, for tasks whose pairs cannot be used.

        Args:
            tasks (`Set[int]`): Tasks without a pair; looked at again before each round, so take out those that have got
                one.

        Yields:
            `list[Pair]`: At most `pairs_per_task` new pairs of each of the tasks, until they have no more.
        """
        of_tasks = self.fit.filter(pl.col("task").is_in(list(tasks)))
        left = {
            task: islice(_ranked(rows, self.strategy, self.margin), self.pairs_per_task, None)
            for task, rows in _by_task(of_tasks)
        }
        while made := [
            (task, *pair)
            for task, pairs in left.items()
            if task in tasks
            for pair in islice(pairs, self.pairs_per_task)
        ]:
            yield _pairs(self.pool, made)


def choose_pairs(pool: Pool, rules: PairRules) -> PairChoice:
    """Pairs good with bad rollouts of each task, distinct completions only.

    A rollout is in one pair of its task, unless the task has no other for a further one.

    Args:
        pool (`Pool`): What is chosen from.
        rules (`PairRules`): Which pairs are made.

    Returns:
        `PairChoice`: Possibly without pairs.

    Raises:
        `UserError`: If it is not known what is good.
    """
    binary = pool.is_binary()
    strategy = rules.strategy
    if strategy == "auto":
        strategy = "length_matched" if binary else "sweet_spot"
    rows = labelled(pool, rules.seed)
    reward, good = pl.col("reward"), pl.col("good")
    margin = rules.margin
    if margin is None:
        known = rows.filter(good.is_not_null()).select(range=reward.max() - reward.min())["range"].item() or 0.0
        margin = 0.0 if strategy == "max_min" else known / 2 if binary else FRACTIONAL_MARGIN
    # Copies count here: the mean is over what the policy does.
    rows = rows.with_columns(target=(reward.mean() - 2 * reward.std(ddof=0)).over("task"))
    ready = rows.filter(pl.col("why").is_null())
    # Tasks that share an input row are one, but only what was asked in the same words makes a pair.
    asked = ["task", "task_key"]
    to_worst = reward - reward.filter(~good).min().over(asked)
    farthest = pl.when(good).then(to_worst).otherwise(reward.filter(good).max().over(asked) - reward)
    ready = ready.with_columns(
        why=pl.when(~good.any().over("task"))
        .then(pl.lit("no_good_rollout"))
        .when(good.all().over("task"))
        .then(pl.lit("no_bad_rollout"))
        .when(farthest.is_null())
        .then(pl.lit("prompt_differs"))
        .when(farthest < margin - _ROUNDING)
        .then(pl.lit("margin_too_small"))
    )
    fit = ready.filter(pl.col("why").is_null())
    fit = fit.select("task", "index", "good", "task_key", "reward", length="completion_chars", target="target")
    made = [
        (task, *pair)
        for task, of_task in _by_task(fit)
        for pair in islice(_ranked(of_task, strategy, margin), rules.pairs_per_task)
    ]
    used = {index for _, *pair in made for index in pair}
    why = pl.concat([rows.filter(pl.col("why").is_not_null()).select("index", "why"), ready.select("index", "why")])
    return PairChoice(
        pairs=_pairs(pool, made),
        strategy=strategy,
        margin=margin,
        unused=pool.unused(used, why.with_columns(pl.col("why").fill_null("not_paired"))),
        pool=pool,
        fit=fit,
        pairs_per_task=rules.pairs_per_task,
    )


def _by_task(fit: pl.DataFrame) -> Iterator[tuple[int, list[_Row]]]:
    for task, rows in groupby(map(_Row._make, fit.iter_rows()), key=lambda row: row.task):
        yield task, list(rows)


def _pairs(pool: Pool, made: Sequence[tuple[int, int, int]]) -> list[Pair]:
    tasks, chosen, rejected = ([pair[part] for pair in made] for part in range(3))
    return [Pair(*pair) for pair in zip(tasks, pool.candidates(chosen), pool.candidates(rejected), strict=True)]


def _ranked(rows: Sequence[_Row], strategy: Strategy, margin: float) -> Iterator[tuple[int, int]]:
    """The pairs of one task, best first; its rows stand best first and else in the order of their draws."""
    goods, bads = [row for row in rows if row.good], [row for row in rows if not row.good]
    uses: Counter[int] = Counter()
    made: set[tuple[int, int]] = set()
    while True:
        best: tuple[tuple[int, int, float, float, int], tuple[int, int]] | None = None
        for place, good in enumerate(goods):
            if best is not None and best[0][0] == uses[good.number] == 0:
                break
            for other, bad in enumerate(bads):
                pair = (good.number, bad.number)
                if bad.task_key != good.task_key or good.reward - bad.reward < margin - _ROUNDING or pair in made:
                    continue
                rank = (uses[good.number] + uses[bad.number], place, *_distance(good, bad, strategy), other)
                if best is None or rank < best[0]:
                    best = (rank, pair)
        if best is None:
            return
        made.add(best[1])
        uses.update(best[1])
        yield best[1]


def _distance(good: _Row, bad: _Row, strategy: Strategy) -> tuple[float, float]:
    """How far a bad rollout is from the one that is looked for."""
    length = abs(good.length - bad.length)
    if strategy == "length_matched":
        return length, 0.0
    if strategy == "sweet_spot":
        return round(abs(bad.reward - bad.target), 9), length
    return bad.reward, 0.0
