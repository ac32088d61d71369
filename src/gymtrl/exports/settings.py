"""Settings of `export`; importing them costs nothing but pydantic."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, Field


class ExportSettings(BaseModel, extra="forbid"):
    """Which trainer a dataset is written for."""

    to: Literal["nemo-rl", "openai", "tokens"] = Field(
        description="nemo-rl: messages or ranked pairs for NeMo RL; openai: JSONL for fine-tuning services that take "
        "OpenAI's formats; tokens: Parquet of token ids and loss masks for any trainer",
        json_schema_extra={"source": "no default: the formats hold different things"},
    )
