"""Why a rollout is dropped: every rule once, in the order in which they apply.

A rule is a name, the words for it, and an expression over the columns of the rollout table and those of `measures`. A
rollout is dropped by the first rule whose expression is true for it; what the settings do not ask for has none.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import polars as pl

from .settings import FilterSettings


@dataclass(frozen=True)
class Rule:
    """One reason to drop a rollout.

    Attributes:
        name (`str`): The reason code.
        words (`str`): What is wrong, for a person.
        drops (`Callable[[FilterSettings], pl.Expr | None]`): The condition; `None` where the settings do not ask.
        detail (`str`): Column whose value follows the name after a colon; `""` for none.
    """

    name: str
    words: str
    drops: Callable[[FilterSettings], pl.Expr | None]
    detail: str = ""


def _if_set(value: object, condition: pl.Expr) -> pl.Expr | None:
    return None if value is None else condition


def _above(column: str, bound: float | None) -> pl.Expr | None:
    return None if bound is None else pl.col(column) > bound


def _below(column: str, bound: float | None) -> pl.Expr | None:
    return None if bound is None else pl.col(column) < bound


def _other(column: str, wanted: Sequence[str] | None, unwanted: Sequence[str] | None) -> pl.Expr | None:
    parts = []
    if wanted is not None:
        parts.append(~pl.col(column).is_in(wanted).fill_null(False))
    if unwanted is not None:
        parts.append(pl.col(column).is_in(unwanted).fill_null(False))
    return pl.any_horizontal(parts) if parts else None


COLUMN_RULES = (
    Rule(
        "reject",
        "the line is no rollout that can be learned from",
        lambda s: pl.col("verdict") == "reject",
        detail="reason",
    ),
    Rule(
        "skip",
        "the line belongs to a file that Gym writes beside the rollouts",
        lambda s: pl.col("verdict") == "skip",
        detail="reason",
    ),
    Rule(
        "context",
        "the model saw more than the row holds",
        lambda s: None if s.keep_context else pl.col("verdict") == "context",
        detail="reason",
    ),
    Rule("reward_missing", "the row has no reward", lambda s: pl.col("reward").is_null()),
    Rule("reward_not_finite", "the reward is NaN or infinite", lambda s: ~pl.col("reward").is_finite()),
    Rule("masked", "the environment says that the reward is no valid measurement", lambda s: pl.col("masked")),
    Rule("truncated", "the response is incomplete", lambda s: None if s.keep_truncated else pl.col("truncated")),
    Rule("ends_in_reasoning", "the last turn has no answer", lambda s: pl.col("fault") == "ends_in_reasoning"),
    Rule("unbalanced_think", "think tags in the text do not match", lambda s: pl.col("fault") == "unbalanced_think"),
    Rule(
        "other_agent", "the agent is not one of those asked for", lambda s: _other("agent", s.agents, s.exclude_agents)
    ),
    Rule(
        "other_environment",
        "the environment is not one of those asked for",
        lambda s: _other("environment", s.environments, s.exclude_environments),
    ),
    Rule("too_many_turns", "it has too many turns", lambda s: _above("turns", s.max_turns)),
    Rule(
        "too_many_tool_calls",
        "it has too many tool calls",
        lambda s: _above("tool_calls", s.max_tool_calls),
    ),
    Rule("no_tool_use", "it has no tool call", lambda s: pl.col("tool_calls") == 0 if s.require_tool_use else None),
    Rule(
        "prompt_too_long",
        "the prompt has too many characters",
        lambda s: _above("prompt_chars", s.max_prompt_chars),
    ),
    Rule(
        "completion_too_long",
        "the completion has too many characters",
        lambda s: _above("completion_chars", s.max_completion_chars),
    ),
    Rule(
        "completion_too_short",
        "the completion has too few characters",
        lambda s: _below("completion_chars", s.min_completion_chars),
    ),
    Rule("where", "the condition of --where does not hold", lambda s: _if_set(s.where, ~pl.col("holds"))),
)
"""What shows in the row alone."""

CONTAMINATED = Rule(
    "contaminated", "the prompt overlaps with a benchmark", lambda s: _if_set(s.benchmark, pl.col("overlaps"))
)

REWARD_RULES = (
    Rule("below_threshold", "the reward is too low", lambda s: pl.col("reward") < pl.col("threshold")),
    Rule("above_max_reward", "the reward is too high", lambda s: _above("reward", s.max_reward)),
    Rule(
        "pass_rate",
        "the task is solved too often or too seldom",
        lambda s: None if s.pass_rate is None else ~pl.col("pass_rate").is_between(*s.pass_rate),
    ),
    Rule(
        "repetitive",
        "the completion repeats itself",
        lambda s: _above("repetition", s.max_repetition),
    ),
    Rule(
        "duplicate_completion",
        "the same completion of the same task is kept already",
        lambda s: None if s.dedup == "none" else pl.col("copy"),
    ),
    Rule(
        "near_duplicate",
        "nearly the same completion of the same task is kept already",
        lambda s: pl.col("near_copy") if s.dedup == "near" else None,
    ),
    Rule(
        "over_cap",
        "enough completions of the task are kept already",
        lambda s: None if s.balance == "none" else pl.col("place") >= pl.col("allowance"),
    ),
)
"""What depends on the threshold, and on the other rollouts that are kept."""

RULES = (*COLUMN_RULES, CONTAMINATED, *REWARD_RULES)
UNCHOSEN = {
    "no_threshold": "it is not known which rewards are good where it was collected",
    "both_good_and_bad": "the same completion of the same task was rewarded as good and as bad",
    "no_good_rollout": "the task has no good rollout",
    "no_bad_rollout": "the task has no bad rollout",
    "prompt_differs": "no good and bad rollouts of the task were asked in the same words",
    "margin_too_small": "its reward is too near to those of the other side",
    "not_paired": "enough pairs of the task were made without it",
    "same_task": "another rollout stands for the task",
    "never_solved": "the task was never solved, and enough such tasks are in",
    "solved_too_seldom": "the task is solved too seldom",
    "solved_too_often": "the task is solved too often",
    "group_too_small": "the group has too few whole rollouts",
    "no_variance": "all rewards of the group are the same",
    "over_size": "the group is full without it",
}
"""Why a rollout that can be used was not chosen for a pair, a prompt or a group: reason code → words."""

DROP_SENTENCES = {rule.name: rule.words for rule in RULES} | UNCHOSEN


def drop_sentence(reason: str) -> str:
    """The words for a drop reason of a filter or a choice; the code of a verdict may follow a colon."""
    return DROP_SENTENCES[reason.partition(":")[0]]
