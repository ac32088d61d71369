"""From settings to numbers: what a run will do, and TRL's configuration for it."""

from __future__ import annotations

import dataclasses
import inspect
import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gymtrl.errors import UserError
from gymtrl.training.data import TrainingData
from gymtrl.training.fit import FitRequest, Fitted, available_memory, fit, own_gpus
from gymtrl.training.machine import Machine
from gymtrl.training.memory import MemoryEstimate, ModelShape
from gymtrl.training.objective import Defaults, Objective
from gymtrl.training.settings import TrainSettings
from gymtrl.training.values import built
from gymtrl.workspace.settings import nearest

if TYPE_CHECKING:
    from transformers import TrainingArguments

LARGE_DATA = 20_000
"""Rows above which one epoch is enough."""

ADAMW = "adamw_torch"
"""The optimizer that memory is estimated for, as transformers names it."""

OWN_OPTIONS = {
    "learning_rate": "learning_rate",
    "num_train_epochs": "epochs",
    "max_steps": "max_steps",
    "per_device_train_batch_size": "micro_batch",
    "gradient_accumulation_steps": "effective_batch",
    "warmup_steps": "warmup_ratio",
    "lr_scheduler_type": "scheduler",
    "seed": "seed",
    "data_seed": "seed",
    "save_steps": "save_steps",
    "gradient_checkpointing": "gradient_checkpointing",
    "report_to": "report_to",
}
"""TRL's options that have a setting of their own, by that setting."""

FIXED_OPTIONS = (
    "output_dir",
    "save_strategy",
    "save_total_limit",
    "save_only_model",
    "resume_from_checkpoint",
    "ignore_data_skip",
    "logging_steps",
    "logging_strategy",
    "max_length",
    "remove_unused_columns",
    "load_best_model_at_end",
    "auto_find_batch_size",
    "push_to_hub",
    "eval_strategy",
    "eval_on_start",
    "restore_callback_states_from_checkpoint",
    "logging_nan_inf_filter",
    "average_tokens_across_devices",
    "fsdp",
    "fsdp_config",
    "deepspeed",
    "ddp_backend",
    "dataset_kwargs",
    "chat_template_path",
    "eos_token",
    "pad_token",
    "assistant_only_loss",
    "eval_steps",
    "eval_delay",
)
"""TRL's options that resuming, or the promise that every row is trained on as it is, depend on."""


@dataclass(frozen=True)
class Plan:
    """The resolved numbers of a run.

    Attributes:
        objective, method (`str`): What is trained, and how.
        rows (`int`): Training rows.
        epochs (`float`): Passes over them.
        steps (`int`): Optimizer steps.
        effective_batch (`int`): Rows a step: `micro_batch * accumulation * processes`.
        micro_batch (`int`): Rows that one process computes at once.
        accumulation (`int`): Micro-batches of one process in a step.
        processes (`int`): Processes that train.
        learning_rate (`float`): Peak.
        save_steps (`int`): Steps between checkpoints.
        gradient_checkpointing (`bool`): Recompute activations.
        dtype (`str`): Type of the weights in memory: `float32` or `bfloat16`.
        cuda (`bool`): Train on GPUs; else on CPU.
        autocast (`bool`): Compute in bfloat16, on GPUs that can; else in float32.
        offload (`bool`): Activations wait in main memory for the backward pass.
        optimizer (`str`): As transformers names it; `trl: {optim: ...}` chooses another.
    """

    objective: str
    method: str
    rows: int
    epochs: float
    steps: int
    effective_batch: int
    micro_batch: int
    accumulation: int
    processes: int
    learning_rate: float
    save_steps: int
    gradient_checkpointing: bool
    dtype: str
    cuda: bool
    autocast: bool = False
    offload: bool = False
    optimizer: str = ADAMW


@dataclass(frozen=True)
class Planned:
    """A plan, and what it rests on.

    Attributes:
        plan (`Plan`): The numbers.
        origins (`dict[str, str]`): Number → where it comes from.
        memory (`MemoryEstimate`): Of each process, beyond Python and its libraries.
        available (`int`): Bytes that the estimate should stay within.
        notes (`tuple[str, ...]`): What was traded for what, and what may not fit.
    """

    plan: Plan
    origins: dict[str, str]
    memory: MemoryEstimate
    available: int
    notes: tuple[str, ...]


