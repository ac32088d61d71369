"""Rollouts labelled good or bad, each for itself."""

from __future__ import annotations

from dataclasses import dataclass

import polars as pl

from gymtrl.errors import UserError
from gymtrl.rollouts.quality import CAP_PER_TASK

from .labels import labelled
from .pool import Candidate, Pool, draws

MOST_DESIRABLE = 4 / 3
"""Most that all good rollouts may weigh against all bad ones; the least is 1. KTO, arXiv 2402.01306."""


@dataclass(frozen=True)
class UnpairedChoice:
    """Labelled rollouts.

    Attributes:
        labelled (`list[tuple[Candidate, bool]]`): Each with its label, good and bad mixed.
        unused (`pl.DataFrame`): Every other line, as `Pool.unused` gives it.
    """

    labelled: list[tuple[Candidate, bool]]
    unused: pl.DataFrame


def choose_unpaired(pool: Pool, *, cap_per_task: int = CAP_PER_TASK, seed: int = 0) -> UnpairedChoice:
    """Chooses rollouts of every task, good and bad ones alike.

    Args:
        pool (`Pool`): What is chosen from.
        cap_per_task (`int`, *optional*, defaults to 4): Most good and most bad rollouts of one task, so that tasks with
            many rollouts do not outweigh the others.
        seed (`int`, *optional*, defaults to 0): For the choice among equals and for the order.

    Returns:
        `UnpairedChoice`: Possibly without one of the labels, or empty.

    Raises:
        `UserError`: If it is not known what is good.
    """
    rows = labelled(pool, seed)
    ready = rows.filter(pl.col("why").is_null())
    # Of the good the best, as a filter does; of the bad any, or the mildest failures would never be seen.
    ready = ready.sort("task", "good", pl.when("good").then(-pl.col("reward")), ~pl.col("kept"), "draw", "index")
    over = ready.filter(pl.int_range(pl.len()).over("task", "good") >= cap_per_task)
    over = over.with_columns(why=pl.lit("over_cap"))
    taken = ready.join(over, on="index", how="anti")
    # By a draw of its own: by the one above, tasks of which much was left out would all stand in front.
    taken = taken.with_columns(draws(taken["row_id"], f"order:{seed}")).sort("draw", "index")
    used = taken["index"].to_list()
    why = pl.concat([rows.select("index", "why").filter(pl.col("why").is_not_null()), over.select("index", "why")])
    return UnpairedChoice(
        labelled=list(zip(pool.candidates(used), taken["good"].to_list(), strict=True)),
        unused=pool.unused(used, why),
    )


def kto_weights(desirable: int, undesirable: int) -> tuple[float, float]:
    """Weights with which good rollouts together weigh 1 to 4/3 times what bad ones do.

    Args:
        desirable, undesirable (`int`): How many there are.

    Returns:
        `tuple[float, float]`: `desirable_weight` and `undesirable_weight`. Both are 1 where the numbers do already;
            else one of them is raised as far as the nearer bound.

    Raises:
        `UserError`: If there are none of one kind.
    """
    if desirable <= 0 or undesirable <= 0:
        lacking = "good" if desirable <= 0 else "bad"
        raise UserError(
            f"there is no {lacking} rollout: KTO learns from good and bad ones",
            remedy="collect more, or another --reward-threshold; where only good ones are left, train with SFT",
        )
    ratio = desirable / undesirable
    if ratio < 1.0:
        return undesirable / desirable, 1.0
    return 1.0, max(1.0, ratio / MOST_DESIRABLE)
