"""A training run: checked, planned, trained in processes of its own, and told in a card and a manifest.

Run as: gymtrl train sft|dpo|kto|grpo DATASET -o RUN
"""

from __future__ import annotations

import dataclasses
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gymtrl.errors import UserError
from gymtrl.models.fingerprint import fingerprint, load_config, load_tokenizer, local_folder
from gymtrl.training.data import TrainingData, dataset_manifest, read_dataset
from gymtrl.training.job import CHECKPOINTS, LOCK, METRICS, RESULT, Change, Job, read_changes, read_outcome
from gymtrl.training.objective import Objective
from gymtrl.training.objectives import OBJECTIVES
from gymtrl.training.plan import Plan, check_options, plan
from gymtrl.training.settings import TrainSettings
from gymtrl.training.space import Sizes, bytes_needed, require_space
from gymtrl.training.supervise import train_in_processes
from gymtrl.workspace.artefact import Draft, artefact

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedTokenizerBase


@dataclass(frozen=True)
class TrainResult:
    """What `train` made.

    Attributes:
        path (`Path`): The result folder.
        model (`Path`): Folder that `from_pretrained` loads.
        adapter (`Path`, *optional*): The LoRA adapter.
        plan (`Plan`): The resolved numbers, by which the run ended.
        changes (`tuple[Change, ...]`): Measures that were taken because memory ran out.
        first_loss, last_loss (`float`): Mean training loss over the first and the last tenth of the steps.
        eval_before, eval_after (`float`, *optional*): Loss on validation rows.
        seconds (`float`): Training time, that of interrupted attempts included.
        tokens (`int`): Tokens that were computed.
        peak_memory (`int`): Bytes of main memory that a training process held at most.
        resumed_from (`int`, *optional*): Step from which an interrupted run was continued.
    """

    path: Path
    model: Path
    adapter: Path | None
    plan: Plan
    changes: tuple[Change, ...]
    first_loss: float
    last_loss: float
    eval_before: float | None
    eval_after: float | None
    seconds: float
    tokens: int
    peak_memory: int
    resumed_from: int | None


def train_inputs(dataset: Path, settings: TrainSettings) -> list[Path]:
    """Every folder that a run depends on.

    Args:
        dataset (`Path`): Folder that `format` wrote.
        settings (`TrainSettings`): May name the model; unset, it is the one that the dataset was made for.

    Returns:
        `list[Path]`: The dataset; the model and the adapter where they are local folders.

    Raises:
        UserError: No such dataset, or a folder is missing.
    """
    manifest = dataset_manifest(dataset)
    named = (settings.model or str(manifest.extra["model"]), settings.adapter)
    folders = [local_folder(name) for name in named if name is not None]
    return [dataset, *(folder for folder in folders if folder is not None)]


def train(dataset: Path, out: Path, settings: TrainSettings) -> TrainResult:
    """Trains a model on a dataset folder.

    Args:
        dataset (`Path`): Folder that `format` wrote; its token ids and masks are trained on as they are.
        out (`Path`): Result folder: `model/`, `adapter/` (LoRA), `metrics.jsonl`, `README.md`, `manifest.json`.
        settings (`TrainSettings`): What to do, in the objective's own class, such as `TrainDpoSettings`; what
            they leave open is resolved from the data and the machine.

    Returns:
        `TrainResult`: Losses, time, memory and where the model is.

    Raises:
        UserError: The dataset does not fit, was made for another model, or a setting is wrong.
        RunError: The disk is full or too small, or memory is. What was trained is kept; the same call continues it.
    """
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    objective = objective_of(settings)
    data = read_dataset(dataset, objective.made_by, objective.sequences)
    check_options(settings, objective)
    base = settings.model or data.model
    trust = bool(settings.trl.get("trust_remote_code"))
    config = load_config(base, trust_remote_code=trust)
    require_same_tokens(data, base, load_tokenizer(base, trust_remote_code=trust), config)

    import torch

    resolved = plan(settings, objective, rows=data.train.rows, cuda=torch.cuda.is_available())
    lora = resolved.method != "full"
    sizes = model_sizes(config, lora_r=settings.lora_r if lora else None)
    if settings.adapter is not None:
        require_own_adapter(Path(settings.adapter), base, config)
    tokens = sum(split.tokens for split in (data.train, data.validation) if split is not None)
    inputs = train_inputs(dataset, settings)
    with artefact(out, verb=f"train {objective.name}", settings=settings, inputs=inputs, resumable=True) as draft:
        job = Job(objective.name, settings.model_dump(mode="json"), resolved, str(dataset.resolve()), base)
        if not (draft.path / RESULT).is_file():  # an attempt may have been killed after it was done
            require_space(draft.path, bytes_needed(sizes, lora=lora, tokens=tokens))
            train_in_processes(draft.path, job, objective)
        changes = read_changes(draft.path)
        return _finish(draft, out, data, job, objective, changes)


def objective_of(settings: TrainSettings) -> Objective:
    """The objective that settings are for.

    Raises:
        UserError: They are of no objective.
    """
    for objective in OBJECTIVES.values():
        if type(settings) is objective.settings:
            return objective
    names = ", ".join(objective.settings.__name__ for objective in OBJECTIVES.values())
    raise UserError(f"{type(settings).__name__} are settings of no objective", remedy=f"give one of {names}")


