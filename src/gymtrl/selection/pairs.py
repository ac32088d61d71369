"""Pairs of a good and a bad rollout of the same task."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Literal, NamedTuple

import polars as pl

from .labels import labelled
from .pool import Candidate, Pool

Strategy = Literal["auto", "margin", "max_min", "sweet_spot", "length_matched"]

BINARY_MARGIN = 0.5
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
        margin (`float`, *optional*): Least gap between the rewards of a pair. `None`: 0.5 where rewards are binary,
            else 0.2; ours.
        seed (`int`): For the choice among equals.
    """

    strategy: Strategy = "auto"
    pairs_per_task: int = 1
    margin: float | None = None
    seed: int = 0


@dataclass(frozen=True)
class Pair:
    """A good rollout and a bad one, both whole, that were asked the same."""

    chosen: Candidate
    rejected: Candidate


@dataclass(frozen=True)
class PairChoice:
    """Pairs.

    Attributes:
        pairs (`list[Pair]`): In the order of the tasks.
        strategy (`str`): How they were made.
        margin (`float`): Least gap between their rewards.
        unused (`pl.DataFrame`): Every line that is in no pair, as `Pool.unused` gives it.
    """

    pairs: list[Pair]
    strategy: Strategy
    margin: float
    unused: pl.DataFrame


class _Row(NamedTuple):
    task: int
    number: int
    good: bool
    task_key: str
    reward: float
    length: int
    target: float


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
    margin = rules.margin
    if margin is None:
        margin = 0.0 if strategy == "max_min" else BINARY_MARGIN if binary else FRACTIONAL_MARGIN
    rows = labelled(pool, rules.seed)
    # Copies count here: the mean is over what the policy does.
    reward, good = pl.col("reward"), pl.col("good")
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
    columns = fit.select("task", "index", "good", "task_key", "reward", length="completion_chars", target="target")
    pairs: list[tuple[int, int]] = []
    for _, of_task in groupby(map(_Row._make, columns.iter_rows()), key=lambda row: row.task):
        pairs += _pair(list(of_task), strategy, margin, rules.pairs_per_task)
    chosen, rejected = ([pair[side] for pair in pairs] for side in (0, 1))
    made = zip(pool.candidates(chosen), pool.candidates(rejected), strict=True)
    why = pl.concat([rows.filter(pl.col("why").is_not_null()).select("index", "why"), ready.select("index", "why")])
    return PairChoice(
        pairs=[Pair(*sides) for sides in made],
        strategy=strategy,
        margin=margin,
        unused=pool.unused({*chosen, *rejected}, why.with_columns(pl.col("why").fill_null("not_paired"))),
    )


def _pair(rows: Sequence[_Row], strategy: Strategy, margin: float, most: int) -> list[tuple[int, int]]:
    """Makes the pairs of one task, whose rows stand best first and else in the order of their draws."""
    goods, bads = [row for row in rows if row.good], [row for row in rows if not row.good]
    uses: Counter[int] = Counter()
    made: list[tuple[int, int]] = []
    while len(made) < most:
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
            break
        made.append(best[1])
        uses.update(best[1])
    return made


def _distance(good: _Row, bad: _Row, strategy: Strategy) -> tuple[float, float]:
    """How far a bad rollout is from the one that is looked for."""
    length = abs(good.length - bad.length)
    if strategy == "length_matched":
        return length, 0.0
    if strategy == "sweet_spot":
        return round(abs(bad.reward - bad.target), 9), length
    return bad.reward, 0.0
