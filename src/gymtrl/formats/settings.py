"""Settings of the format verbs; importing them costs nothing but pydantic."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, Field

Reasoning = Literal["keep", "drop", "template"]


class FormatSettings(BaseModel, extra="forbid"):
    """What all datasets have in common. Each fits one model: its tokenizer and its chat template."""

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
    reasoning: Reasoning = Field(
        default="keep",
        description="Reasoning of the policy: keep trains it and drops rows whose reasoning the template cannot show, "
        "drop takes it out, template leaves it to the chat template",
        json_schema_extra={"source": "ours: what the policy thought led to its answer"},
    )
    use_recorded_ids: Literal["auto", "never"] = Field(
        default="auto",
        description="Take the token ids that Gym recorded where they belong to this tokenizer, or always render",
        json_schema_extra={"source": "ours: the recorded ids are what the policy really produced"},
    )
    seed: int = Field(
        default=0,
        description="Seed for choices among equals, for shuffling, and for the example training script",
        json_schema_extra={"source": "ours"},
    )
    trust_remote_code: bool = Field(
        default=False,
        description="Run Python code that the model's repository ships for its tokenizer or configuration",
        json_schema_extra={"source": "transformers"},
    )


class FormatSftSettings(FormatSettings):
    """How rollouts become an SFT dataset."""
