"""What is settled before a run begins: that data, model and options go together, and by which numbers it will train."""

from __future__ import annotations

import os
from dataclasses import asdict, dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow.parquet as pq

from gymtrl.doctor.diagnose import diagnose
from gymtrl.doctor.facts import data_facts
from gymtrl.doctor.finding import Finding
from gymtrl.doctor.run import DataFacts
from gymtrl.errors import UserError
from gymtrl.models.adapter import adapter_rank, require_own_adapter
from gymtrl.models.fingerprint import fingerprint, load_config, load_tokenizer, local_folder, model_file
from gymtrl.training.base import require_weights
from gymtrl.training.calibrate import calibrate
from gymtrl.training.data import TrainingData, dataset_manifest, read_dataset
from gymtrl.training.job import Job
from gymtrl.training.launch import Launch, require_engine
from gymtrl.training.machine import Machine, machine
from gymtrl.training.memory import ModelShape, model_shape
from gymtrl.training.objective import Objective
from gymtrl.training.objectives import OBJECTIVES
from gymtrl.training.plan import Plan, Planned, check_options, plan, trl_config
from gymtrl.training.settings import TrainSettings
from gymtrl.training.slurm import meeting_point
from gymtrl.training.trackers import check_trackers
from gymtrl.training.values import check_config, check_layers, check_values

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedTokenizerBase


@dataclass(frozen=True)
class Prepared:
    """A run that may begin.

    Attributes:
        objective (`Objective`): What is trained.
        data (`TrainingData`): On what.
        base (`str`): Folder or hub id of the model.
        config (`PretrainedConfig`): Its configuration.
        shape (`ModelShape`): Counts of the model.
        rank (`int`, *optional*): Of the adapter; `None` where every weight is trained.
        planned (`Planned`): By which numbers it trains, and what they rest on.
        facts (`DataFacts`): Of the training rows, for the rules of `doctor`.
        findings (`tuple[Finding, ...]`): What the rules say before training; none of them an error.
    """

    objective: Objective
    data: TrainingData
    base: str
    config: PretrainedConfig
    shape: ModelShape
    rank: int | None
    planned: Planned
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
    objective, data = checked(dataset, settings)
    base = settings.model or data.model
    trust = bool(settings.trl.get("trust_remote_code"))
    config = load_config(base, trust_remote_code=trust)
    _require_same_tokens(data, base, load_tokenizer(base, trust_remote_code=trust), config)
    if settings.adapter is not None:
        require_own_adapter(Path(settings.adapter), base, config, trust_remote_code=trust)
        settings = settings.model_copy(update={"lora_r": adapter_rank(Path(settings.adapter))})

    if settings.method == "qlora":
        require_log_probs(objective, data)
    where = machine_for(settings)
    check_layers(settings, config, trust_remote_code=trust)
    shape = model_shape(config, trust_remote_code=trust)
    planned = plan(settings, objective, rows=data.train.rows, longest=data.train.longest, shape=shape, machine=where)
    resolved = planned.plan
    check_config(trl_config(settings, objective, data, resolved, Path("unused"), apart=True), objective)
    facts = data_facts(dataset)
    job = Job(objective.name, settings.model_dump(mode="json"), resolved, str(dataset), base, facts)
    findings = diagnose(replace(job.record(), vocabulary=config.get_text_config().vocab_size), "preflight")
    for finding in findings:
        if finding.severity == "error":
            raise UserError(f"{finding.title}: {finding.evidence}; {finding.cause}", remedy=finding.remedy)
    rank = None if resolved.method == "full" else settings.lora_r
    return Prepared(objective, data, base, config, shape, rank, planned, facts, tuple(findings))


def checked(dataset: Path, settings: TrainSettings) -> tuple[Objective, TrainingData]:
    """Checks dataset and options, for which neither the model nor the machine that trains it is needed.

    Args:
        dataset (`Path`): Folder that `format` wrote.
        settings (`TrainSettings`): In the objective's own class.

    Raises:
        UserError: The dataset does not fit, or a setting is wrong.
    """
    objective = objective_of(settings)
    data = read_dataset(dataset, objective.made_by, objective.sequences)
    check_settings(settings)
    return objective, data


def check_settings(settings: TrainSettings) -> None:
    """Checks names and values of all that is passed on to other libraries.

    Raises:
        UserError: One of them is wrong.
    """
    objective = objective_of(settings)
    check_trackers(settings.report_to)
    check_options(settings, objective)
    check_values(settings, objective)


def check_ahead(settings: TrainSettings) -> None:
    """Checks, while there is no dataset yet, what settings ask for that not every model and machine has.

    Raises:
        UserError: The model or this machine has it not, or several nodes are wanted outside a Slurm job.
    """
    if settings.peft and settings.model is not None:
        trust = bool(settings.trl.get("trust_remote_code"))
        check_layers(settings, load_config(settings.model, trust_remote_code=trust), trust_remote_code=trust)
    if settings.method == "qlora" or settings.engine != "ddp":
        machine_for(settings)
    if settings.nodes > 1:
        meeting_point()


