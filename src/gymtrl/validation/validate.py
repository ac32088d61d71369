"""Validation: two models on the same held-out tasks in the same Gym, and the comparison of what they did."""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

import msgspec

from gymtrl.comparison.compare import compare_candidates
from gymtrl.comparison.record import Comparison
from gymtrl.comparison.settings import CompareSettings
from gymtrl.errors import UserError
from gymtrl.gym.collect import read_tasks
from gymtrl.validation.session import GymSession, Progress, gym_session, silent
from gymtrl.validation.settings import ValidateSettings
from gymtrl.workspace.artefact import Draft, artefact


def model_folder(path: Path) -> Path:
    """Returns the folder that transformers loads: `path` itself, or the merged model of a training run.

    Raises:
        UserError: Neither is there.
    """
    for folder in (path / "model", path):
        if (folder / "config.json").is_file():
            return folder
    remedy = "give a model folder, or the folder that 'gymtrl train' wrote"
    raise UserError(f"{path} {'holds no model' if path.exists() else 'does not exist'}", remedy=remedy)


def validate_inputs(checkpoint: Path, settings: ValidateSettings) -> list[Path]:
    """Returns what a validation reads: the checkpoint's model, the baseline's model or rollouts, the tasks.

    Raises:
        UserError: One of them is missing.
    """
    if settings.tasks is None:
        remedy = "give --tasks, such as the heldout_inputs.jsonl that filter wrote"
        raise UserError("no tasks to validate on", remedy=remedy)
    if not settings.tasks.is_file():
        raise UserError(f"{settings.tasks} does not exist", remedy="give a JSONL file of Gym tasks with --tasks")
    baseline = Path(settings.baseline)
    return [model_folder(checkpoint), baseline if baseline.is_file() else model_folder(baseline), settings.tasks]


def read_comparison(folder: Path) -> Comparison:
    """Reads the comparison that a validation wrote."""
    return msgspec.json.decode((folder / "comparison.json").read_bytes(), type=Comparison)


def relocated(comparison: Comparison, old: Path, new: Path) -> Comparison:
    """A comparison of rollouts in a folder that gets another name.

    Args:
        comparison (`Comparison`): The result, with the places that its rollouts had.
        old, new (`Path`): The folder's names.
    """

    def moved(value: object) -> object:
        if isinstance(value, str):
            return value.replace(f"{old}{os.sep}", f"{new}{os.sep}")
        if isinstance(value, dict):
            return {key: moved(item) for key, item in value.items()}
        return [moved(item) for item in value] if isinstance(value, list | tuple) else value

    return msgspec.convert(moved(msgspec.to_builtins(comparison)), Comparison)


def compare_rollouts(
    before: Path, after: Sequence[Path], settings: CompareSettings, *, out: Path | None = None
) -> Comparison:
    """Compares collections with one of the same tasks, and keeps the result in `out` where that is given.

    Args:
        before (`Path`): Rollout file, or a folder that holds some.
        after (`Sequence[Path]`): The same of each candidate.
        settings (`CompareSettings`): How they are compared.
        out (`Path`, *optional*): Folder to write.

    Raises:
        UserError: See `gymtrl.comparison.compare.compare_candidates`.
    """

    def compared() -> Comparison:
        return compare_candidates(
            [before],
            [[path] for path in after],
            metric=settings.metric,
            cluster=settings.cluster,
            min_effect=settings.min_effect,
        )

    if out is None:
        return compared()
    with artefact(out, verb="compare", settings=settings, inputs=[before, *after]) as draft:
        comparison = compared()
        _write_comparison(comparison, draft)
    return comparison


def validate(
    checkpoint: Path,
    out: Path,
    settings: ValidateSettings,
    *,
    session: GymSession | None = None,
    progress: Progress = silent,
) -> Comparison:
    """Collects rollouts of the baseline and the checkpoint on held-out tasks, and compares them.

    Writes `before/rollouts.jsonl`, `after/rollouts.jsonl` with Gym's sidecars, and `comparison.json`. An interrupted
    validation goes on where it stopped.

    Args:
        checkpoint (`Path`): Model folder, or what `train` wrote.
        out (`Path`): Folder to write.
        settings (`ValidateSettings`): Tasks, baseline, sampling.
        session (`GymSession`, *optional*): A running session to use; else one is opened and closed.
        progress (`Progress`, *optional*): Told about waiting and collecting.

    Raises:
        UserError: Bad input. RunError: Gym or the endpoint failed.
    """
    inputs = validate_inputs(checkpoint, settings)
    after_model, before, task_file = inputs
    tasks = read_tasks(task_file)
    opened = artefact(out, verb="validate", settings=settings, inputs=inputs, resumable=True)
    with opened as draft, ExitStack() as stack:
        if session is None:
            session = stack.enter_context(
                gym_session(
                    settings.server,
                    draft.path / "logs",
                    gym_home=settings.gym_home,
                    head=settings.head,
                    port=settings.endpoint_port,
                    endpoint_name=settings.endpoint_name,
                    progress=progress,
                )
            )
        failed_before = None
        if before.is_dir():
            before_model, before = before, draft.path / "before" / "rollouts.jsonl"
            failed_before = session.collect(before_model, tasks, before, settings, name="before").failed
        after = draft.path / "after" / "rollouts.jsonl"
        collected = session.collect(after_model, tasks, after, settings, name="after")
        comparison = relocated(compare_rollouts(before, [after], settings), draft.path, out)
        _write_comparison(comparison, draft)
        draft.extra |= {"tasks": len(tasks), "failed_before": failed_before, "failed_after": collected.failed}
    return comparison


def _write_comparison(comparison: Comparison, draft: Draft) -> None:
    encoded = msgspec.json.format(msgspec.json.encode(comparison), indent=2)
    (draft.path / "comparison.json").write_bytes(encoded + b"\n")
    draft.extra |= {"verdict": comparison.verdict, "outcome": comparison.outcome}
