"""The process that trains; `run.py` starts it, one a GPU, and starts it again where memory ran out.

Run as: python -m gymtrl.training.worker FOLDER, where FOLDER holds a `job.json`
"""

from __future__ import annotations

import fcntl
import gc
import shutil
import sys
import time
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gymtrl.errors import GymtrlError, RunError, UserError
from gymtrl.models.fingerprint import load_tokenizer
from gymtrl.training.data import TrainingData, load_rows, read_dataset
from gymtrl.training.job import (
    CHECKPOINTS,
    EXIT,
    FINDINGS,
    LOCK,
    METRICS,
    OUTCOME,
    RESULT,
    Failure,
    Job,
    Kind,
    Outcome,
    failure_file,
    read_job,
    write_json,
)
from gymtrl.training.objective import Objective, Parts
from gymtrl.training.objectives import OBJECTIVES
from gymtrl.training.plan import trl_config
from gymtrl.training.progress import is_first_process, peak_memory
from gymtrl.training.quiet import quiet
from gymtrl.training.settings import TrainSettings
from gymtrl.workspace.artefact import is_disk_full

if TYPE_CHECKING:
    from transformers import Trainer

EVAL_ROWS = 200
"""Validation rows that the loss is measured on, before training and after each epoch; more would cost time."""

_ALLOCATORS = (
    "can't allocate memory",
    "cannot allocate memory",
    "not enough memory",
    "out of memory",
    "bad_alloc",
    "status_alloc_failed",
)
_LOCK_SECONDS = 60.0


@dataclass
class _Stage:
    """What the process is doing, for the message where it fails."""

    now: str = "loading"


def main(folder: Path) -> int:
    """Trains what `folder` asks for. Returns the exit status; see `EXIT`."""
    stage = _Stage()
    try:
        with _alone(folder), quiet():
            _work(folder, read_job(folder), stage)
        return 0
    except Exception as error:  # whatever it is, the process that started this one has to hear of it
        failure = _failure(error, stage.now)
        if failure.kind == "bug":
            traceback.print_exc()
        try:
            if failure.kind == "disk" and is_first_process():
                from gymtrl.training.checkpoints import drop_torn

                drop_torn(folder / CHECKPOINTS)  # frees what the disk had no room for
            write_json(folder / failure_file(), failure)
        except OSError:
            print(failure.message, file=sys.stderr)
        return EXIT[failure.kind]


def _work(folder: Path, job: Job, stage: _Stage) -> None:
    from gymtrl.training.checkpoints import is_final, last_sealed, mark_final
    from gymtrl.training.export import export_model

    objective = OBJECTIVES[job.objective]  # type: ignore[index]
    settings = objective.settings.model_validate(job.settings)
    checkpoint = last_sealed(folder / CHECKPOINTS)
    trained = None
    if checkpoint is None or not is_final(checkpoint):
        trained = _train(folder, job, objective, settings, checkpoint, stage)
        checkpoint = last_sealed(folder / CHECKPOINTS)
        assert checkpoint is not None, "training ended without a checkpoint"
        if is_first_process():
            mark_final(checkpoint, trained)
    distributed = trained is not None and trained.processes > 1
    if distributed:
        from torch.distributed import destroy_process_group

        destroy_process_group()
    if is_first_process():
        stage.now = "saving"
        _let_go()
        export_model(checkpoint, folder, job.base, lora=job.plan.method != "full", trust_remote_code=_trusts(settings))
        shutil.copyfile(checkpoint / OUTCOME, folder / RESULT)


def _let_go() -> None:
    """Gives back what training held: its trainer refers to itself, and the model is about to be loaded once more."""
    import torch

    gc.collect()
    torch.cuda.empty_cache()


def _train(
    folder: Path, job: Job, objective: Objective, settings: TrainSettings, checkpoint: Path | None, stage: _Stage
) -> Outcome:
    from gymtrl.training.checkpoints import SaveLast, has_all_steps, step_of, stop_reason
    from gymtrl.training.progress import MetricsLog, Narrator
    from gymtrl.training.trackers import place_trackers
    from gymtrl.training.watch import Watch, count_parameters

    resumed_from = step_of(checkpoint) if checkpoint is not None else None
    log, narrator = MetricsLog(folder / METRICS, resumed_from or 0), Narrator()
    place_trackers(settings.report_to, folder)
    data = read_dataset(Path(job.dataset), objective.made_by, objective.sequences)
    trainer = make_trainer(job, objective, settings, data, folder / CHECKPOINTS)
    # Where several processes share the model, measuring it before it is prepared for training would undo the sharing.
    trainer.args.eval_on_start = trainer.eval_dataset is not None and resumed_from is None
    steps, evals = (tuple(entry for entry in log.kept if name in entry) for name in ("loss", "eval_loss"))
    watch = Watch(replace(job.record(), steps=steps, evals=evals), folder / FINDINGS)
    for callback in (log, narrator, watch, SaveLast(trainer)):  # the last sees what the others decide
        trainer.add_callback(callback)
    stage.now = "training"
    if checkpoint is not None and has_all_steps(checkpoint):
        # Asked to resume after its last step, the trainer takes one more where that step lies within an epoch.
        trainer._load_from_checkpoint(str(checkpoint))
        last, stopped = step_of(checkpoint), stop_reason(checkpoint)
    else:
        try:
            trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint is not None else None)
        finally:
            narrator.close()
        last, stopped = trainer.state.global_step, getattr(trainer, "stop_reason", None)
    watch.require_sense()
    if trainer.eval_dataset is not None and last not in log.evaluated:
        stage.now = "measuring"
        log.evaluation(last, trainer.evaluate())
    return Outcome(
        steps=last,
        eval_before=log.evaluated.get(0),
        eval_after=log.evaluated.get(last),
        resumed_from=resumed_from,
        processes=trainer.accelerator.num_processes,
        peak_memory=peak_memory(),
        stopped=stopped,
        parameters=count_parameters(trainer.accelerator.unwrap_model(trainer.model)),
    )


