"""Settings of `compare`; importing them is light."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, Field


class CompareSettings(BaseModel, extra="forbid"):
    """How collections are compared."""

    metric: str = Field(
        default="reward",
        description="What is compared: reward, a dotted path into the row (reward_components.format), or a path with "
        "a bound ('reward>=0.8'), which makes it 0 or 1.",
        json_schema_extra={"source": "what Gym scores"},
    )
    cluster: str | None = Field(
        default=None,
        description="JSON path whose value names a task's cluster, as given to filter.",
        json_schema_extra={"source": "none: tasks count as independent"},
    )
    min_effect: float = Field(
        default=0.0,
        ge=0.0,
        allow_inf_nan=False,
        description="Smallest difference that counts, in units of the metric: one is shown where the interval lies "
        "beyond it.",
        json_schema_extra={"source": "any difference counts"},
    )
    fail_on: Literal["regression", "no-improvement"] | None = Field(
        default=None,
        description="At what the exit status is 1.",
        json_schema_extra={"source": "none: the outcome is told, and the exit status is 0", "changes_result": False},
    )
