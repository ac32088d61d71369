"""Supervised fine-tuning with TRL's `SFTTrainer` on a dataset folder, resumable after any interruption.

Run as: gymtrl train sft DATASET -o RUN
"""

from __future__ import annotations

import dataclasses
import os
import resource
import shutil
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gymtrl.errors import UserError
from gymtrl.models.fingerprint import fingerprint, load_config, load_tokenizer, local_folder
from gymtrl.training.data import TrainingData, dataset_manifest, load_split, read_dataset
from gymtrl.training.plan import Plan, check_trl_options, plan, trl_config
from gymtrl.training.settings import TrainSftSettings
from gymtrl.training.space import Sizes, bytes_needed, require_space
from gymtrl.workspace.artefact import Draft, artefact

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedTokenizerBase
    from trl import SFTTrainer

EVAL_ROWS = 200
"""Validation rows that the loss is measured on before and after; more would cost time and hardly move the figure."""


@dataclass(frozen=True)
class TrainResult:
    """What `train_sft` made.

    Attributes:
        path (`Path`): The result folder.
        model (`Path`): Folder that `from_pretrained` loads.
        adapter (`Path`, *optional*): The LoRA adapter.
        plan (`Plan`): The resolved numbers.
        first_loss, last_loss (`float`): Mean training loss a token, over the first and the last tenth of the steps.
        eval_before, eval_after (`float`, *optional*): Loss on validation rows: mean over rows of their mean a token.
        seconds (`float`): Training time, that of interrupted attempts included.
        tokens (`int`): Tokens that were computed.
        peak_memory (`int`): Bytes of main memory that the process held at most.
        resumed_from (`int`, *optional*): Step from which an interrupted run was continued.
    """

    path: Path
    model: Path
    adapter: Path | None
    plan: Plan
    first_loss: float
    last_loss: float
    eval_before: float | None
    eval_after: float | None
    seconds: float
    tokens: int
    peak_memory: int
    resumed_from: int | None


def train_inputs(dataset: Path, settings: TrainSftSettings) -> list[Path]:
    """Every folder that a run depends on.

    Args:
        dataset (`Path`): Folder that `format sft` wrote.
        settings (`TrainSftSettings`): May name the model; unset, it is the one that the dataset was made for.

    Returns:
        `list[Path]`: The dataset, and the model where it is a local folder.

    Raises:
        UserError: No such dataset, or the model's folder is missing.
    """
    manifest = dataset_manifest(dataset)
    model = local_folder(settings.model or str(manifest.extra["model"]))
    return [dataset] if model is None else [dataset, model]


def train_sft(dataset: Path, out: Path, settings: TrainSftSettings) -> TrainResult:
    """Trains a model on an SFT dataset folder.

    Args:
        dataset (`Path`): Folder that `format sft` wrote; its `input_ids` and `labels` are trained on as they are.
        out (`Path`): Result folder: `model/`, `adapter/` (LoRA), `metrics.jsonl`, `README.md`, `manifest.json`.
        settings (`TrainSftSettings`): What to do; what they leave open is resolved from the data and the machine.

    Returns:
        `TrainResult`: Losses, time, memory and where the model is.

    Raises:
        UserError: The dataset does not fit, was made for another model, or a setting is wrong.
        RunError: The disk is full or too small. What was trained is kept; the same call continues it.
    """
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    data = read_dataset(dataset)
    check_trl_options(settings.trl)
    base = settings.model or data.model
    trust = bool(settings.trl.get("trust_remote_code"))
    config = load_config(base, trust_remote_code=trust)
    tokenizer = load_tokenizer(base, trust_remote_code=trust)
    _require_same_tokens(data, base, tokenizer, config)

    import torch

    resolved = plan(settings, rows=data.train.rows, cuda=torch.cuda.is_available())
    sizes = model_sizes(config, lora_r=settings.lora_r if settings.method == "lora" else None)
    tokens = sum(split.tokens for split in (data.train, data.validation) if split is not None)
    needed = bytes_needed(sizes, lora=settings.method == "lora", tokens=tokens)
    inputs = train_inputs(dataset, settings)
    with artefact(out, verb="train sft", settings=settings, inputs=inputs, resumable=True) as draft:
        require_space(draft.path, needed)
        with _quiet():
            return _train(draft, out, data, base, tokenizer, config, settings, resolved)


