"""Values of options that TRL, PEFT and transformers take: tried before anything is spent."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_type_hints

from pydantic import ConfigDict, TypeAdapter, ValidationError
from pydantic.errors import PydanticUserError

from gymtrl.errors import UserError
from gymtrl.models.load import weightless
from gymtrl.training.objective import Objective
from gymtrl.training.quiet import quiet
from gymtrl.training.settings import TrainSettings
from gymtrl.workspace.settings import nearest

if TYPE_CHECKING:
    from peft import LoraConfig
    from transformers import PretrainedConfig, TrainingArguments

_OF_THE_GPU = ("tf32", "torch_compile", "torch_compile_backend", "torch_compile_mode")
"""Options for which a configuration asks the GPU, which holds some of its memory from then on."""

_WITH_THE_MODEL = ("galore", "apollo", "lomo")
"""Optimizers that cannot be made without the model."""

_STARTS = (True, False, "gaussian", "orthogonal", "olora", "pissa")
"""Values of `init_lora_weights` after which the merged model was measured to be the one that was trained."""

_CHANGING = (
    "layer_replication",
    "lora_bias",
    "alora_invocation_tokens",
    "arrow_config",
    "corda_config",
    "eva_config",
    "kasa_config",
    "loftq_config",
    "lora_ga_config",
    "megatron_config",
    "monteclora_config",
    "target_parameters",
    "use_bdlora",
    "use_qalora",
    "velora_config",
)
"""Options of `LoraConfig` with which the merged model would be another one, or was never compared."""


def check_values(settings: TrainSettings, objective: Objective) -> None:
    """Refuses values that the libraries do not take, or that make a model other than the one that was trained.

    Neither the dataset nor the model is needed.

    Args:
        settings (`TrainSettings`): Their options have passed `check_options`.
        objective (`Objective`): What is trained.

    Raises:
        UserError: Naming the option.
    """
    from peft import LoraConfig

    config = objective.config()
    _check_kinds("trl", settings.trl, config)
    _check_dtype(settings.trl.get("model_init_kwargs", {}).get("dtype"))
    lora_config(settings)
    _check_kinds("peft", settings.peft, LoraConfig)
    own = {name: getattr(settings, setting) for name, setting in objective.own_options.items()}
    options = {
        "output_dir": "unused",
        "learning_rate": settings.learning_rate or 1e-4,
        "lr_scheduler_type": settings.scheduler,
        "bf16": False,
        "eval_strategy": "epoch" if objective.evaluates else "no",
        "report_to": "none",
        **{name: value for name, value in own.items() if value not in (None, [])},
    }
    check_config(built(config, options | settings.trl, apart=True), objective)


def check_config(config: TrainingArguments, objective: Objective) -> None:
    """Refuses values of a configuration that only the trainer would look at.

    Raises:
        UserError: Naming the option.
    """
    losses: Any = getattr(config, "loss_type", None)
    for loss in [losses] if isinstance(losses, str) else losses or ():
        if objective.losses and loss not in objective.losses:
            raise UserError(
                f"loss_type: TRL has no loss '{loss}' for {objective.name}{nearest(loss, objective.losses)}",
                remedy=f"choose among {', '.join(objective.losses)}",
            )
    if config.per_device_eval_batch_size < objective.least_micro:
        raise UserError(
            f"trl: per_device_eval_batch_size {config.per_device_eval_batch_size} is less than {objective.least_micro}",
            remedy=f"set it to {objective.least_micro} or more, or leave it out",
        )
    _try_optimizer(config)


def built(config: type[Any], options: dict[str, Any], *, apart: bool = False) -> TrainingArguments:
    """Makes a configuration of TRL.

    Args:
        config (`type`): Its class.
        options (`dict[str, Any]`): Its options.
        apart (`bool`, *optional*, defaults to `False`): Only try the values: join no other process and look at no GPU.

    Raises:
        UserError: TRL refuses a value.
    """
    if apart:
        import torch

        alone = {"_setup_devices": torch.device("cpu"), "_n_gpu": 0, "distributed_state": None}
        config = type(config.__name__, (config,), alone)
        options = {name: value for name, value in options.items() if name not in _OF_THE_GPU} | {"use_cpu": True}
    try:
        with quiet():
            made: TrainingArguments = config(**options)
    except (ValueError, TypeError, ImportError) as error:
        raise UserError(f"TRL refuses the settings: {error}", remedy="correct the option that it names") from error
    return made


def lora_config(settings: TrainSettings) -> LoraConfig | None:
    """A new adapter's configuration; `None` where every weight is trained.

    Raises:
        UserError: PEFT refuses a value, or the merged model would not be the one that was trained.
    """
    from peft import LoraConfig

    if settings.method == "full":
        return None
    for name in _CHANGING:
        if settings.peft.get(name):
            raise UserError(
                f"peft: '{name}' changes more than an adapter's weights, and the merged model was not shown to be the "
                "one that was trained",
                remedy="leave it out",
            )
    start = settings.peft.get("init_lora_weights", True)
    if start not in _STARTS:
        raise UserError(
            f"peft: init_lora_weights '{start}' is drawn at random or from data, so that the base which the adapter is "
            "merged into would not be the one that it was trained on",
            remedy=f"choose among {', '.join(str(value).lower() for value in _STARTS)}",
        )
    # No dropout: on few rows it costs more steps than it protects from, and the adapter is small beside the model.
    options = {"lora_dropout": 0.0, "target_modules": "all-linear"} | settings.peft
    try:
        made: LoraConfig = LoraConfig(
            r=settings.lora_r, lora_alpha=settings.lora_alpha, task_type="CAUSAL_LM", **options
        )
    except (ValueError, TypeError, ImportError) as error:
        raise UserError(f"PEFT refuses the settings: {error}", remedy="correct the option that it names") from error
    return made


def check_layers(settings: TrainSettings, config: PretrainedConfig, *, trust_remote_code: bool = False) -> None:
    """Checks that the layers which a new adapter is put onto are there, on a model without weights.

    Args:
        settings (`TrainSettings`): Of the run; without options for PEFT there is nothing to check.
        config (`PretrainedConfig`): Of the model.
        trust_remote_code (`bool`, *optional*, defaults to `False`): Run the code that the model brings.

    Raises:
        UserError: Naming the module that is not there, or what PEFT says.
    """
    if not settings.peft or settings.adapter is not None or (lora := lora_config(settings)) is None:
        return
    import torch
    from peft import inject_adapter_in_model

    model = weightless(config, trust_remote_code=trust_remote_code)
    names = [name for name, _ in model.named_modules()]
    ends = (model.get_input_embeddings(), model.get_output_embeddings())
    tied = ends[1] is not None and ends[0].weight is ends[1].weight
    for option in ("target_modules", "exclude_modules", "modules_to_save"):
        wanted = settings.peft.get(option)
        for module in wanted if isinstance(wanted, list) else ():
            if not any(name == module or name.endswith(f".{module}") for name in names):
                near = nearest(module, {name.rpartition(".")[2] for name in names})
                raise UserError(
                    f"peft: {option}: the model has no module '{module}'{near}", remedy="correct it, or leave it out"
                )
    lora.init_lora_weights = False  # there are no weights to begin with
    try:
        with quiet(), torch.device("meta"):
            inject_adapter_in_model(lora, model, low_cpu_mem_usage=True)
    except (ValueError, TypeError, KeyError, NotImplementedError, re.error) as error:
        raise UserError(f"PEFT refuses the settings: {error}", remedy="correct the option that it names") from error
    changed = (model.get_input_embeddings(), model.get_output_embeddings())
    if tied and any(now is not then for now, then in zip(changed, ends, strict=True)):
        raise UserError(
            "peft: the model's embeddings are its output layer, too: both would change, or come apart, and the merged "
            "model would not be the one that was trained",
            remedy="leave embeddings and output layer out of target_modules and modules_to_save",
        )


def _check_kinds(section: str, options: dict[str, Any], owner: type[Any]) -> None:
    """Compares values with the types that a dataclass declares; texts are not read as numbers, as no library does."""
    hints = get_type_hints(owner) if options else {}
    for name, value in options.items():
        try:
            kind = TypeAdapter(hints[name], config=_kinds(hints[name]))
        except (PydanticUserError, NameError):  # a type that says nothing of values
            continue
        try:
            found = kind.validate_python(value)
        except ValidationError as error:
            told = error.errors(include_url=False)[0]["msg"]
            raise UserError(f"{section}: {name} = {value!r}: {told}", remedy="correct it, or leave it out") from None
        if isinstance(value, str) and not isinstance(found, str | Path) and found is not None:
            raise UserError(f"{section}: {name} = {value!r} is a text", remedy="write the value without quotes")


def _kinds(kind: Any) -> ConfigDict | None:
    return None if dataclasses.is_dataclass(kind) else ConfigDict(arbitrary_types_allowed=True, allow_inf_nan=False)


def _check_dtype(name: Any) -> None:
    if name not in (None, "auto", "float32", "bfloat16", "float16"):
        raise UserError(
            f"model_init_kwargs: TRL takes no dtype '{name}'", remedy="choose auto, float32, bfloat16 or float16"
        )


def _try_optimizer(config: TrainingArguments) -> None:
    """Makes optimizer and schedule for a single weight."""
    import torch
    from transformers import Trainer, get_scheduler

    if any(word in str(config.optim.value) for word in _WITH_THE_MODEL):
        return
    weight = torch.nn.Parameter(torch.zeros(1))
    try:
        with quiet():
            kind, options = Trainer.get_optimizer_cls_and_kwargs(config)
            optimizer = kind([weight], **options)
            more = config.lr_scheduler_kwargs or {}
            get_scheduler(config.lr_scheduler_type, optimizer, 1, 10, scheduler_specific_kwargs=dict(more))
    except (ValueError, TypeError, ImportError) as error:
        raise UserError(
            f"transformers refuses the optimizer or the schedule: {error}", remedy="correct the option that it names"
        ) from error
