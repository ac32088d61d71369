"""Settings of `compare`; importing them is light."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, Field


class CompareSettings(BaseModel, extra="forbid"):
    """How two collections are compared."""

    cluster: str | None = Field(
        default=None,
        description="JSON path whose value names a task's cluster, as given to filter.",
        json_schema_extra={"source": "none: tasks count as independent"},
    )
    fail_on: Literal["regressed", "not-improved"] | None = Field(
        default=None,
        description="Outcome at which the exit status is 1.",
        json_schema_extra={"source": "none: the outcome is told, and the exit status is 0", "changes_result": False},
    )
