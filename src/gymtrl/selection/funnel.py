"""What a filter would do, without doing it: the rows that each rule leaves, and what other thresholds would keep."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import polars as pl

from gymtrl.errors import UserError

from .choice import Choice, choose
from .decision import divide, drop_reasons
from .rules import COLUMN_RULES, CONTAMINATED, RULES
from .settings import FilterSettings
from .source import open_source
from .threshold import find_threshold

MOST_REWARDS = 12
"""Up to so many distinct rewards each is tried as the threshold, beyond that their deciles and both ends."""

_CHARS_PER_TOKEN = 4  # of English text; only where the run did not count tokens


@dataclass(frozen=True)
class Step:
    """One rule and what it leaves.

    Attributes:
        rule, words (`str`): The reason code and what it means.
        dropped, left (`int`): Rows that it drops, and those left after it.
    """

    rule: str
    words: str
    dropped: int
    left: int


@dataclass(frozen=True)
class Kept:
    """What a threshold would keep.

    Attributes:
        threshold (`float`): Lowest reward.
        rows, tasks (`int`): Rollouts and tasks, training and validation together.
        tokens (`int`): Tokens of their completions: as counted by the run, else a quarter of the characters.
        estimated (`int`): Rows whose tokens are that estimate.
        chosen (`bool`): The settings, or the rule for rewards like these, choose it.
    """

    threshold: float
    rows: int
    tasks: int
    tokens: int
    estimated: int
    chosen: bool


@dataclass(frozen=True)
class Side:
    """One side of the split.

    Attributes:
        rows, tasks (`int`): Rollouts that would be kept, and their tasks.
    """

    rows: int
    tasks: int


@dataclass(frozen=True)
class Preview:
    """What a filter would do.

    Attributes:
        rows (`int`): Lines of the input.
        threshold (`float`, *optional*): Lowest reward that would be kept; `None` where the user has to say it, or each
            environment or agent has its own.
        threshold_why (`str`): Where it comes from, or why there is none.
        thresholds (`dict[str, float]`): Those of each environment or agent; empty where there is one for all.
        funnel (`list[Step]`): The rules in their order; without a threshold those before it only.
        sweep (`list[Kept]`): Candidates for the threshold of all, ascending.
        split (`dict[str, Side]`): What `train` and `validation` would hold; empty where the filter would stop.
        stops (`str`): The error with which it would stop; `""` where it would not.
        remedy (`str`): What can be done about that.
    """

    rows: int
    threshold: float | None
    threshold_why: str
    thresholds: dict[str, float]
    funnel: list[Step]
    sweep: list[Kept]
    split: dict[str, Side]
    stops: str = ""
    remedy: str = ""


def preview_filter(
    inputs: Sequence[Path],
    folder: Path,
    settings: FilterSettings,
    *,
    on_bytes: Callable[[int], object] | None = None,
) -> Preview:
    """Looks ahead at `filter_rollouts`.

    Args:
        inputs (`Sequence[Path]`): Rollout files, folders that hold them, or one rollout table.
        folder (`Path`): A folder for what is needed meanwhile.
        settings (`FilterSettings`): What is kept.
        on_bytes (`Callable[[int], object]`, *optional*): As in `filter_rollouts`.

    Returns:
        `Preview`: What would be kept, and where the filter would stop.

    Raises:
        `UserError`: If there is no rollout, or a setting names what is not there.
    """
    source = open_source(inputs, folder, settings, on_bytes)
    choice = choose(source.rows, settings)
    threshold = find_threshold(choice.state)
    # From the lowest reward upwards, so that what is costly is found out once.
    sweep = _sweep(choice, threshold.value)
    reasons, whole, split, error = choice.state.reasons, False, {}, None
    try:
        reasons, whole = drop_reasons(choice, threshold), True
        decision = divide(choice, reasons, threshold)
        tasks = decision.kept_tasks()
        split = {side: Side(rows, tasks[side]) for side, rows in decision.rows().items()}
    except UserError as stopped:
        error = stopped
    return Preview(
        rows=len(reasons),
        threshold=threshold.value,
        threshold_why=threshold.why,
        thresholds=dict(threshold.each),
        funnel=_funnel(reasons, settings, whole=whole),
        sweep=sweep,
        split=split,
        stops=error.message if error else "",
        remedy=(error.remedy or "") if error else "",
    )


def _funnel(reasons: pl.Series, settings: FilterSettings, *, whole: bool) -> list[Step]:
    names = reasons.drop_nulls().str.splitn(":", 2).struct.field("field_0").alias("name")
    dropped = dict(names.value_counts().iter_rows())
    left = len(reasons)
    steps = []
    for rule in RULES if whole else (*COLUMN_RULES, CONTAMINATED):
        if rule.drops(settings) is not None:
            left -= dropped.get(rule.name, 0)
            steps.append(Step(rule.name, rule.words, dropped.get(rule.name, 0), left))
    return steps


def _sweep(choice: Choice, chosen: float | None) -> list[Kept]:
    state = choice.state
    counted = pl.col("output_tokens").is_null().alias("estimated")
    tokens = pl.coalesce("output_tokens", pl.col("completion_chars") // _CHARS_PER_TOKEN).alias("tokens")
    frame = state.rows.select("reward", tokens, counted).collect().with_columns(state.tasks)
    thresholds = {*_candidates(frame["reward"].filter(state.reasons.is_null())), *([] if chosen is None else [chosen])}
    sweep = []
    for threshold in sorted(thresholds):
        kept = frame.filter(choice.at(threshold).is_null())
        sweep.append(
            Kept(
                threshold=threshold,
                rows=kept.height,
                tasks=kept["task"].n_unique(),
                tokens=int(kept["tokens"].sum()),
                estimated=int(kept["estimated"].sum()),
                chosen=threshold == chosen,
            )
        )
    return sweep


def _candidates(rewards: pl.Series) -> list[float]:
    distinct = rewards.unique().sort().to_list()
    if len(distinct) <= MOST_REWARDS:
        return distinct
    return [value for i in range(11) if (value := rewards.quantile(i / 10, "nearest")) is not None]
