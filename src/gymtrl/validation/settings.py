"""Settings of `validate`; importing them is light."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pydantic import Field, field_validator

from gymtrl.comparison.settings import CompareSettings
from gymtrl.gym.settings import CollectSettings
from gymtrl.serving.settings import ServingSettings
from gymtrl.workspace.settings import one_or_more


class ValidateSettings(CollectSettings, CompareSettings, ServingSettings):
    """Where and how the two models are tried."""

    baseline: str = Field(
        description="What to compare with: the model before training, or rollouts of it (JSONL).",
        json_schema_extra={"source": "no default: a gain is over something; 'gymtrl run' takes the recipe's model"},
    )
    endpoint: str | None = Field(
        default=None,
        description="Base URL of an endpoint that runs already and serves what is validated, in place of a checkpoint. "
        "Its key is read from $GYMTRL_ENDPOINT_KEY.",
        json_schema_extra={"source": "none: the checkpoint is served here"},
    )
    endpoint_model: str | None = Field(
        default=None,
        description="The model's name at --endpoint.",
        json_schema_extra={"source": "none: goes with --endpoint"},
    )
    tasks: Path | None = Field(
        default=None,
        description="Held-out tasks (JSONL), such as the heldout_inputs.jsonl that filter wrote.",
        json_schema_extra={"source": "none: 'gymtrl run' takes what filter holds out"},
    )
    training: list[Path] | None = Field(
        default=None,
        description="Filter folder or rollouts that the checkpoint was trained on, where no run of 'train' tells, or "
        "what it tells of has moved; may be repeated.",
        json_schema_extra={"source": "none: the checkpoint's manifests name them"},
    )
    leak_check: bool = Field(
        default=True,
        description="Stop where a task to validate on, or one of its cluster, was trained on.",
        json_schema_extra={"source": "ours: a gain on what was trained on shows nothing"},
    )
    server: list[str] = Field(
        default=["reasoning_gym"],
        min_length=1,
        description="Gym's resources server; may be repeated: each task names its agent.",
        json_schema_extra={"source": "the one that 'gym setup' installs"},
    )
    head: str | None = Field(
        default=None,
        description="URL of a running Gym's head server; if not given, Gym is started and stopped.",
        json_schema_extra={"source": "none: a Gym of its own", "changes_result": False},
    )
    endpoint_name: str = Field(
        default="policy",
        description="Model name that the endpoint answers to. With --head, its policy_model_name.",
        json_schema_extra={"source": "ours: what Gym is told where gymtrl starts it", "changes_result": False},
    )
    endpoint_port: int | None = Field(
        default=None,
        ge=1,
        le=65535,
        description="Port of the endpoint; a free one if not given. With --head, the port of its policy_base_url.",
        json_schema_extra={"source": "none: no two runs meet", "changes_result": False},
    )
    gym_home: Path | None = Field(
        default=None,
        description="Where 'gym setup' installed Gym, if not in its usual place.",
        json_schema_extra={"source": "where 'gym setup' installs", "changes_result": False},
    )

    @field_validator("server", mode="before", json_schema_input_type=list[str] | str)
    @classmethod
    def _one_or_more(cls, value: Any) -> Any:
        return one_or_more(value)

    @field_validator("training", mode="before", json_schema_input_type=list[str] | str | None)
    @classmethod
    def _none_or_more(cls, value: Any) -> Any:
        return one_or_more(value)
