"""Settings of `filter`; importing them costs nothing but pydantic."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, Field, ValidationInfo, field_validator

_BAND = re.compile(r"\s*([0-9.]+)\s*[-,]\s*([0-9.]+)\s*")


def _read_band(value: Any) -> Any:
    """`0.1-0.9` and `0.1,0.9` as two numbers; what is no text as it is."""
    if not isinstance(value, str):
        return value
    match = _BAND.fullmatch(value)
    if match is None:
        raise ValueError("expected two numbers, such as 0.1-0.9")
    return match.groups()


def _in_order(band: tuple[float, float]) -> tuple[float, float]:
    if band[0] > band[1]:
        raise ValueError("the lower end comes first, such as 0.1-0.9")
    return band


def _read_share(value: Any) -> Any:
    """`validation=0.1` as the number alone."""
    return value.removeprefix("validation=") if isinstance(value, str) else value


Share = Annotated[float, Field(ge=0.0, le=1.0)]
HeldOut = Annotated[float, Field(ge=0.0, lt=1.0), BeforeValidator(_read_share)]
Band = Annotated[tuple[Share, Share], BeforeValidator(_read_band, tuple[Share, Share] | str), AfterValidator(_in_order)]
Names = Annotated[list[str], Field(min_length=1)]


class FilterSettings(BaseModel, extra="forbid"):
    """Which rollouts are kept, and which tasks are held out."""

    reward_threshold: float | None = Field(
        default=None,
        allow_inf_nan=False,
        description="Lowest reward that is kept. Unset: of the rows that are left, the highest for binary "
        "rewards, 0.8 for rewards within 0 and 1; else each environment's own by these rules; else it needs a value",
        json_schema_extra={"source": "NeMo Gym's offline-training tutorial; ours for fractional rewards"},
    )
    max_reward: float | None = Field(
        default=None,
        allow_inf_nan=False,
        description="Highest reward that is kept",
        json_schema_extra={"source": "no bound unless the reward can be gamed"},
    )
    pass_rate: Band | None = Field(
        default=None,
        description="Keep the tasks whose logged pass rate lies in this band, such as 0.1-0.9, both ends included. The "
        "pass rate of a group is the share of its valid rollouts that reach the threshold",
        json_schema_extra={"source": "all tasks; a band leaves out what is always or never solved"},
    )
    cap_per_task: int = Field(
        default=4,
        ge=1,
        description="Most distinct completions kept of one task; duplicates are dropped first. See balance; not with "
        "none",
        json_schema_extra={"source": "RFT, arXiv 2308.01825: the gains come from distinct paths"},
    )
    balance: Literal["uniform", "prop2diff", "none"] = Field(
        default="uniform",
        description="uniform: every task keeps up to the cap. prop2diff: the hardest tasks with a good rollout keep up "
        "to the cap, easier ones fewer in proportion to 1 - pass rate, at least 1. none: no cap",
        json_schema_extra={"source": "RFT, arXiv 2308.01825; prop2diff: DART-Math, arXiv 2407.13690"},
    )
    dedup: Literal["exact", "near", "none"] = Field(
        default="exact",
        description="Drop completions of a task that say exactly the same as one that is kept, or nearly the same, or "
        "none",
        json_schema_extra={"source": "RFT, arXiv 2308.01825: the gains come from distinct paths"},
    )
    max_repetition: float | None = Field(
        default=None,
        ge=0.0,
        le=1.0,
        description="Most repetition of itself that a completion may have, 0 to 1",
        json_schema_extra={"source": "no bound; loops are seldom rewarded"},
    )
    benchmark: Annotated[list[Path], Field(min_length=1)] | None = Field(
        default=None,
        description="File whose tasks must not be trained on; rollouts whose prompts overlap them are dropped and "
        "listed in contaminated.jsonl. May be repeated",
        json_schema_extra={"source": "none; name the benchmarks that the model will be judged by"},
    )
    where: str | None = Field(
        default=None,
        min_length=1,
        description="SQL condition over the columns of the rollout table, such as \"turns <= 15 and agent = 'x'\"; "
        "null counts as false",
        json_schema_extra={"source": "no condition"},
    )
    agents: Names | None = Field(
        default=None,
        description="Keep the rollouts of this agent only. May be repeated",
        json_schema_extra={"source": "all agents"},
    )
    exclude_agents: Names | None = Field(
        default=None,
        description="Drop the rollouts of this agent. May be repeated",
        json_schema_extra={"source": "all agents"},
    )
    environments: Names | None = Field(
        default=None,
        description="Keep the rollouts of this environment only. May be repeated",
        json_schema_extra={"source": "all environments"},
    )
    exclude_environments: Names | None = Field(
        default=None,
        description="Drop the rollouts of this environment. May be repeated",
        json_schema_extra={"source": "all environments"},
    )
    max_turns: int | None = Field(
        default=None,
        ge=1,
        description="Most assistant turns of a rollout",
        json_schema_extra={"source": "no bound"},
    )
    max_tool_calls: int | None = Field(
        default=None,
        ge=0,
        description="Most tool calls of a rollout",
        json_schema_extra={"source": "no bound"},
    )
    require_tool_use: bool = Field(
        default=False,
        description="Drop rollouts without a tool call",
        json_schema_extra={"source": "ours: a right answer without tools is one too"},
    )
    max_prompt_chars: int | None = Field(
        default=None,
        ge=0,
        description="Most characters of a prompt",
        json_schema_extra={"source": "no bound; 'format sft' knows the tokens"},
    )
    max_completion_chars: int | None = Field(
        default=None,
        ge=0,
        description="Most characters of a completion",
        json_schema_extra={"source": "no bound; 'format sft' knows the tokens"},
    )
    min_completion_chars: int | None = Field(
        default=None,
        ge=0,
        description="Fewest characters of a completion",
        json_schema_extra={"source": "no bound"},
    )
    validation: HeldOut = Field(
        default=0.1,
        description="Share of the tasks (clusters) held out for validation, such as 0.1 or validation=0.1; 0 holds out "
        "none",
        json_schema_extra={"source": "ours", "flags": ["--split"]},
    )
    cluster: str | None = Field(
        default=None,
        min_length=1,
        description="What the split must not tear apart: a dotted path in the row or its input row, such as "
        "verifier_metadata.template, or a .jsonl file of rows with task_key or input_key, and cluster. Unset: the task",
        json_schema_extra={"source": "ours: a task is its own cluster unless the user knows better"},
    )
    split_salt: str = Field(
        default="gymtrl",
        description="Text that the split is drawn with; keep it over all rounds, so that what is held out stays so",
        json_schema_extra={"source": "ours"},
    )
    keep_context: bool = Field(
        default=False,
        description="Keep rollouts whose model saw more than the row holds (undeclared tools, hidden context)",
        json_schema_extra={"source": "ours: training on half of the context teaches guessing"},
    )
    keep_truncated: bool = Field(
        default=False,
        description="Keep rollouts whose response is incomplete; 'format sft' still leaves them out",
        json_schema_extra={"source": "ours: a cut completion teaches to stop anywhere"},
    )
    max_line_bytes: int = Field(
        default=64_000_000,
        ge=1,
        description="Longer lines are refused unread; not with a table, whose lines are read already",
        json_schema_extra={"source": "ours: no rollout is that long"},
    )
    seed: int = Field(
        default=0,
        description="Seed for the choice among completions of equal reward",
        json_schema_extra={"source": "ours"},
    )

    @field_validator("max_reward")
    @classmethod
    def _not_below_the_threshold(cls, value: float | None, info: ValidationInfo) -> float | None:
        threshold = info.data.get("reward_threshold")
        if value is not None and threshold is not None and value < threshold:
            raise ValueError(f"it lies below reward_threshold, {threshold:g}: no reward can pass")
        return value