def plan(
    settings: TrainSettings, objective: Objective, *, rows: int, longest: int, shape: ModelShape, machine: Machine
) -> Planned:
    """Fills in what the settings leave open.

    Args:
        settings (`TrainSettings`): As the user gave them.
        objective (`Objective`): What is trained.
        rows (`int`): Training rows.
        longest (`int`): Tokens of the longest sequence.
        shape (`ModelShape`): Of the model.
        machine (`Machine`): Where it shall be trained, with its GPUs.

    Raises:
        UserError: `effective_batch` is no multiple of the rows that all processes compute at once, or nothing fits.
    """
    defaults, cuda = objective.defaults, bool(machine.gpus)
    epochs = settings.epochs if settings.epochs is not None else (1.0 if rows > LARGE_DATA else defaults.epochs)
    least = objective.least_micro * settings.nproc
    effective = settings.effective_batch or _multiple(
        min(max(round(rows * epochs / 50), defaults.least_batch), defaults.most_batch),
        (settings.micro_batch or objective.least_micro) * settings.nproc,
    )
    if effective % ((settings.micro_batch or 1) * settings.nproc) or effective < least:
        together = max((settings.micro_batch or 1) * settings.nproc, least)
        raise UserError(
            f"effective_batch {effective} is no multiple of {together}, the rows that are computed at once "
            f"(micro_batch x {settings.nproc} processes)",
            remedy=f"set effective_batch to {_multiple(effective, together)}",
        )
    request = FitRequest(
        model=shape,
        objective=objective.name,
        method=settings.method,
        longest=longest,
        effective_batch=effective,
        cuda=cuda,
        processes=settings.nproc,
        nodes=settings.nodes,
        engine=settings.engine,
        lora_r=settings.lora_r,
        micro_batch=settings.micro_batch,
        gradient_checkpointing=settings.gradient_checkpointing,
        least_micro=objective.least_micro,
    )
    if cuda and not all(gpu.bfloat16 for gpu in own_gpus(request, machine)):
        request = replace(request, autocast=False)
    fitted, notes = _fitted(request, machine)
    if not request.autocast:
        notes = (*notes, "the GPU does not compute in bfloat16; float32 takes more memory and time")
    optimizer = str(settings.trl.get("optim", ADAMW))
    if not optimizer.startswith(ADAMW):
        notes = (*notes, f"memory is estimated for AdamW; {optimizer} takes more or less")
    lora = settings.method != "full"
    steps = settings.max_steps or math.ceil(epochs * math.ceil(rows / effective))
    made = Plan(
        objective=objective.name,
        method=settings.method,
        rows=rows,
        epochs=steps * effective / rows if settings.max_steps else epochs,
        steps=steps,
        effective_batch=effective,
        micro_batch=fitted.micro_batch,
        accumulation=fitted.accumulation,
        processes=settings.nproc,
        learning_rate=settings.learning_rate or (defaults.lora_rate if lora else defaults.full_rate),
        save_steps=settings.save_steps or math.ceil(steps / 10),
        gradient_checkpointing=fitted.gradient_checkpointing,
        dtype=fitted.dtype,
        cuda=cuda,
        autocast=cuda and request.autocast,
        optimizer=optimizer,
    )
    return Planned(made, _origins(settings, defaults, rows), fitted.memory, fitted.available, notes)


def _fitted(request: FitRequest, machine: Machine) -> tuple[Fitted, tuple[str, ...]]:
    """What fits; where only what the user set stands in the way, that is kept, and said."""
    try:
        found = fit(request, machine)
        return found, found.traded
    except UserError as error:
        if request.micro_batch is None and request.gradient_checkpointing is None:
            raise
        fit(replace(request, micro_batch=None, gradient_checkpointing=None), machine)
        boundless = replace(machine, memory=2**62, gpus=tuple(replace(gpu, free=2**62) for gpu in machine.gpus))
        kept = replace(fit(request, boundless), available=available_memory(request, machine))
        return kept, (f"{error.message}; {error.remedy}. If memory runs out, smaller micro-batches are taken",)


def _origins(settings: TrainSettings, defaults: Defaults, rows: int) -> dict[str, str]:
    """Where each number of a plan comes from."""
    many = f"; one above {LARGE_DATA:,} rows" if rows > LARGE_DATA else ""
    computed = {
        "epochs": f"default ({defaults.epochs_source}{many})",
        "effective_batch": f"rows * epochs / 50 within {defaults.least_batch} to {defaults.most_batch} "
        f"({defaults.batch_source})",
        "learning_rate": f"default ({defaults.rate_source})",
        "micro_batch": "what fits the memory; on CPU one row is fastest",
        "gradient_checkpointing": "only where it is needed to fit",
        "save_steps": "a tenth of the run",
    }
    given = {name: "set" for name in computed if getattr(settings, name) is not None}
    if settings.max_steps:
        given["epochs"] = "max_steps * effective_batch / rows"
    rest = {
        "steps": "set" if settings.max_steps else "epochs * rows / effective_batch",
        "accumulation": "effective_batch / micro_batch / processes",
        "dtype": "weights that are trained keep 32 bits; a frozen base takes 16 on a GPU",
    }
    return computed | given | rest


def _multiple(number: int, of: int) -> int:
    return math.ceil(number / of) * of


