"""Settings of the format verbs; importing them costs nothing but pydantic."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import BaseModel, Field, model_validator

from gymtrl.selection.settings import Band

PairStrategy = Literal["auto", "margin", "max_min", "sweet_spot", "length_matched"]
PairKind = Literal["first_divergence", "trajectory"]
GrpoKind = Literal["prompts", "groups"]
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


class FromPoolSettings(FormatSettings):
    """What datasets of good and bad rollouts have in common."""

    reward_threshold: float | None = Field(
        default=None,
        description="Lowest reward of a good rollout; not with a filter folder, which has one. Unset: by the rewards",
        json_schema_extra={"source": "as gymtrl filter chooses it"},
    )


class PairSettings(FromPoolSettings):
    """Which good rollout is set against which bad one."""

    strategy: PairStrategy = Field(
        default="auto",
        description="The bad rollout of a pair: length_matched takes the one nearest in length, sweet_spot the one "
        "nearest to mean - 2 std of the task's rewards, margin and max_min the worst (max_min however small the gap). "
        "auto: length_matched where rewards are binary, else sweet_spot",
        json_schema_extra={"source": "arXiv 2502.16825; length bias"},
    )
    pairs_per_task: int = Field(
        default=1,
        ge=1,
        description="Most pairs of one task",
        json_schema_extra={"source": "ours: different tasks teach more than more pairs of one"},
    )
    margin: float | None = Field(
        default=None,
        ge=0.0,
        description="Least gap between the two rewards. Unset: 0 for max_min, half their range where rewards are "
        "binary (0.5 for 0 and 1), else 0.2",
        json_schema_extra={"source": "ours"},
    )


class FormatDpoSettings(PairSettings):
    """How rollouts become pairs for DPO."""

    kind: PairKind = Field(
        default="first_divergence",
        description="first_divergence pairs the first turns that differ, with the shared history in the prompt; "
        "trajectory pairs all that followed the prompt",
        json_schema_extra={"source": "ours: plain TRL trains tool results in whole trajectories"},
    )


class FormatRewardSettings(PairSettings):
    """How rollouts become pairs for a reward model: whole trajectories."""


class FormatKtoSettings(FromPoolSettings):
    """How rollouts become good and bad examples for KTO."""

    cap_per_task: int = Field(
        default=4,
        ge=1,
        description="Most good, and most bad, rollouts of one task",
        json_schema_extra={"source": "as gymtrl filter: tasks count alike"},
    )


class FormatGrpoSettings(FromPoolSettings):
    """How rollouts become prompts for online GRPO, or recorded groups."""

    kind: GrpoKind = Field(
        default="prompts",
        description="prompts: tasks to roll out while training, chosen by their logged pass rate; groups: the recorded "
        "rollouts themselves, with their rewards and, where Gym recorded them, log-probabilities (experimental)",
        json_schema_extra={"source": "ours: rollouts of the policy in training teach more than recorded ones"},
    )
    pass_rate: Band = Field(
        default=(0.1, 0.9),
        description="Prompts: tasks whose logged pass rate lies in this band, both ends included",
        json_schema_extra={"source": "DAPO's dynamic sampling, arXiv 2503.14476, done before training"},
    )
    zero_share: float = Field(
        default=0.1,
        ge=0.0,
        lt=1.0,
        description="Prompts: share of tasks that may be ones never solved so far",
        json_schema_extra={"source": "ours"},
    )
    group_size: int | None = Field(
        default=None,
        ge=2,
        description="Groups: rollouts of each. Unset: the most frequent size of groups whose rewards differ",
        json_schema_extra={"source": "GRPOTrainer takes groups of one size"},
    )

    @model_validator(mode="after")
    def _nothing_of_the_other_kind(self) -> Self:
        unused = {"prompts": {"group_size"}, "groups": {"pass_rate", "zero_share"}}[self.kind]
        given = sorted(name for name in unused & self.model_fields_set if getattr(self, name) is not None)
        if given:
            raise ValueError(f"{given[0]} has no effect on {self.kind}: leave it out, or choose the other kind")
        return self
