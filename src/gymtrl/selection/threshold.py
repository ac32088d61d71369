"""The lowest reward that is kept: as the user says, else by a rule for rewards like those that are left."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from dataclasses import dataclass, field

import polars as pl

from gymtrl.errors import UserError
from gymtrl.rollouts.quality import default_threshold

from .measures import State

_NAMELESS = "rollouts without a name"
_NAMED = (
    pl.when(pl.col("environment").is_not_null())
    .then(pl.format("environment {}", "environment"))
    .when(pl.col("agent").is_not_null())
    .then(pl.format("agent {}", "agent"))
    .otherwise(pl.lit(_NAMELESS))
    .alias("name")
)


@dataclass(frozen=True)
class Threshold:
    """The lowest reward that is kept.

    Attributes:
        value (`float`, *optional*): Of all rows; `None` where there is none, or each environment or agent has its own.
        why (`str`): Where it comes from, or why there is none.
        rewards (`list[float]`): Distinct rewards that it is about, ascending.
        each (`Mapping[str, float]`): `environment NAME` or `agent NAME` → its own, where each has one.
        without (`list[str]`): Of several environments or agents those that have none.
    """

    value: float | None
    why: str
    rewards: list[float]
    each: Mapping[str, float] = field(default_factory=dict)
    without: list[str] = field(default_factory=list)

    def of_rows(self, state: State) -> float | pl.Series:
        """The threshold of all rows, or that of each.

        Raises:
            `UserError`: If there is none, or no reward can reach it and yet lie within `max_reward`.
        """
        lowest = min(self.each.values(), default=self.value)
        if lowest is None:
            raise UserError(self.why, remedy=self._remedy())
        bound = state.settings.max_reward
        if bound is not None and bound < lowest:
            raise UserError(
                f"--max-reward {bound:g} lies below the threshold {lowest:g} ({self.why}): no reward can pass",
                remedy=f"pass a --reward-threshold of {bound:g} or less as well, or a higher --max-reward",
            )
        if self.value is not None:
            return self.value
        names = state.rows.select(_NAMED).collect().to_series()
        return names.replace_strict(dict(self.each), default=None, return_dtype=pl.Float64).alias("threshold")

    def _remedy(self) -> str:
        remedy = "pass --reward-threshold; gymtrl filter --dry-run shows what each would keep"
        named = (name.partition(" ") for name in self.without if name != _NAMELESS)
        excluded = [f"--exclude-{kind}s {shlex.quote(name)}" for kind, _, name in named]
        what = "it" if len(excluded) == 1 else "them"
        return f"{remedy}; or leave {what} out with {' '.join(excluded)}" if excluded else remedy


def find_threshold(state: State) -> Threshold:
    """Finds the threshold for the rows that are left.

    Args:
        state (`State`): The rows after the rules that need no threshold. Where their rewards have no rule together,
            each environment's, or without one each agent's, are looked at alone.
    """
    kept = state.kept("reward", "environment", "agent")
    rewards = kept["reward"].unique().sort().to_list()
    if state.settings.reward_threshold is not None:
        return Threshold(state.settings.reward_threshold, "as set", rewards)
    value, why = default_threshold(rewards)
    if value is not None or not rewards:
        return Threshold(value, why, rewards)
    named = kept.group_by(_NAMED).agg(pl.col("reward").unique()).sort("name")
    found = {name: default_threshold(own) for name, own in named.iter_rows()}
    each = {name: own for name, (own, _) in found.items() if own is not None}
    without = [name for name in found if name not in each]
    if not each:
        return Threshold(None, why, rewards)
    if without:
        return Threshold(None, "; ".join(f"{name}: {found[name][1]}" for name in without), rewards, without=without)
    words = "; ".join(f"{name} {own:g} ({found[name][1]})" for name, own in each.items())
    return Threshold(None, f"no rule fits all rewards together, so each has its own: {words}", rewards, each)
