"""The process that trains; `run.py` starts it, one a GPU, and starts it again where memory ran out.

Run as: python -m gymtrl.training.worker FOLDER, where FOLDER holds a `job.json`
"""

from __future__ import annotations

import fcntl
import os
import resource
import sys
import time
import traceback
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gymtrl.errors import GymtrlError, RunError, UserError
from gymtrl.models.fingerprint import load_config, load_tokenizer
from gymtrl.training.data import TrainingData, load_rows, read_dataset
from gymtrl.training.job import (
    CHECKPOINTS,
    EXIT,
    FAILURE,
    LOCK,
    METRICS,
    RESULT,
    Failure,
    Job,
    Kind,
    Outcome,
    read_job,
    write_json,
)
from gymtrl.training.objective import Objective, Parts
from gymtrl.training.objectives import OBJECTIVES
from gymtrl.training.plan import trl_config
from gymtrl.training.settings import TrainSettings
from gymtrl.workspace.artefact import is_disk_full

if TYPE_CHECKING:
    from transformers import Trainer

EVAL_ROWS = 200
"""Validation rows that the loss is measured on before and after; more would cost time and hardly move the figure."""

_ALLOCATORS = ("can't allocate memory", "cannot allocate memory", "not enough memory", "out of memory", "bad_alloc")
_LOCK_SECONDS = 60.0


@dataclass
class _Stage:
    """What the process is doing, for the message where it fails."""

    now: str = "loading"


def main(folder: Path) -> int:
    """Trains what `folder` asks for. Returns the exit status; see `EXIT`."""
    stage = _Stage()
    try:
        with _alone(folder), _quiet():
            _work(folder, read_job(folder), stage)
        return 0
    except Exception as error:  # whatever it is, the process that started this one has to hear of it
        failure = _failure(error, stage.now)
        if failure.kind == "bug":
            traceback.print_exc()
        try:
            write_json(folder / FAILURE, failure)
        except OSError:
            print(failure.message, file=sys.stderr)
        return EXIT[failure.kind]


def _work(folder: Path, job: Job, stage: _Stage) -> None:
    from gymtrl.training.checkpoints import is_final, last_sealed, step_of
    from gymtrl.training.export import copy_settings, save_weights
    from gymtrl.training.progress import MetricsLog, Narrator, read_metrics

    objective = OBJECTIVES[job.objective]  # type: ignore[index]
    settings = objective.settings.model_validate(job.settings)
    data = read_dataset(Path(job.dataset), objective.made_by, objective.sequences)
    work, metrics_file = folder / CHECKPOINTS, folder / METRICS
    checkpoint = last_sealed(work)
    resumed_from = step_of(checkpoint) if checkpoint is not None else None
    log, narrator = MetricsLog(metrics_file, resumed_from or 0), Narrator()
    trainer = make_trainer(job, objective, settings, data, work)
    trainer.add_callback(log)
    trainer.add_callback(narrator)
    measured = {entry["step"]: entry for entry in read_metrics(metrics_file) if "eval_loss" in entry}

    def evaluate(step: int) -> float | None:
        """The validation loss after a step, measured once however often the run is interrupted."""
        if data.validation is not None and step not in measured:
            stage.now = "measuring"
            measured[step] = {"step": step, **_numbers(trainer.evaluate())}
            log.append(measured[step])
        return measured[step]["eval_loss"] if step in measured else None

    before = evaluate(0)
    stage.now = "training"
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
    after = evaluate(last_step)
    stage.now = "saving"
    config = load_config(job.base, trust_remote_code=bool(settings.trl.get("trust_remote_code")))
    save_weights(trainer.model, folder, config, lora=job.plan.method != "full")
    copy_settings(job.base, folder / "model")
    peak = _peak_memory()
    write_json(folder / RESULT, Outcome(before, after, resumed_from, trainer.accelerator.num_processes, peak))


def make_trainer(job: Job, objective: Objective, settings: TrainSettings, data: TrainingData, work: Path) -> Trainer:
    """Builds TRL's trainer for a job, ready to train.

    Args:
        job (`Job`): What to train.
        objective (`Objective`): Its objective.
        settings (`TrainSettings`): Its settings.
        data (`TrainingData`): Its dataset.
        work (`Path`): Folder for checkpoints.
    """
    from transformers import PrinterCallback

    from gymtrl.training.checkpoints import Seal

    trust = bool(settings.trl.get("trust_remote_code"))
    cache = work / "data"
    train = load_rows(data.train.files, objective.columns, cache).shuffle(seed=settings.seed)
    validation = load_rows(data.validation.files, objective.columns, cache) if data.validation is not None else None
    if validation is not None and len(validation) > EVAL_ROWS:
        validation = validation.select(range(EVAL_ROWS))
    args = trl_config(settings, objective, data, job.plan, work)
    quantization = _quantization(settings, job)
    going_on = settings.adapter is not None
    trainer = objective.trainer(
        Parts(
            model=_with_adapter(job.base, settings, args, quantization) if going_on else job.base,
            args=args,
            train=train,
            validation=validation,
            tokenizer=load_tokenizer(job.base, trust_remote_code=trust),
            peft_config=None if going_on else _adapter(settings),
            quantization_config=None if going_on else quantization,
            callbacks=[Seal()],
        )
    )
    trainer.remove_callback(PrinterCallback)
    return trainer


