"""Settings of `power`; importing them is light."""

from __future__ import annotations

from pydantic import BaseModel, Field


class PowerSettings(BaseModel, extra="forbid"):
    """Which difference is to be shown, and with what."""

    effect: float = Field(
        default=0.05,
        gt=0,
        allow_inf_nan=False,
        description="Difference of mean rewards to be shown, in units of the reward.",
        json_schema_extra={"source": "ours: five points of a hundred, where rewards lie within 0 and 1"},
    )
    tasks: int | None = Field(
        default=None,
        ge=2,
        description="Tasks that there are; tells the repeats that they need.",
        json_schema_extra={"source": "none: a table of several"},
    )
    repeats: int | None = Field(
        default=None,
        ge=1,
        description="Rollouts of each task before, and as many after; tells the tasks that they need.",
        json_schema_extra={"source": "none: 1 to 16"},
    )
    cluster: str | None = Field(
        default=None,
        description="JSON path whose value names a task's cluster, as given to filter.",
        json_schema_extra={"source": "none: tasks count as independent"},
    )