def model_sizes(config: PretrainedConfig, *, lora_r: int | None) -> Sizes:
    """Counts the weights of a model without allocating them.

    Args:
        config (`PretrainedConfig`): Of the model.
        lora_r (`int`, *optional*): Rank of an adapter on every linear layer but the head; `None` trains every weight.
    """
    import torch

    model = on_meta(config)
    weights = sum(parameter.numel() for parameter in model.parameters())
    head = model.get_output_embeddings()
    linear = [layer for layer in model.modules() if isinstance(layer, torch.nn.Linear) and layer is not head]
    adapter = sum((lora_r or 0) * (layer.in_features + layer.out_features) for layer in linear)
    dtype = config.dtype if config.dtype is not None else torch.float32
    return Sizes(weights, adapter if lora_r else weights, torch.empty(0, dtype=dtype).element_size())


def on_meta(config: PretrainedConfig) -> Any:
    """The model of a configuration, with no memory behind its weights."""
    import torch
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config)


def require_same_tokens(
    data: TrainingData, base: str, tokenizer: PreTrainedTokenizerBase, config: PretrainedConfig
) -> None:
    """Checks that a dataset's tokens mean the same to a model.

    Raises:
        UserError: The model has another tokenizer, chat template or a smaller vocabulary.
    """
    own = fingerprint(tokenizer)
    remedy = f"run 'gymtrl {data.manifest.verb}' again with --model {base}"
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


def require_own_adapter(adapter: Path, base: str, config: PretrainedConfig) -> None:
    """Checks that an adapter was trained on this model.

    Raises:
        UserError: It is no LoRA adapter, names another model, or its weights fit no layer of this one.
    """
    import json

    from safetensors import safe_open

    settings_file, weights_file = adapter / "adapter_config.json", adapter / "adapter_model.safetensors"
    try:
        own = json.loads(settings_file.read_text(encoding="utf-8"))
        with safe_open(weights_file, "pt") as weights:
            shapes = {name: weights.get_slice(name).get_shape() for name in weights.keys()}  # noqa: SIM118
    except (OSError, ValueError) as error:
        raise UserError(
            f"{adapter} is no LoRA adapter: {error}", remedy="give the folder 'adapter' of a run that trained one"
        ) from None
    named = str(own.get("base_model_name_or_path") or "")
    if Path(named).name != Path(base).name:
        raise UserError(
            f"the adapter {adapter} was trained on {named or 'a model that it does not name'}, not on {base}",
            remedy=f"give --model {named}, or an adapter of {base}",
        )
    layers = {name: parameter.shape for name, parameter in on_meta(config).named_parameters()}
    for name, shape in shapes.items():
        layer, _, side = name.removeprefix("base_model.model.").partition(".lora_")
        wide = layers.get(f"{layer}.weight")
        fits = wide is not None and shape[side.startswith("A")] == wide[side.startswith("A")]
        if side and not side.startswith("embedding") and not fits:
            raise UserError(
                f"the adapter {adapter} does not fit {base}: {layer} is {list(wide) if wide else 'not there'}, and the "
                f"adapter's weight {shape}",
                remedy=f"give the model that it was trained on ({named})",
            )


def _finish(
    draft: Draft, out: Path, data: TrainingData, job: Job, objective: Objective, changes: list[Change]
) -> TrainResult:
    from gymtrl.training.export import write_card
    from gymtrl.training.progress import read_metrics

    resolved = changes[-1].plan if changes else job.plan
    outcome = read_outcome(draft.path)
    steps = [entry for entry in read_metrics(draft.path / METRICS) if "loss" in entry]
    tenth = max(1, len(steps) // 10)
    lora = resolved.method != "full"
    result = TrainResult(
        path=out,
        model=out / "model",
        adapter=out / "adapter" if lora else None,
        plan=resolved,
        changes=tuple(changes),
        first_loss=sum(entry["loss"] for entry in steps[:tenth]) / tenth,
        last_loss=sum(entry["loss"] for entry in steps[-tenth:]) / tenth,
        eval_before=outcome.eval_before,
        eval_after=outcome.eval_after,
        seconds=steps[-1]["seconds"],
        tokens=steps[-1]["tokens"],
        peak_memory=outcome.peak_memory,
        resumed_from=outcome.resumed_from,
    )
    write_card(
        draft.path,
        name=out.name,
        base=job.base,
        trainer=objective.trainer_name,
        lora=lora,
        data=data,
        steps=resolved.steps,
        batch=resolved.effective_batch,
        facts={
            "loss, first tenth": result.first_loss,
            "loss, last tenth": result.last_loss,
            "validation loss before": result.eval_before,
            "validation loss after": result.eval_after,
            "training seconds": result.seconds,
        },
        settings=job.settings | {"model": job.base} | resolved_settings(resolved),
    )
    names = ("first_loss", "last_loss", "eval_before", "eval_after", "seconds", "tokens", "peak_memory")
    draft.extra.update(
        {
            "objective": objective.name,
            "model": job.base,
            "fingerprint": data.fingerprint.as_dict(),
            "dataset_inputs": [{"path": item.path, "sha256": item.sha256} for item in data.manifest.inputs],
            "plan": dataclasses.asdict(resolved),
            "changes": [{"step": c.step, "measure": c.measure, "reason": c.reason} for c in changes],
            "results": {name: getattr(result, name) for name in names},
        }
    )
    shutil.rmtree(draft.path / CHECKPOINTS, ignore_errors=True)
    (draft.path / LOCK).unlink(missing_ok=True)
    return result


def resolved_settings(resolved: Plan) -> dict[str, Any]:
    """A plan as the settings that would ask for it."""
    names = ("epochs", "effective_batch", "micro_batch", "learning_rate", "save_steps", "gradient_checkpointing")
    return {name: getattr(resolved, name) for name in names} | {"max_steps": resolved.steps}