def check_options(settings: TrainSettings, objective: Objective) -> None:
    """Refuses options that TRL, PEFT or transformers do not know, that have a setting, or that resuming depends on.

    Raises:
        UserError: Naming the nearest option or the setting to use.
    """
    from peft import LoraConfig
    from transformers import BitsAndBytesConfig

    config = objective.config()
    own, fixed = OWN_OPTIONS | objective.own_options, (*FIXED_OPTIONS, *objective.fixed_options)
    _check("trl", settings.trl, _fields(config), config.__name__, own, fixed)
    peft = {"r": "lora_r", "rank": "lora_r", "lora_alpha": "lora_alpha", "alpha": "lora_alpha"}
    _check("peft", settings.peft, _fields(LoraConfig), "LoraConfig", peft, ("task_type", "inference_mode"))
    bits = set(inspect.signature(BitsAndBytesConfig.__init__).parameters) - {"self", "kwargs"}
    _check("quantization", settings.quantization, bits, "BitsAndBytesConfig", {}, ())
    given = settings.trl.get("model_init_kwargs", {})
    if not isinstance(given, dict):
        raise UserError("trl: 'model_init_kwargs' is no mapping", remedy="give arguments of from_pretrained by name")
    _refuse_tokens("trl", settings.trl)
    _refuse_tokens("model_init_kwargs", given)
    if settings.quantization and settings.method != "qlora":
        raise UserError(
            f"quantization is for method qlora, and the method is {settings.method}", remedy="set method to qlora"
        )
    if settings.adapter and settings.method == "full":
        raise UserError("an adapter is given, and the method is full", remedy="set method to lora or qlora")


def _refuse_tokens(section: str, options: dict[str, Any]) -> None:
    for key in ("hub_token", "token", "use_auth_token"):
        if key in options:
            raise UserError(
                f"{section}: '{key}' would be written into the files of the run for all to read",
                remedy="set the environment variable HF_TOKEN in its place",
            )


def trl_config(
    settings: TrainSettings, objective: Objective, data: TrainingData, plan: Plan, output: Path, *, apart: bool = False
) -> TrainingArguments:
    """Builds TRL's configuration.

    Args:
        settings (`TrainSettings`): As the user gave them.
        objective (`Objective`): What is trained.
        data (`TrainingData`): On what.
        plan (`Plan`): By which numbers.
        output (`Path`): Folder for checkpoints.
        apart (`bool`, *optional*, defaults to `False`): Only try the values, as `built` does.

    Raises:
        UserError: TRL refuses a value.
    """
    config = objective.config()
    # Regrouping within an optimizer step saves padding and leaves the loss as it is. One row at a time needs none, but
    # must take the same rows in each step, or a smaller micro-batch would change the run. The order ignores the seed,
    # which is why the rows are shuffled before they get here.
    rebalance = plan.objective == "sft"
    options: dict[str, Any] = {
        "output_dir": str(output),
        "max_length": None,
        "per_device_train_batch_size": plan.micro_batch,
        "per_device_eval_batch_size": objective.least_micro,
        "gradient_accumulation_steps": plan.accumulation,
        "num_train_epochs": plan.epochs,
        "max_steps": settings.max_steps or -1,
        "learning_rate": plan.learning_rate,
        "warmup_steps": _warmup(settings.warmup_ratio, plan.steps),
        "lr_scheduler_type": settings.scheduler,
        "seed": settings.seed,
        "gradient_checkpointing": plan.gradient_checkpointing,
        "train_sampling_strategy": "batch_rebalance" if rebalance else "random",
        "optim": plan.optimizer,
        "use_cpu": not plan.cuda,
        "bf16": plan.autocast,
        "model_init_kwargs": {"dtype": plan.dtype},
        "logging_steps": 1,
        "save_strategy": "steps",
        "save_steps": plan.save_steps,
        "save_total_limit": 2,
        "eval_strategy": "epoch" if data.validation is not None and objective.evaluates else "no",
        "logging_nan_inf_filter": False,  # what is no number is to be seen
        "report_to": settings.report_to or "none",
        "disable_tqdm": True,
        "dataloader_pin_memory": plan.cuda,
    }
    if plan.offload:
        options["activation_offloading"] = True
    known = _fields(config)
    options = {name: value for name, value in options.items() if name in known}
    options |= objective.options(settings, data)
    merged = {"model_init_kwargs": options["model_init_kwargs"] | settings.trl.get("model_init_kwargs", {})}
    return built(config, options | settings.trl | merged, apart=apart)


def _warmup(ratio: float, steps: int) -> int:
    """Steps in which the rate rises from zero: a single one would only be a step at rate zero."""
    rising = int(ratio * steps)
    return rising if rising > 1 else 0


def _fields(config: type[Any]) -> set[str]:
    return {field.name for field in dataclasses.fields(config) if field.init}


def _check(
    section: str,
    options: dict[str, Any],
    known: set[str],
    owner: str,
    own: dict[str, str],
    fixed: tuple[str, ...],
) -> None:
    for key in options:
        if key in own:
            raise UserError(f"{section}: '{key}' is set by '{own[key]}'", remedy=f"set {own[key]} in its place")
        if key not in known:
            near = nearest(key, known | own.keys())
            instead = next((setting for name, setting in own.items() if f"'{name}'" in near), None)
            raise UserError(
                f"{section}: {owner} has no option '{key}'{near}",
                remedy=f"set {instead}, which stands for it" if instead else f"see the documentation of {owner}",
            )
        if key in fixed:
            raise UserError(
                f"{section}: '{key}' cannot be changed: resuming depends on it, or that rows are trained on as "
                "they are",
                remedy="for that, train with the dataset's own train_with_trl.py",
            )