def model_sizes(config: PretrainedConfig, *, lora_r: int | None) -> Sizes:
    """Counts the weights of a model without allocating them.

    Args:
        config (`PretrainedConfig`): Of the model.
        lora_r (`int`, *optional*): Rank of an adapter on every linear layer but the head; `None` trains every weight.
    """
    import torch
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    weights = sum(parameter.numel() for parameter in model.parameters())
    head = model.get_output_embeddings()
    linear = [layer for layer in model.modules() if isinstance(layer, torch.nn.Linear) and layer is not head]
    adapter = sum((lora_r or 0) * (layer.in_features + layer.out_features) for layer in linear)
    dtype = config.dtype if config.dtype is not None else torch.float32
    return Sizes(weights, adapter if lora_r else weights, torch.empty(0, dtype=dtype).element_size())


def _require_same_tokens(
    data: TrainingData, base: str, tokenizer: PreTrainedTokenizerBase, config: PretrainedConfig
) -> None:
    own = fingerprint(tokenizer)
    remedy = f"run 'gymtrl format sft' again with --model {base}"
    if own.tokenizer != data.fingerprint.tokenizer:
        raise UserError(
            f"the dataset was made for the tokenizer of {data.model}, and {base} has another", remedy=remedy
        )
    if own.chat_template != data.fingerprint.chat_template:
        raise UserError(
            f"the dataset was made for the chat template of {data.model}, and {base} has another", remedy=remedy
        )
    vocabulary = config.get_text_config().vocab_size
    if data.train.largest_id >= vocabulary:
        raise UserError(
            f"the dataset holds token id {data.train.largest_id}, and {base} has {vocabulary} embeddings", remedy=remedy
        )


