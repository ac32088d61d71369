"""What is settled before a run begins: that data, model and options go together, and by which numbers it will train."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gymtrl.doctor.diagnose import diagnose
from gymtrl.doctor.facts import data_facts
from gymtrl.doctor.finding import Finding
from gymtrl.doctor.run import DataFacts
from gymtrl.errors import UserError
from gymtrl.models.fingerprint import fingerprint, load_config, load_tokenizer, local_folder
from gymtrl.training.data import TrainingData, dataset_manifest, read_dataset
from gymtrl.training.job import Job
from gymtrl.training.launch import Launch
from gymtrl.training.objective import Objective
from gymtrl.training.objectives import OBJECTIVES
from gymtrl.training.plan import Plan, check_options, plan
from gymtrl.training.settings import TrainSettings
from gymtrl.training.space import Sizes
from gymtrl.training.trackers import check_trackers

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedTokenizerBase


@dataclass(frozen=True)
class Prepared:
    """A run that may begin.

    Attributes:
        objective (`Objective`): What is trained.
        data (`TrainingData`): On what.
        base (`str`): Folder or hub id of the model.
        config (`PretrainedConfig`): Of the model.
        sizes (`Sizes`): Its weights, and those that are trained.
        plan (`Plan`): By which numbers.
        facts (`DataFacts`): Of the training rows, for the rules of `doctor`.
        findings (`tuple[Finding, ...]`): What the rules say before training; none of them an error.
    """

    objective: Objective
    data: TrainingData
    base: str
    config: PretrainedConfig
    sizes: Sizes
    plan: Plan
    facts: DataFacts
    findings: tuple[Finding, ...]


def prepare(dataset: Path, settings: TrainSettings) -> Prepared:
    """Checks all that can be checked before a model is loaded, and resolves what the settings leave open.

    Args:
        dataset (`Path`): Folder that `format` wrote.
        settings (`TrainSettings`): In the objective's own class.

    Raises:
        UserError: The dataset does not fit, was made for another model, a setting is wrong, or a rule of `doctor` says
            that the run cannot work.
    """
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    objective = objective_of(settings)
    data = read_dataset(dataset, objective.made_by, objective.sequences)
    check_options(settings, objective)
    check_trackers(settings.report_to)
    base = settings.model or data.model
    trust = bool(settings.trl.get("trust_remote_code"))
    config = load_config(base, trust_remote_code=trust)
    _require_same_tokens(data, base, load_tokenizer(base, trust_remote_code=trust), config)
    if settings.adapter is not None:
        _require_own_adapter(Path(settings.adapter), base, config)

    import torch

    resolved = plan(settings, objective, rows=data.train.rows, cuda=torch.cuda.is_available())
    sizes = model_sizes(config, lora_r=settings.lora_r if resolved.method != "full" else None)
    facts = data_facts(dataset)
    job = Job(objective.name, settings.model_dump(mode="json"), resolved, str(dataset), base, facts)
    findings = diagnose(replace(job.record(), vocabulary=config.get_text_config().vocab_size), "preflight")
    for finding in findings:
        if finding.severity == "error":
            raise UserError(f"{finding.title}: {finding.evidence}; {finding.cause}", remedy=finding.remedy)
    return Prepared(objective, data, base, config, sizes, resolved, facts, tuple(findings))


def launch_of(settings: TrainSettings, resolved: Plan) -> Launch:
    """The processes of a run.

    Raises:
        UserError: They cannot be started so.
    """
    return Launch(processes=resolved.processes, cuda=resolved.cuda, engine=settings.engine)


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


def _require_same_tokens(
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


def _require_own_adapter(adapter: Path, base: str, config: PretrainedConfig) -> None:
    """Checks that an adapter was trained on this model.

    Raises:
        UserError: It is no LoRA adapter, names another model, or its weights fit no layer of this one.
    """
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