def make_trainer(
    job: Job,
    objective: Objective,
    settings: TrainSettings,
    data: TrainingData,
    work: Path,
    *,
    only: Sequence[int] | None = None,
) -> Trainer:
    """Builds TRL's trainer for a job, ready to train.

    Args:
        job (`Job`): What to train.
        objective (`Objective`): Its objective.
        settings (`TrainSettings`): Its settings.
        data (`TrainingData`): Its dataset.
        work (`Path`): Folder for checkpoints.
        only (`Sequence[int]`, *optional*): Take these rows, in this order, and none for validation.
    """
    from transformers import PrinterCallback

    from gymtrl.training.checkpoints import Seal
    from gymtrl.training.ranks import RequireEngine, require_processes, shard_on_cpu

    cache = work / "data"
    if only is not None or not objective.evaluates:
        data = replace(data, validation=None)
    args = trl_config(settings, objective, data, job.plan, work)  # joins the processes
    require_processes(job.plan.processes)
    if settings.engine == "fsdp2" and not job.plan.cuda and job.plan.processes > 1:
        shard_on_cpu()
    train = load_rows(data.train.files, objective.columns, cache)
    train = train.shuffle(seed=settings.seed) if only is None else train.select(only)
    validation = load_rows(data.validation.files, objective.columns, cache) if data.validation is not None else None
    if validation is not None and len(validation) > EVAL_ROWS:
        validation = validation.select(range(EVAL_ROWS))
    quantization = _quantization(settings, job)
    going_on = settings.adapter is not None
    trainer = objective.trainer(
        Parts(
            model=_with_adapter(job, settings, args, quantization) if going_on else job.base,
            args=args,
            train=train,
            validation=validation,
            tokenizer=load_tokenizer(job.base, trust_remote_code=_trusts(settings)),
            peft_config=None if going_on else _adapter(settings),
            quantization_config=None if going_on else quantization,
            callbacks=[Seal()],
        )
    )
    trainer.remove_callback(PrinterCallback)
    trainer.add_callback(RequireEngine(trainer, settings.engine, job.plan.processes))
    return trainer


def _trusts(settings: TrainSettings) -> bool:
    return bool(settings.trl.get("trust_remote_code"))


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


def _with_adapter(job: Job, settings: TrainSettings, args: Any, quantization: Any) -> Any:
    """The model with the adapter that is to be trained on."""
    from peft import PeftModel
    from trl.trainer.utils import create_model_from_path

    options = load_options(args, quantization, job.plan.processes)
    args.model_init_kwargs = None  # they are spent here
    return PeftModel.from_pretrained(create_model_from_path(job.base, **options), settings.adapter, is_trainable=True)


def load_options(args: Any, quantization: Any, processes: int) -> dict[str, Any]:
    """What a model is loaded with where TRL's trainer does not load it.

    Args:
        args (`TrainingArguments`): TRL's configuration.
        quantization (`BitsAndBytesConfig`, *optional*): Of a model in 4 bits.
        processes (`int`): Of several each holds the model on its own GPU; alone, TRL lets it be spread.

    Returns:
        `dict[str, Any]`: Arguments of TRL's `create_model_from_path`.
    """
    options = {"trust_remote_code": args.trust_remote_code} | (args.model_init_kwargs or {})
    if quantization is not None:
        options["quantization_config"] = quantization
    if processes > 1:
        options["device_map"] = None
    return options


def _failure(error: Exception, at: str) -> Failure:
    kind: Kind
    remedy = None
    if isinstance(error, GymtrlError):
        kind, message, remedy = ("user" if isinstance(error, UserError) else "run"), error.message, error.remedy
    elif is_disk_full(error):
        kind, message = "disk", str(error)
    elif is_out_of_memory(error):
        kind, message = "memory", str(error).strip().splitlines()[0][:300] if str(error).strip() else "out of memory"
    else:
        kind, message = "bug", f"{type(error).__name__}: {error}"
    return Failure(kind, message, remedy, at, time.time())


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


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Waits until a process that was told to end has ended: two would write the same checkpoints."""
    if not is_first_process():
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


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
