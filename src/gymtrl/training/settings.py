"""Settings of `train`; importing them is light."""

from __future__ import annotations

from typing import Any, Literal, Self

from pydantic import BaseModel, Field, field_validator, model_validator

from gymtrl.workspace.settings import one_or_more

_OPTIONS = "TRL, PEFT and transformers"


class TrainSettings(BaseModel, extra="forbid", allow_inf_nan=False):
    """How a model is trained, whatever the objective."""

    model: str | None = Field(
        default=None,
        description="Model to train: a folder or a hub id. Unset: the one that the dataset was made for",
        json_schema_extra={"source": "the dataset's manifest"},
    )
    method: Literal["lora", "qlora", "full"] = Field(
        default="lora",
        description="Train an adapter, an adapter on a model in 4 bits (needs a GPU and bitsandbytes), or every weight",
        json_schema_extra={"source": "LoRA Without Regret: equal to full training on small and medium data"},
    )
    adapter: str | None = Field(
        default=None,
        description="Folder of a LoRA adapter of the same model to go on training, in place of a new one",
        json_schema_extra={"source": "none: a new adapter"},
    )
    lora_r: int = Field(
        default=32,
        ge=1,
        description="Rank of the adapter",
        json_schema_extra={"source": "LoRA Without Regret: capacity must exceed the data"},
    )
    lora_alpha: int = Field(
        default=32, ge=1, description="Scale of the adapter", json_schema_extra={"source": "LoRA Without Regret"}
    )
    learning_rate: float | None = Field(
        default=None,
        gt=0,
        description="Peak learning rate. Unset: by objective and method",
        json_schema_extra={"source": "by objective: docs/defaults.md"},
    )
    epochs: float | None = Field(
        default=None,
        gt=0,
        description="Passes over the data. Unset: by objective and size of the data",
        json_schema_extra={"source": "by objective: docs/defaults.md"},
    )
    max_steps: int | None = Field(
        default=None,
        ge=1,
        description="Optimizer steps, in place of epochs",
        json_schema_extra={"source": "no default: epochs decide"},
    )
    effective_batch: int | None = Field(
        default=None,
        ge=1,
        description="Rows an optimizer step. Unset: rows * epochs / 50, within bounds of the objective",
        json_schema_extra={"source": "LoRA Without Regret: large batches hurt; ours: small data still gets its steps"},
    )
    micro_batch: int | None = Field(
        default=None,
        ge=1,
        description="Rows that one process computes at once. Unset: what fits the machine",
        json_schema_extra={"source": "measured: on CPU more rows at once cost memory and are no faster"},
    )
    warmup_ratio: float = Field(
        default=0.03,
        ge=0,
        lt=1,
        description="Share of the steps in which the learning rate rises; a single such step is left out",
        json_schema_extra={"source": "Tülu 3"},
    )
    scheduler: str = Field(
        default="linear",
        description="Learning rate schedule, as transformers names it",
        json_schema_extra={"source": "Tülu 3"},
    )
    seed: int = Field(
        default=0,
        ge=0,
        description="Seed of the adapter's first weights and of the order of the rows",
        json_schema_extra={"source": "ours: the same each time"},
    )
    save_steps: int | None = Field(
        default=None,
        ge=1,
        description="Steps between checkpoints. Unset: a tenth of the run",
        json_schema_extra={"source": "ours: an interruption costs a tenth of the run at most"},
    )
    gradient_checkpointing: bool | None = Field(
        default=None,
        description="Recompute activations to save memory. Unset: only where it is needed to fit",
        json_schema_extra={"source": "ours: it costs about a fifth of the speed, and TRL always does it"},
    )
    nproc: int = Field(
        default=1,
        ge=1,
        description="Processes that train, over all nodes; one a GPU",
        json_schema_extra={"source": "one runs everywhere"},
    )
    nodes: int = Field(
        default=1,
        ge=1,
        description="Machines of a Slurm job that the processes are divided among",
        json_schema_extra={"source": "one needs no Slurm"},
    )
    engine: Literal["ddp", "fsdp2", "zero3"] = Field(
        default="ddp",
        description="How several processes share the model: a copy each, or in parts by FSDP2 or DeepSpeed ZeRO-3",
        json_schema_extra={"source": "TRL's advice: DDP for LoRA, FSDP2 for full training"},
    )
    report_to: list[str] = Field(
        default_factory=list,
        description="Trackers to report to as well: tensorboard, wandb, trackio, mlflow; one or more",
        json_schema_extra={
            "source": "none: metrics.jsonl and report.html are always written",
            "changes_result": False,
        },
    )
    trl: dict[str, Any] = Field(
        default_factory=dict,
        description="Any further option of TRL's configuration class of this objective",
        json_schema_extra={"source": "TRL"},
    )
    peft: dict[str, Any] = Field(
        default_factory=dict,
        description="Any further option of PEFT's LoraConfig",
        json_schema_extra={"source": "PEFT"},
    )
    quantization: dict[str, Any] = Field(
        default_factory=dict,
        description="Any option of transformers' BitsAndBytesConfig, for qlora",
        json_schema_extra={"source": "QLoRA, arXiv:2305.14314: NF4, double quantization"},
    )

    @model_validator(mode="after")
    def _as_many_on_each_node(self) -> Self:
        if self.nproc % self.nodes:
            raise ValueError(f"nproc {self.nproc} cannot be divided among {self.nodes} nodes: it counts all processes")
        return self

    @field_validator("report_to", mode="before", json_schema_input_type=list[str] | str)
    @classmethod
    def _trackers(cls, value: Any) -> Any:
        return one_or_more(value)