def machine_for(settings: TrainSettings) -> Machine:
    """Looks at this machine, and checks that it can train as the settings say.

    Raises:
        UserError: There is no GPU, or a package is missing, that method, engine or types need.
    """
    found = machine(gpus=not settings.trl.get("use_cpu"))
    cuda = bool(found.gpus)
    require_engine(Launch(settings.nproc, cuda=cuda, nodes=settings.nodes, engine=settings.engine))
    if settings.method == "qlora":
        require_quantization(found)
    if settings.trl.get("fp16") and not cuda:
        raise UserError("trl: fp16 needs a GPU, and none is used", remedy="leave it out; a CPU computes in float32")
    return found


def launch_of(settings: TrainSettings, resolved: Plan) -> Launch:
    """The processes of a run.

    Raises:
        UserError: They cannot be started so, or several nodes are wanted outside a Slurm job.
    """
    launch = Launch(processes=resolved.processes, cuda=resolved.cuda, nodes=settings.nodes, engine=settings.engine)
    if settings.nodes == 1:
        return launch
    host, port = meeting_point()
    return replace(launch, host=host, port=port)


def train_inputs(dataset: Path, settings: TrainSettings) -> list[Path]:
    """Every folder and file that a run depends on.

    Args:
        dataset (`Path`): Folder that `format` wrote.
        settings (`TrainSettings`): May name the model; unset, it is the one that the dataset was made for.

    Returns:
        `list[Path]`: The dataset; the folders of the model and the adapter, and of a model on the hub its
            `config.json` in the cache, whose path names the commit.

    Raises:
        UserError: No such dataset, or a folder is missing.
    """
    manifest = dataset_manifest(dataset)
    model = settings.model or str(manifest.extra["model"])
    # The path of a file in the hub's cache holds the commit.
    found = [local_folder(model) or model_file(model, "config.json")]
    if settings.adapter is not None:
        found.append(local_folder(settings.adapter))
    return [dataset, *(path for path in found if path is not None)]


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


def require_log_probs(objective: Objective, data: TrainingData) -> None:
    """Checks that no log-probabilities are missing, which the whole model would be loaded in float32 for.

    Raises:
        UserError: They are.
    """
    if "log_probs" in objective.columns:
        columns = (pq.read_table(path, columns=["log_probs"]).column(0) for path in data.train.files)
        if missing := sum(column.null_count for column in columns):
            raise UserError(
                f"{missing} of {data.train.rows} rows have no recorded log-probabilities, and the whole model would be "
                "loaded to compute them, which qlora is there to avoid",
                remedy="collect rollouts with their log-probabilities, or set method to lora",
            )


def require_quantization(machine: Machine) -> None:
    """Checks that a model can be trained in 4 bits.

    Raises:
        UserError: There is no GPU, or no bitsandbytes.
    """
    if not machine.gpus:
        raise UserError("method qlora needs a GPU, and none was found", remedy="set method to lora")
    if find_spec("bitsandbytes") is None:
        raise UserError("method qlora needs bitsandbytes", remedy="pip install bitsandbytes, or set method to lora")


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


def job_of(ready: Prepared, dataset: Path, settings: TrainSettings) -> Job:
    """A prepared run as its processes need to know it."""
    asked = settings.model_dump(mode="json")
    return Job(ready.objective.name, asked, ready.planned.plan, str(dataset.resolve()), ready.base, ready.facts)


def plan_facts(dataset: Path, settings: TrainSettings, *, calibrated: bool) -> dict[str, Any]:
    """What a run will do and need, for reports.

    Args:
        dataset (`Path`): Folder that `format` wrote.
        settings (`TrainSettings`): Of the run.
        calibrated (`bool`): Train on the longest rows for a few steps, to tell the time; nothing else needs the model's
            weights.

    Returns:
        `dict[str, Any]`: JSON-able: `plan` (value and origin of each number), `memory` (bytes by part), `data`,
            `notes`, `findings`, and `speed` where it was measured.

    Raises:
        UserError: As `prepare`.
        RunError: The few steps failed.
    """
    ready = prepare(dataset, settings)
    planned, split = ready.planned, ready.data.train
    numbers = asdict(planned.plan)
    facts: dict[str, Any] = {
        "model": ready.base,
        "plan": {name: {"value": v, "origin": planned.origins.get(name, "the job")} for name, v in numbers.items()},
        "memory": {
            "parts": asdict(planned.memory),
            "total": planned.memory.total,
            "available": planned.available,
        },
        "data": {
            "rows": split.rows,
            "tokens": split.tokens,
            "loss_tokens": split.loss_tokens,
            "longest": split.longest,
        },
        "notes": list(planned.notes),
        "findings": [asdict(finding) for finding in ready.findings],
    }
    if calibrated:
        require_weights(ready.base, ready.config)
        made = planned.plan
        launch = Launch(processes=made.processes, cuda=made.cuda, nodes=settings.nodes, engine=settings.engine)
        speed = calibrate(job_of(ready, dataset, settings), launch)
        share = made.steps * made.effective_batch / split.rows
        seconds = speed.seconds(round(split.tokens * share), settings.nodes)
        facts["speed"] = asdict(speed) | {"seconds": seconds}
    return facts
