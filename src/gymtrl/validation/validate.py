"""Validation: two models on the same held-out tasks in the same Gym, and the comparison of what they did."""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

import msgspec

from gymtrl.comparison.compare import compare_candidates
from gymtrl.comparison.record import COMPARISON, Comparison
from gymtrl.comparison.settings import CompareSettings
from gymtrl.errors import UserError
from gymtrl.gym.collect import read_tasks
from gymtrl.gym.settings import CollectSettings
from gymtrl.selection.leaks import Leak, find_leaks
from gymtrl.serving.hosted import Hosted
from gymtrl.validation.lineage import Origin, trained_on
from gymtrl.validation.session import GymSession, Progress, gym_session, served_by, silent
from gymtrl.validation.settings import ValidateSettings
from gymtrl.workspace.artefact import Draft, artefact, sha256_of

_ROLLOUTS_MADE_WITH = {*CollectSettings.model_fields, "backend", "baseline", "endpoint", "endpoint_model", "server"}
_SHOWN_LEAKS = 3
_ANYWAY = "or pass --no-leak-check to validate all the same"
_SHARED = {"task_key": "prompt and tools", "input_key": "input row", "text": "question", "cluster": "cluster"}


def model_folder(path: Path) -> Path:
    """Returns the folder that is served: `path` itself, or the merged model or the adapter of a training run.

    Raises:
        UserError: None of them is there.
    """
    for folder in (path / "model", path, path / "adapter"):
        if (folder / "config.json").is_file() or (folder / "adapter_config.json").is_file():
            return folder
    remedy = "give a model folder, an adapter folder, or the folder that 'gymtrl train' wrote"
    raise UserError(f"{path} {'holds no model' if path.exists() else 'does not exist'}", remedy=remedy)


def candidate(checkpoint: Path | None, settings: ValidateSettings) -> Path | Hosted:
    """Returns what is validated: a folder that is served, or a model at an endpoint that runs already.

    Raises:
        UserError: There is none, or more than one.
    """
    if settings.endpoint is None:
        if checkpoint is None:
            raise UserError("nothing to validate", remedy="give a checkpoint, or --endpoint and --endpoint-model")
        return model_folder(checkpoint)
    if checkpoint is not None:
        raise UserError("a checkpoint and --endpoint are two candidates", remedy="leave one of them out")
    if settings.endpoint_model is None:
        raise UserError("--endpoint does not say which model", remedy="name it with --endpoint-model")
    return Hosted(settings.endpoint, settings.endpoint_model)


def validate_inputs(checkpoint: Path | None, settings: ValidateSettings) -> list[Path]:
    """Returns what a validation reads: the checkpoint's model if any, the baseline's model or rollouts, the tasks.

    Raises:
        UserError: One of them is missing.
    """
    if settings.tasks is None:
        remedy = "give --tasks, such as the heldout_inputs.jsonl that filter wrote"
        raise UserError("no tasks to validate on", remedy=remedy)
    if not settings.tasks.is_file():
        raise UserError(f"{settings.tasks} does not exist", remedy="give a JSONL file of Gym tasks with --tasks")
    baseline, after = Path(settings.baseline), candidate(checkpoint, settings)
    before = baseline if baseline.is_file() else model_folder(baseline)
    return [*([after] if isinstance(after, Path) else []), before, settings.tasks]


def require_unseen(tasks: Path, checkpoint: Path | None, training: Sequence[Path] = ()) -> None:
    """Checks that none of the tasks was trained on, nor another of its cluster.

    Args:
        tasks (`Path`): JSONL of Gym input rows.
        checkpoint (`Path`, *optional*): Folder that `train` wrote, or a model folder; none where an endpoint is asked.
        training (`Sequence[Path]`, *optional*): What it was trained on as well, or in place of what its manifests name
            and is no longer there as it was.

    Raises:
        UserError: Some were, or it cannot be told what was trained on.
    """
    name = "the endpoint's model" if checkpoint is None else str(checkpoint)
    known = trained_on(checkpoint) if checkpoint is not None else []
    if not known and not training:
        raise UserError(
            f"nothing says which rollouts {name} was trained on, so tasks that it has seen cannot be told",
            remedy=f"name them, or the filter folder, with --training, {_ANYWAY}",
        )
    for path in training:
        if not path.exists():
            raise UserError(f"{path} does not exist", remedy="--training names a filter folder or rollouts")
    lost = [one for one in known if one.state != "as it was"]
    hashes = {sha256_of(path) for path in training} if lost else set()
    # What has another hash is not the same in a new place, but what the user knows to stand for it.
    lost = [one for one in lost if one.sha256 not in hashes and not hashes - {one.sha256 for one in known}]
    if lost:
        raise _cannot_tell(name, lost[0])
    for source in dict.fromkeys([*(one.path for one in known if one.state == "as it was"), *training]):
        leaks = find_leaks(tasks, source)
        if leaks:
            raise UserError(
                f"{len(leaks)} of the tasks in {tasks} were trained on, or others of their cluster: "
                f"{', '.join(_told(leak) for leak in leaks[:_SHOWN_LEAKS])}{', …' * (len(leaks) > _SHOWN_LEAKS)}",
                remedy=f"validate on held-out tasks, such as the heldout_inputs.jsonl of a filter folder, {_ANYWAY}",
            )


