"""A training run: checked, planned, trained in processes of its own, and told in a card and a manifest.

Run as: gymtrl train sft|dpo|kto|grpo DATASET -o RUN
"""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from gymtrl.doctor.diagnose import diagnose, with_told
from gymtrl.doctor.finding import Finding, read_findings, write_findings
from gymtrl.doctor.run import DataFacts
from gymtrl.models.adapter import adapter_rank
from gymtrl.models.fingerprint import tokenizer_bytes
from gymtrl.training.base import hub_revision, require_weights
from gymtrl.training.job import (
    CHECKPOINTS,
    FINDINGS,
    JOB,
    LOCK,
    METRICS,
    RESULT,
    Change,
    Job,
    read_changes,
    read_job,
    read_outcome,
)
from gymtrl.training.plan import Plan
from gymtrl.training.prepare import Prepared, job_of, launch_of, prepare, train_inputs
from gymtrl.training.settings import TrainSettings
from gymtrl.training.space import require_space, room_needed, sizes_of
from gymtrl.training.supervise import train_in_processes
from gymtrl.workspace.artefact import Draft, artefact
from gymtrl.workspace.metrics import read_metrics


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
        stopped (`str`, *optional*): Why training ended before its last step.
        findings (`tuple[Finding, ...]`): What the rules of `doctor` say of it.
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
    stopped: str | None
    findings: tuple[Finding, ...]


def train(
    dataset: Path, out: Path, settings: TrainSettings, *, told: Callable[[Prepared], None] | None = None
) -> TrainResult:
    """Trains a model on a dataset folder.

    Args:
        dataset (`Path`): Folder that `format` wrote; its token ids and masks are trained on as they are.
        out (`Path`): Result folder: `model/`, `adapter/` (LoRA), `metrics.jsonl`, `README.md`, `manifest.json`.
        settings (`TrainSettings`): What to do, in the objective's own class, such as `TrainDpoSettings`; what
            they leave open is resolved from the data and the machine.
        told (`Callable[[Prepared], None]`, *optional*): Called once, before the processes start, with what they will
            do.

    Returns:
        `TrainResult`: Losses, time, memory and where the model is.

    Raises:
        UserError: The dataset does not fit, was made for another model, or a setting is wrong.
        RunError: The disk is full or too small, or memory is. What was trained is kept; the same call continues it.
    """
    ready = prepare(dataset, settings)
    require_weights(ready.base, ready.config)
    if told is not None:
        told(ready)
    tokens = sum(split.tokens for split in (ready.data.train, ready.data.validation) if split is not None)
    verb, inputs = f"train {ready.objective.name}", train_inputs(dataset, settings)
    plan = ready.planned.plan
    sizes = sizes_of(
        ready.shape,
        rank=ready.rank,
        divided=settings.engine != "ddp" and plan.processes > 1,
        tokenizer=tokenizer_bytes(ready.base),
    )
    room = room_needed(sizes, lora=plan.method != "full", tokens=tokens)
    # All that can stop the run is asked before what an interrupted one of other settings left is discarded.
    launch = launch_of(settings, plan)

    def roomy(draft: Draft) -> None:
        if not (draft.resumed and (draft.path / RESULT).is_file()):  # an attempt may have been killed after it was done
            require_space(draft.path, room.run)

    with artefact(out, verb=verb, settings=settings, inputs=inputs, resumable=True, check=roomy) as draft:
        job = job_of(ready, dataset, settings)
        if (draft.path / JOB).is_file():
            # By the memory that is free now, other numbers might fit; a run goes on by those that it began with.
            job = job.with_plan(read_job(draft.path).plan)
        if not (draft.path / RESULT).is_file():
            train_in_processes(draft.path, job, ready.objective, replace(launch, cuda=job.plan.cuda), room)
        return _finish(draft, out, ready, job, read_changes(draft.path))


def _finish(draft: Draft, out: Path, ready: Prepared, job: Job, changes: list[Change]) -> TrainResult:
    from gymtrl.training.export import write_card

    resolved = changes[-1].plan if changes else job.plan
    outcome = read_outcome(draft.path)
    entries = read_metrics(draft.path / METRICS)
    steps = [entry for entry in entries if "loss" in entry]
    counted: dict[str, Any] = dict(outcome.parameters)
    evals = tuple(entry for entry in entries if "eval_loss" in entry)
    record = replace(job.record(), steps=tuple(steps), evals=evals, **counted)
    findings = with_told(diagnose(record, "after"), read_findings(draft.path / FINDINGS))
    write_findings(draft.path / FINDINGS, findings)
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
        stopped=outcome.stopped,
        findings=tuple(findings),
    )
    write_card(
        draft.path,
        name=out.name,
        base=job.base,
        trainer=ready.objective.trainer_name,
        data=ready.data,
        steps=outcome.steps,
        batch=resolved.effective_batch,
        facts={
            "loss, first tenth": result.first_loss,
            "loss, last tenth": result.last_loss,
            "validation loss before": result.eval_before,
            "validation loss after": result.eval_after,
            "training seconds": result.seconds,
            "stopped before its last step": outcome.stopped,
            "changed for memory": "; ".join(f"{c.measure} after step {c.step}" for c in changes) or None,
        },
        settings=job.settings | {"model": job.base} | resolved_settings(resolved),
        rank=adapter_rank(draft.path / "adapter") if lora else None,
    )
    names = ("first_loss", "last_loss", "eval_before", "eval_after", "seconds", "tokens", "peak_memory")
    draft.extra.update(
        {
            "objective": job.objective,
            "model": job.base,
            "revision": hub_revision(job.base),
            "fingerprint": ready.data.fingerprint.as_dict(),
            "dataset_inputs": [{"path": item.path, "sha256": item.sha256} for item in ready.data.manifest.inputs],
            "plan": dataclasses.asdict(resolved),
            "origins": ready.planned.origins,
            "notes": list(ready.planned.notes),
            "changes": [{"step": c.step, "measure": c.measure, "reason": c.reason} for c in changes],
            "data": _known(job.data),
            "parameters": outcome.parameters,
            "processes": outcome.processes,
            "stopped": outcome.stopped,
            "results": {name: getattr(result, name) for name in names},
        }
    )
    shutil.rmtree(draft.path / CHECKPOINTS, ignore_errors=True)
    (draft.path / LOCK).unlink(missing_ok=True)
    return result


def _known(facts: DataFacts) -> dict[str, Any]:
    """Facts of a dataset without those that its objective has not."""
    return {f.name: getattr(facts, f.name) for f in dataclasses.fields(facts) if getattr(facts, f.name) != f.default}


def resolved_settings(resolved: Plan) -> dict[str, Any]:
    """A plan as the settings that would ask for it."""
    names = ("epochs", "effective_batch", "micro_batch", "learning_rate", "save_steps", "gradient_checkpointing")
    return {name: getattr(resolved, name) for name in names} | {"max_steps": resolved.steps}
