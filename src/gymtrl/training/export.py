"""What training leaves: an adapter, a model that plain transformers loads, and a card."""

from __future__ import annotations

import shutil
from collections.abc import Collection
from pathlib import Path
from typing import Any

from gymtrl.errors import RunError
from gymtrl.models.adapter import vllm_rank, with_adapter
from gymtrl.models.fingerprint import TOKENIZER_FILES, load_config, model_file
from gymtrl.models.load import model_class
from gymtrl.training.data import TrainingData

_PROCESSORS = ("processor_config.json", "preprocessor_config.json", "video_preprocessor_config.json")
_SHIPPED = (*TOKENIZER_FILES, *_PROCESSORS, "config.json", "generation_config.json")

_CARD = """\
---
library_name: transformers
tags: [trl, gymtrl]
---

# {name}

`{base}` trained with TRL's `{trainer}` ({method}) on {rows:,} rollouts, {steps:,} steps of {batch} rows. `model/`
loads with `AutoModelForCausalLM.from_pretrained`; tokenizer, chat template and generation settings are those of the
base model.{adapter}

| | |
|---|---|
{facts}

## Data

{tokens:,} tokens, of which {loss_tokens:,} carry loss. Made by `{verb}` from:

{inputs}

## Settings

| setting | value |
|---|---|
{settings}
"""

_ADAPTER = """ The adapter alone is in `adapter/`; vLLM serves it beside the base model with
`--enable-lora --max-lora-rank {rank} --lora-modules NAME=adapter`."""


def export_model(checkpoint: Path, out: Path, base: str, *, lora: bool, trust_remote_code: bool = False) -> None:
    """Writes `adapter/` (LoRA) and `model/`, with the weights in the type of the base model.

    Args:
        checkpoint (`Path`): The last of the run.
        out (`Path`): Folder to write into; what an interrupted attempt left there is replaced.
        base (`str`): The model that was trained; an adapter is merged into it.
        lora (`bool`): The checkpoint holds an adapter.
        trust_remote_code (`bool`, *optional*, defaults to `False`): Run code from the model's repository.

    Raises:
        RunError: The weights of the checkpoint are not those of the model.
    """
    import torch
    from transformers import AutoModelForCausalLM

    config = load_config(base, trust_remote_code=trust_remote_code)
    for name in ("adapter", "model"):
        shutil.rmtree(out / name, ignore_errors=True)
    # Merged with all digits, and rounded once.
    source = base if lora else str(checkpoint)
    architecture = AutoModelForCausalLM if trust_remote_code else model_class(config)
    trained, found = architecture.from_pretrained(
        source, dtype=torch.float32, trust_remote_code=trust_remote_code, output_loading_info=True
    )
    _require_all(checkpoint, found["missing_keys"])
    if lora:
        (out / "adapter").mkdir()
        for name in ("adapter_config.json", "adapter_model.safetensors"):
            shutil.copyfile(checkpoint / name, out / "adapter" / name)
        adapted, astray = with_adapter(trained, checkpoint)
        _require_all(checkpoint, astray)
        trained = adapted.merge_and_unload()
    trained = trained.to(config.dtype or torch.float32)
    trained.save_pretrained(out / "model")
    _open_to_readers(out)
    _copy_settings(base, out / "model")


def _require_all(checkpoint: Path, astray: Collection[str]) -> None:
    if astray:
        raise RunError(
            f"{len(astray)} weights of {checkpoint} are not those of the model that was trained, such as {min(astray)}",
            remedy="see that the model is the same as when training began; the checkpoint is kept",
        )


def _open_to_readers(out: Path) -> None:
    # safetensors leaves its files to their owner alone; a server often runs as somebody else.
    for weights in out.glob("*/*.safetensors"):
        weights.chmod(weights.parent.stat().st_mode & 0o666)


def _copy_settings(base: str, out: Path) -> None:
    """Copies configuration, tokenizer, chat template and generation settings of the base model byte by byte.

    A trainer changes some of them for itself, such as the padding token and the use of a cache; only the weights are
    meant to differ.
    """
    (out / "generation_config.json").unlink(missing_ok=True)
    for name in _SHIPPED:
        path = model_file(base, name)
        if path is not None:
            shutil.copyfile(path, out / name)


def write_card(
    out: Path,
    *,
    name: str,
    base: str,
    trainer: str,
    rank: int | None,
    data: TrainingData,
    steps: int,
    batch: int,
    facts: dict[str, Any],
    settings: dict[str, Any],
) -> None:
    """Writes the model card: from which rollouts, with which settings, with which result.

    Args:
        out (`Path`): Folder to write `README.md` into.
        name (`str`): Title.
        base (`str`): The model that was trained.
        trainer (`str`): TRL's trainer.
        rank (`int`, *optional*): Of the adapter; `None` where every weight was trained.
        data (`TrainingData`): What it was trained on.
        steps, batch (`int`): Optimizer steps and the rows of each.
        facts (`dict[str, Any]`): Results, by name.
        settings (`dict[str, Any]`): Resolved settings.
    """
    text = _CARD.format(
        name=name,
        base=base,
        trainer=trainer,
        method="every weight" if rank is None else "LoRA",
        adapter="" if rank is None else _ADAPTER.format(rank=vllm_rank(rank)),
        rows=data.train.rows,
        tokens=data.train.tokens,
        loss_tokens=data.train.loss_tokens,
        steps=steps,
        batch=batch,
        verb=data.manifest.verb,
        facts=_table(facts),
        inputs="\n".join(f"- `{item.path}`, SHA-256 `{item.sha256}`" for item in data.manifest.inputs),
        settings=_table(settings),
    )
    (out / "README.md").write_text(text, encoding="utf-8")


def _table(values: dict[str, Any]) -> str:
    return "\n".join(f"| {name} | {_cell(value)} |" for name, value in values.items() if value is not None)


def _cell(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value).replace("|", "\\|")
