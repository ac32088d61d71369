"""Settings of `filter`; importing them costs nothing but pydantic."""

from __future__ import annotations

from pydantic import BaseModel, Field


class FilterSettings(BaseModel, extra="forbid"):
    """Which rollouts are kept, and which tasks are held out."""

    reward_threshold: float | None = Field(
        default=None,
        allow_inf_nan=False,
        description="Lowest reward that is kept. Unset: the highest for binary rewards, 0.8 for rewards within "
        "0 and 1; other rewards need a value",
        json_schema_extra={"source": "NeMo Gym's offline-training tutorial; ours for fractional rewards"},
    )
    max_per_task: int = Field(
        default=4,
        ge=1,
        description="Most distinct completions kept of one task; exact duplicates are dropped first",
        json_schema_extra={"source": "RFT, arXiv 2308.01825: the gains come from distinct paths"},
    )
    validation: float = Field(
        default=0.1,
        ge=0.0,
        lt=1.0,
        description="Share of the tasks (clusters) held out for validation; 0 holds out none",
        json_schema_extra={"source": "ours"},
    )
    cluster: str | None = Field(
        default=None,
        min_length=1,
        description="Dotted path, in the row or its input row, to what the split must not tear apart, such as "
        "verifier_metadata.template. Unset: the task",
        json_schema_extra={"source": "ours: a task is its own cluster unless the user knows better"},
    )
    split_salt: str = Field(
        default="gymtrl",
        description="Text that the split is drawn with; keep it over all rounds, so that what is held out stays so",
        json_schema_extra={"source": "ours"},
    )
    allow_partial_context: bool = Field(
        default=False,
        description="Keep rollouts whose model saw more than the row holds (undeclared tools, hidden context)",
        json_schema_extra={"source": "ours: training on half of the context teaches guessing"},
    )
    keep_truncated: bool = Field(
        default=False,
        description="Keep rollouts whose response is incomplete; 'format sft' still leaves them out",
        json_schema_extra={"source": "ours: a cut completion teaches to stop anywhere"},
    )
    seed: int = Field(
        default=0,
        description="Seed for the choice among completions of equal reward",
        json_schema_extra={"source": "ours"},
    )