def _train(
    draft: Draft,
    out: Path,
    data: TrainingData,
    base: str,
    tokenizer: PreTrainedTokenizerBase,
    config: PretrainedConfig,
    settings: TrainSftSettings,
    resolved: Plan,
) -> TrainResult:
    from gymtrl.training.checkpoints import is_final, last_sealed, step_of
    from gymtrl.training.export import copy_settings, save_weights, write_card
    from gymtrl.training.progress import MetricsLog, Narrator, read_metrics

    work, metrics_file = draft.path / "checkpoints", draft.path / "metrics.jsonl"
    checkpoint = last_sealed(work)
    resumed_from = step_of(checkpoint) if checkpoint is not None else None
    log, narrator = MetricsLog(metrics_file, resumed_from or 0), Narrator()
    trainer = _trainer(data, base, tokenizer, settings, resolved, work)
    trainer.add_callback(log)
    trainer.add_callback(narrator)
    measured = {entry["step"]: entry["eval_loss"] for entry in read_metrics(metrics_file) if "eval_loss" in entry}

    def eval_loss(step: int) -> float | None:
        """The validation loss after a step, measured once however often the run is interrupted."""
        if data.validation is not None and step not in measured:
            measured[step] = trainer.evaluate()["eval_loss"]
            log.append({"step": step, "eval_loss": measured[step]})
        return measured.get(step)

    before = eval_loss(0)
    if checkpoint is not None and is_final(checkpoint):
        # Asked to resume after its last step, the trainer takes one more where that step lies within an epoch.
        trainer._load_from_checkpoint(str(checkpoint))
        last_step = step_of(checkpoint)
    else:
        try:
            trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint is not None else None)
        finally:
            narrator.close()
        last_step = trainer.state.global_step
    after = eval_loss(last_step)
    lora = settings.method == "lora"
    save_weights(trainer.model, draft.path, config, lora=lora)
    copy_settings(base, draft.path / "model")

    steps = [entry for entry in read_metrics(metrics_file) if "loss" in entry]
    tenth = max(1, len(steps) // 10)
    result = TrainResult(
        path=out,
        model=out / "model",
        adapter=out / "adapter" if lora else None,
        plan=resolved,
        first_loss=sum(entry["loss"] for entry in steps[:tenth]) / tenth,
        last_loss=sum(entry["loss"] for entry in steps[-tenth:]) / tenth,
        eval_before=before,
        eval_after=after,
        seconds=steps[-1]["seconds"],
        tokens=steps[-1]["tokens"],
        peak_memory=_peak_memory(),
        resumed_from=resumed_from,
    )
    facts = {
        "loss, first tenth": result.first_loss,
        "loss, last tenth": result.last_loss,
        "validation loss before": before,
        "validation loss after": after,
        "training seconds": result.seconds,
    }
    write_card(
        draft.path,
        name=out.name,
        base=base,
        lora=lora,
        data=data,
        steps=resolved.steps,
        batch=resolved.effective_batch,
        facts=facts,
        settings=settings.model_dump() | {"model": base} | _resolved_settings(resolved),
    )
    draft.extra.update(
        {
            "model": base,
            "fingerprint": data.fingerprint.as_dict(),
            "dataset_inputs": [{"path": item.path, "sha256": item.sha256} for item in data.manifest.inputs],
            "plan": dataclasses.asdict(resolved),
            "results": {
                name: getattr(result, name)
                for name in ("first_loss", "last_loss", "eval_before", "eval_after", "seconds", "tokens", "peak_memory")
            },
        }
    )
    shutil.rmtree(work)  # last, since until here a kill costs no training
    return result


def _trainer(
    data: TrainingData,
    base: str,
    tokenizer: PreTrainedTokenizerBase,
    settings: TrainSftSettings,
    resolved: Plan,
    work: Path,
) -> SFTTrainer:
    from peft import LoraConfig
    from transformers import PrinterCallback
    from trl import SFTTrainer

    from gymtrl.training.checkpoints import Seal

    cache = work / "data"
    train = load_split(data.train, cache).shuffle(seed=settings.seed)
    validation = load_split(data.validation, cache) if data.validation is not None else None
    if validation is not None and len(validation) > EVAL_ROWS:
        validation = validation.select(range(EVAL_ROWS))
    # No dropout: on few rows it costs more steps than it protects from, and the adapter is small beside the model.
    adapter = LoraConfig(
        r=settings.lora_r,
        lora_alpha=settings.lora_alpha,
        lora_dropout=0.0,
        target_modules="all-linear",
        task_type="CAUSAL_LM",
    )
    trainer = SFTTrainer(
        model=base,
        args=trl_config(settings, resolved, work),
        train_dataset=train,
        eval_dataset=validation,
        processing_class=tokenizer,
        peft_config=adapter if settings.method == "lora" else None,
        callbacks=[Seal()],
    )
    trainer.remove_callback(PrinterCallback)
    return trainer


def _resolved_settings(resolved: Plan) -> dict[str, Any]:
    names = ("epochs", "effective_batch", "micro_batch", "learning_rate", "save_steps", "gradient_checkpointing")
    return {name: getattr(resolved, name) for name in names} | {"max_steps": resolved.steps}


def _peak_memory() -> int:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


@contextmanager
def _quiet() -> Iterator[None]:
    """Keeps the libraries' own bars and remarks off the terminal while our one bar is there."""
    import datasets
    from transformers.utils import logging

    verbosity, bars = logging.get_verbosity(), datasets.are_progress_bars_disabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    datasets.disable_progress_bars()
    try:
        with warnings.catch_warnings():
            # The libraries announce to each other what their next versions will rename.
            warnings.simplefilter("ignore", FutureWarning)
            yield
    finally:
        logging.set_verbosity(verbosity)
        logging.enable_progress_bar()
        if not bars:
            datasets.enable_progress_bars()
