"""Settings of `format sft`; importing them costs nothing but pydantic."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, Field


class FormatSftSettings(BaseModel, extra="forbid"):
    """How rollouts become an SFT dataset. The dataset fits one model: its tokenizer and its chat template."""

    model: str = Field(
        description="Model that will be trained: a folder or a hub id; its tokenizer and chat template make the tokens",
        json_schema_extra={"source": "no default: tokens belong to one model"},
    )
    max_length: int | None = Field(
        default=None,
        gt=1,
        description="Longest row in tokens; longer rows are dropped with a reason, never cut. "
        "Unset: what the model's context holds",
        json_schema_extra={"source": "the longest row that the model can take; a cut row loses its final answer"},
    )
    use_recorded_ids: Literal["auto", "never"] = Field(
        default="auto",
        description="Take the token ids that Gym recorded where they belong to this tokenizer, or always render",
        json_schema_extra={"source": "ours: the recorded ids are what the policy really produced"},
    )
    seed: int = Field(
        default=0,
        description="Seed for the order of the rows in the example training script",
        json_schema_extra={"source": "ours"},
    )
    trust_remote_code: bool = Field(
        default=False,
        description="Run Python code that the model's repository ships for its tokenizer or configuration",
        json_schema_extra={"source": "transformers"},
    )