def _adapter(settings: TrainSettings) -> Any:
    """A new adapter's configuration; `None` where every weight is trained."""
    from peft import LoraConfig

    if settings.method == "full":
        return None
    # No dropout: on few rows it costs more steps than it protects from, and the adapter is small beside the model.
    options = {"lora_dropout": 0.0, "target_modules": "all-linear"} | settings.peft
    try:
        return LoraConfig(r=settings.lora_r, lora_alpha=settings.lora_alpha, task_type="CAUSAL_LM", **options)
    except (ValueError, TypeError) as error:
        raise UserError(f"PEFT refuses the settings: {error}", remedy="correct the option that it names") from error


def _quantization(settings: TrainSettings, job: Job) -> Any:
    from transformers import BitsAndBytesConfig

    if settings.method != "qlora":
        return None
    options = {
        "load_in_4bit": True,
        "bnb_4bit_quant_type": "nf4",
        "bnb_4bit_use_double_quant": True,
        "bnb_4bit_compute_dtype": job.plan.dtype,
    }
    return BitsAndBytesConfig(**options | settings.quantization)


def _with_adapter(base: str, settings: TrainSettings, args: Any, quantization: Any) -> Any:
    """The model with the adapter that is to be trained on."""
    from peft import PeftModel
    from trl.trainer.utils import create_model_from_path

    options = dict(args.model_init_kwargs or {})
    if quantization is not None:
        options["quantization_config"] = quantization
    model = create_model_from_path(base, trust_remote_code=args.trust_remote_code, **options)
    return PeftModel.from_pretrained(model, settings.adapter, is_trainable=True)


def _failure(error: Exception, at: str) -> Failure:
    kind: Kind
    remedy = None
    if isinstance(error, GymtrlError):
        kind, message, remedy = ("user" if isinstance(error, UserError) else "run"), error.message, error.remedy
    elif is_disk_full(error):
        kind, message = "run", f"the disk is full: {error}"
        remedy = "free some disk space, or choose a folder on another disk with -o; then run it again to go on"
    elif is_out_of_memory(error):
        kind, message = "memory", str(error).strip().splitlines()[0][:300] if str(error).strip() else "out of memory"
    else:
        kind, message = "bug", f"{type(error).__name__}: {error}"
    return Failure(kind, message, remedy, at)


def is_out_of_memory(error: BaseException) -> bool:
    """Tells whether a failure comes from a lack of memory; torch's CPU allocator says so only in words."""
    import torch

    seen: BaseException | None = error
    while seen is not None:
        if isinstance(seen, MemoryError | torch.OutOfMemoryError):
            return True
        if isinstance(seen, RuntimeError | OSError) and any(text in str(seen).lower() for text in _ALLOCATORS):
            return True
        seen = seen.__cause__ or seen.__context__
    return False


def _numbers(metrics: dict[str, Any]) -> dict[str, float]:
    """What an evaluation measured, without its own timing."""
    timing = ("_runtime", "_per_second", "_time")
    return {k: v for k, v in metrics.items() if isinstance(v, int | float) and not k.endswith(timing) and k != "epoch"}


def _peak_memory() -> int:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Waits until a process that was told to end has ended: two would write the same checkpoints."""
    if os.environ.get("RANK", "0") != "0":
        yield
        return
    end = time.monotonic() + _LOCK_SECONDS
    with (folder / LOCK).open("w") as stream:
        while True:
            try:
                fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > end:
                    raise RunError(
                        f"another process still trains in {folder}", remedy="wait for its end, or stop it"
                    ) from None
                time.sleep(0.2)
        yield


@contextmanager
def _quiet() -> Iterator[None]:
    """Keeps the libraries' own bars and remarks off the terminal while our one bar is there."""
    import datasets
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    datasets.disable_progress_bars()
    with warnings.catch_warnings():
        # The libraries announce to each other what their next versions will rename.
        warnings.simplefilter("ignore", FutureWarning)
        yield


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
