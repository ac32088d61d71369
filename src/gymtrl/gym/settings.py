"""Settings of `gym setup` and of collecting rollouts."""

from __future__ import annotations

from pathlib import Path

from pydantic import BaseModel, Field


class GymSetupSettings(BaseModel, extra="forbid"):
    """What to install, and where."""

    servers: list[str] = Field(
        default=["reasoning_gym"],
        description="Resources servers whose packages to install beside Gym, by their names in Gym.",
        json_schema_extra={"source": "ours: small tasks with a checker, no GPU"},
    )
    python: str | None = Field(
        default=None,
        description="Interpreter for Gym's environment, or its version; searched for on PATH, in pyenv and in uv.",
        json_schema_extra={"source": "Gym needs another Python than gymtrl may run in"},
    )
    version: str | None = Field(
        default=None,
        description="nemo-gym version; the newest that the interpreter admits if not given.",
        json_schema_extra={"source": "ours: the newest that fits"},
    )
    ignore_requires_python: bool = Field(
        default=False,
        description="Install on an older Python than this nemo-gym asks for.",
        json_schema_extra={"source": "pip; its makers do not support that"},
    )
    home: Path | None = Field(
        default=None,
        description="Folder for the environment; $GYMTRL_HOME/gym or ~/.cache/gymtrl/gym if not given.",
        json_schema_extra={"source": "where gymtrl keeps what it installs"},
    )


class CollectSettings(BaseModel, extra="forbid"):
    """How rollouts are collected; the same before and after, or the comparison means nothing."""

    repeats: int = Field(
        default=4,
        ge=1,
        description="Rollouts per task.",
        json_schema_extra={"source": "ours: the mean of four scatters half as much as one"},
    )
    temperature: float = Field(
        default=1.0,
        ge=0,
        description="Sampling temperature.",
        json_schema_extra={"source": "ours: the policy as it was trained"},
    )
    top_p: float = Field(
        default=1.0,
        gt=0,
        le=1,
        description="Nucleus sampling.",
        json_schema_extra={"source": "ours: the policy as it was trained"},
    )
    max_output_tokens: int = Field(
        default=512,
        ge=1,
        description="Tokens that the policy may generate per model call.",
        json_schema_extra={"source": "ours: short tasks on small machines"},
    )
    concurrency: int = Field(
        default=64,
        ge=1,
        description="Rollouts under way at once.",
        json_schema_extra={"source": "ours: changes the time only", "changes_result": False},
    )
    timeout: float = Field(
        default=600.0,
        gt=0,
        description="Seconds after which one attempt at a rollout counts as failed.",
        json_schema_extra={"source": "ours: ten minutes, long for one rollout", "changes_result": False},
    )
    attempts: int = Field(
        default=3,
        ge=1,
        description="Times that a rollout is asked for before it counts as failed; failed ones are never scored.",
        json_schema_extra={"source": "Gym: NEMO_GYM_MAX_ROLLOUT_ATTEMPTS", "changes_result": False},
    )
    agent: str | None = Field(
        default=None,
        description="Agent for all tasks, by its name in Gym; each task's own agent_ref if not given.",
        json_schema_extra={"source": "none: each task names its own"},
    )
    seed: int = Field(
        default=0,
        ge=0,
        description="Every task and repeat samples with a seed of its own, derived from this.",
        json_schema_extra={"source": "ours: the same each time"},
    )
