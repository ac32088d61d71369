"""Good and bad rollouts, each completion of a task once."""

from __future__ import annotations

import polars as pl

from .pool import Pool


def labelled(pool: Pool, seed: int) -> pl.DataFrame:
    """What can be labelled.

    Args:
        pool (`Pool`): What is chosen from.
        seed (`int`): For the choice among equals.

    Returns:
        `pl.DataFrame`: The usable rows with `draw` and `why` (null where it can be labelled): `no_threshold`,
            `both_good_and_bad` (the same completion was rewarded both ways: a label would be noise),
            `duplicate_completion` or, where the user had a filter look for them, `near_duplicate`. Best first within
            each task; what a filter kept before its copies.

    Raises:
        `UserError`: If it is not known what is good.
    """
    pool.require_threshold()
    rows = pool.usable(seed).sort(
        "task", "reward", "kept", "draw", "index", descending=[False, True, True, False, False]
    )
    same = ["task", "completion"]
    return rows.with_columns(
        why=pl.when(pl.col("good").is_null())
        .then(pl.lit("no_threshold"))
        .when(pl.col("good").any().over(same) & ~pl.col("good").all().over(same))
        .then(pl.lit("both_good_and_bad"))
        .when(pl.int_range(pl.len()).over(same) > 0)
        .then(pl.lit("duplicate_completion"))
        .when("near_copy")
        .then(pl.lit("near_duplicate"))
    )
