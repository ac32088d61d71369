"""Settings of `train sft`; importing them costs nothing but pydantic."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, Field


class TrainSftSettings(BaseModel, extra="forbid"):
    """How a model is trained on an SFT dataset folder."""

    model: str | None = Field(
        default=None,
        description="Model to train: a folder or a hub id. Unset: the one that the dataset was made for",
        json_schema_extra={"source": "the dataset's manifest"},
    )
    method: Literal["lora", "full"] = Field(
        default="lora",
        description="Train an adapter, or every weight",
        json_schema_extra={"source": "LoRA Without Regret: equal to full training on small and medium data"},
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
        description="Peak learning rate. Unset: 2e-4 for LoRA, 1e-5 for full training",
        json_schema_extra={"source": "LoRA Without Regret: about ten times that of full training"},
    )
    epochs: float | None = Field(
        default=None,
        gt=0,
        description="Passes over the data. Unset: 2, or 1 above 20,000 rows",
        json_schema_extra={"source": "Tülu 3"},
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
        description="Rows an optimizer step. Unset: rows * epochs / 50, within 4 to 32",
        json_schema_extra={"source": "LoRA Without Regret: large batches hurt; ours: small data still gets its steps"},
    )
    micro_batch: int | None = Field(
        default=None,
        ge=1,
        description="Rows that are computed at once. Unset: 1 on CPU, 4 on a GPU; the loss does not depend on it",
        json_schema_extra={"source": "measured: on CPU more rows at once cost memory and are no faster"},
    )
    warmup_ratio: float = Field(
        default=0.03,
        ge=0,
        lt=1,
        description="Share of the steps in which the learning rate rises",
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
        json_schema_extra={"source": "ours"},
    )
    save_steps: int | None = Field(
        default=None,
        ge=1,
        description="Steps between checkpoints. Unset: a tenth of the run",
        json_schema_extra={"source": "ours: an interruption costs a tenth of the run at most"},
    )
    gradient_checkpointing: bool | None = Field(
        default=None,
        description="Recompute activations to save memory. Unset: on a GPU yes, on CPU no",
        json_schema_extra={"source": "TRL; on CPU it costs a fifth of the speed"},
    )
    trl: dict[str, Any] = Field(
        default_factory=dict,
        description="Any further option of TRL's SFTConfig",
        json_schema_extra={"source": "TRL"},
    )
