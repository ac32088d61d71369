"""Settings of how a checkpoint is served; importing them is light."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import BaseModel, Field

Backend = Literal["auto", "light", "vllm"]


class ServingSettings(BaseModel, extra="forbid"):
    """What serves a checkpoint."""

    backend: Backend = Field(
        default="auto",
        description="What serves the model: vLLM, the light endpoint, or (auto) vLLM where its command is found.",
        json_schema_extra={"source": "ours: vLLM is the faster, and the light endpoint is always there"},
    )
    vllm: Path | None = Field(
        default=None,
        description="vLLM's command in its own environment, such as .venv-vllm/bin/vllm; searched for on PATH if not "
        "given.",
        json_schema_extra={"source": "none: PATH tells", "changes_result": False},
    )