def _cannot_tell(name: str, lost: Origin) -> UserError:
    now = "is not there any more" if lost.state == "gone" else "has changed since"
    here = "" if lost.path.is_absolute() else "run from the folder where it was trained, or "
    if lost.kind == "model":
        return UserError(
            f"{name} goes back to {lost.path}, which {now}, so what that was trained on cannot be told",
            remedy=f"{here}name the rollouts of all its earlier training with --training, {_ANYWAY}",
        )
    return UserError(
        f"{name} was trained on {lost.path}, which {now}, so tasks that it has seen cannot be told",
        remedy=f"{here}name its new place, or rollouts that hold all of it, with --training, {_ANYWAY}",
    )


def _told(leak: Leak) -> str:
    return f"line {leak.line} has its {_SHARED[leak.by]} in common with {leak.rollout}"


def read_comparison(folder: Path) -> Comparison:
    """Reads the comparison that `compare` or `validate` wrote.

    Raises:
        UserError: There is none.
    """
    try:
        return msgspec.json.decode((folder / COMPARISON).read_bytes(), type=Comparison)
    except (OSError, msgspec.DecodeError):
        raise UserError(
            f"{folder} holds no comparison", remedy="give the folder that 'gymtrl compare' or 'validate' wrote (its -o)"
        ) from None


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
    checkpoint: Path | None,
    out: Path,
    settings: ValidateSettings,
    *,
    session: GymSession | None = None,
    progress: Progress = silent,
) -> Comparison:
    """Collects rollouts of the baseline and the checkpoint on held-out tasks, and compares them.

    Writes `before/rollouts.jsonl`, `after/rollouts.jsonl` with Gym's sidecars, and `comparison.json`. An interrupted
    validation goes on where it stopped, also where the rollouts are to be compared otherwise by now.

    Args:
        checkpoint (`Path`, *optional*): Model folder, adapter folder, or what `train` wrote; `None` where the settings
            name an endpoint.
        out (`Path`): Folder to write.
        settings (`ValidateSettings`): Tasks, baseline, sampling.
        session (`GymSession`, *optional*): A running session to use; else one is opened and closed.
        progress (`Progress`, *optional*): Told about waiting and collecting.

    Raises:
        UserError: Bad input. RunError: Gym or the endpoint failed.
    """
    inputs = validate_inputs(checkpoint, settings)
    after_model = candidate(checkpoint, settings)
    *_, before, task_file = inputs
    tasks = read_tasks(task_file)
    if settings.leak_check:
        require_unseen(task_file, checkpoint, settings.training or ())
    opened = artefact(
        out,
        verb="validate",
        settings=settings,
        inputs=inputs,
        resumable=True,
        resumed_by=_ROLLOUTS_MADE_WITH,
    )
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
        failed_before = like = None
        if before.is_dir():
            before_model, before = before, draft.path / "before" / "rollouts.jsonl"
            failed_before = session.collect(
                before_model, tasks, before, settings, name="before", served=settings
            ).failed
            like = before if isinstance(after_model, Path) else None
        after = draft.path / "after" / "rollouts.jsonl"
        collected = session.collect(after_model, tasks, after, settings, name="after", served=settings, like=like)
        comparison = relocated(compare_rollouts(before, [after], settings), draft.path, out)
        _write_comparison(comparison, draft)
        draft.extra |= {"tasks": len(tasks), "failed_before": failed_before, "failed_after": collected.failed}
        draft.extra |= {"served_before": served_by(before), "served_after": served_by(after)}
    return comparison


def _write_comparison(comparison: Comparison, draft: Draft) -> None:
    encoded = msgspec.json.format(msgspec.json.encode(comparison), indent=2)
    (draft.path / COMPARISON).write_bytes(encoded + b"\n")
    draft.extra |= {"verdict": comparison.verdict, "outcome": comparison.outcome}