class TrainSftSettings(TrainSettings):
    """How a model is trained on an SFT dataset folder."""


class TrainDpoSettings(TrainSettings):
    """How a model is trained on a DPO dataset folder."""

    beta: float = Field(
        default=0.1,
        gt=0,
        description="How closely the policy is held to the reference",
        json_schema_extra={"source": "TRL"},
    )
    loss_type: list[str] = Field(
        default=["sigmoid", "sft"],
        description="TRL's losses that are added up; one or more",
        json_schema_extra={"source": "Iterative RPO, arXiv:2404.19733: keeps the chosen side likely"},
    )
    loss_weights: list[float] = Field(
        default_factory=list,
        description="Weight of each loss. Unset: one each",
        json_schema_extra={"source": "Iterative RPO, arXiv:2404.19733"},
    )

    @field_validator("loss_type", mode="before", json_schema_input_type=list[str] | str)
    @classmethod
    def _losses(cls, value: Any) -> Any:
        return one_or_more(value)


class TrainKtoSettings(TrainSettings):
    """How a model is trained on a KTO dataset folder."""

    beta: float = Field(
        default=0.1,
        gt=0,
        description="How closely the policy is held to the reference",
        json_schema_extra={"source": "TRL"},
    )
    desirable_weight: float | None = Field(
        default=None,
        gt=0,
        description="Weight of good rows. Unset: so that they weigh as much as the bad ones, or a little more",
        json_schema_extra={"source": "KTO, arXiv:2402.01306, equation 8"},
    )
    undesirable_weight: float | None = Field(
        default=None,
        gt=0,
        description="Weight of bad rows. Unset: so that they weigh as much as the good ones, or a little less",
        json_schema_extra={"source": "KTO, arXiv:2402.01306, equation 8"},
    )


class TrainGrpoSettings(TrainSettings):
    """How a model is trained on recorded groups; experimental."""

    scheduler: str = Field(
        default="constant",
        description="Learning rate schedule, as transformers names it; constant has no warm-up",
        json_schema_extra={"source": "ours: the run may stop at any step, so none depends on how many are planned"},
    )
    loss_type: str = Field(
        default="topr",
        description="topr, or one of TRL's losses for GRPO",
        json_schema_extra={"source": "TOPR, arXiv:2503.14286"},
    )
    temperature: float = Field(
        default=1.0,
        gt=0,
        description="Temperature that the rollouts were sampled with",
        json_schema_extra={"source": "importance ratios hold for no other"},
    )
    baseline_shift: float = Field(
        default=-0.1,
        description="Added to a group's mean reward to make its baseline, which must lie below the mean",
        json_schema_extra={"source": "AsymRE, arXiv:2506.20520"},
    )
    stop_ratio: float = Field(
        default=0.1,
        ge=0,
        description="Stop when the mean importance ratio of bad rollouts falls below it",
        json_schema_extra={"source": "ours: what is learnt from then on rests on few rollouts"},
    )
    stop_kl: float = Field(
        default=0.5,
        gt=0,
        description="Stop when the policy is so far from the recorded one, in nats a token",
        json_schema_extra={"source": "ours: recorded rollouts say little about a policy this far away"},
    )
