"""Tasks to roll out again while training: those that the policy solves now and then."""

from __future__ import annotations

import math
from dataclasses import dataclass

import polars as pl

from gymtrl.errors import UserError

from .pool import Candidate, Pool


@dataclass(frozen=True)
class Prompt:
    """A task.

    Attributes:
        candidate (`Candidate`): A rollout of it, whose prompt and tools are those of the task.
        pass_rate (`float`): Share of its measured rollouts that were good.
        rollouts (`int`): How many were measured; what the world spoiled is no measurement.
    """

    candidate: Candidate
    pass_rate: float
    rollouts: int


@dataclass(frozen=True)
class PromptChoice:
    """Tasks.

    Attributes:
        prompts (`list[Prompt]`): In the order of the table.
        unused (`pl.DataFrame`): Every line that stands for no task, as `Pool.unused` gives it.
    """

    prompts: list[Prompt]
    unused: pl.DataFrame


def choose_prompts(
    pool: Pool, *, pass_rate: tuple[float, float] = (0.1, 0.9), zero_share: float = 0.1, seed: int = 0
) -> PromptChoice:
    """Chooses tasks by their logged pass rate, one line for each.

    A task that is always solved teaches nothing, and one that is never solved nothing yet: a few of these are let in.

    Args:
        pool (`Pool`): What is chosen from.
        pass_rate (`tuple[float, float]`, *optional*, defaults to 0.1 to 0.9): Both ends included. DAPO's dynamic
            sampling (arXiv 2503.14476), done before training.
        zero_share (`float`, *optional*, defaults to 0.1): Share of each side's tasks that may be ones never solved;
            ours.
        seed (`int`, *optional*, defaults to 0): For the choice among those never solved.

    Returns:
        `PromptChoice`: Possibly without tasks.

    Raises:
        `UserError`: If it is not known what is good, or the band or the share is none.
    """
    low, high = pass_rate
    if not 0.0 <= low <= high <= 1.0:
        raise UserError(f"the band of pass rates {low:g} to {high:g} is none", remedy="name two of 0 to 1, low first")
    if not 0.0 <= zero_share < 1.0:
        raise UserError(f"the share {zero_share:g} does not lie between 0 and 1", remedy="name a share such as 0.1")
    pool.require_threshold()
    rated = pool.rows.filter("counts").group_by("task").agg(rate=pl.col("good").mean(), rollouts=pl.col("good").count())
    rows = pool.usable(seed).join(rated, on="task", how="left", maintain_order="left").sort("index")
    rate = pl.col("rate")
    rows = rows.with_columns(
        why=pl.when(rate.is_null())
        .then(pl.lit("no_threshold"))
        # A task with its input row can be asked again by its key.
        .when(pl.col("index") != pl.col("index").sort_by(pl.col("input_key").is_null(), "index").first().over("task"))
        .then(pl.lit("same_task"))
        .when(rate.is_between(low, high))
        .then(None)
        .when(rate == 0.0)
        .then(pl.lit("never_solved"))
        .when(rate < low)
        .then(pl.lit("solved_too_seldom"))
        .otherwise(pl.lit("solved_too_often"))
    )
    within = rows.filter(pl.col("why").is_null())
    chosen = pl.concat([within, _never_solved(rows, within, zero_share)]).sort("index")
    used = chosen["index"].to_list()
    made = zip(pool.candidates(used), chosen["rate"], chosen["rollouts"], strict=True)
    return PromptChoice([Prompt(*one) for one in made], pool.unused(used, rows))


def _never_solved(rows: pl.DataFrame, within: pl.DataFrame, share: float) -> pl.DataFrame:
    """As many as make up at most that share of what is chosen for their side."""
    never = rows.filter(pl.col("why") == "never_solved").sort("draw", "index")
    sides = within["side"].to_list()
    parts = [
        never.filter(pl.col("side") == side).head(math.floor(sides.count(side) * share / (1 - share)))
        for side in ("train", "validation")
    ]
    return pl.concat(parts)
