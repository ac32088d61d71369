"""What a training process is told, and what it tells: files of the folder that a run is made in."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

from gymtrl.training.plan import Plan

JOB, FAILURE, RESULT, CHANGES = "job.json", "failure.json", "result.json", "changes.json"
METRICS, CHECKPOINTS, LOCK = "metrics.jsonl", "checkpoints", ".worker.lock"

Kind = Literal["memory", "user", "run", "bug"]
EXIT: dict[Kind, int] = {"bug": 1, "user": 2, "run": 3, "memory": 75}
"""Exit status of a training process by what went wrong; it tells even where the disk is too full for a file."""


@dataclass(frozen=True)
class Job:
    """A run, as its processes need to know it.

    Attributes:
        objective (`str`): What is trained.
        settings (`dict[str, Any]`): As the user gave them.
        plan (`Plan`): The resolved numbers.
        dataset (`str`): Dataset folder.
        base (`str`): Folder or hub id of the model.
    """

    objective: str
    settings: dict[str, Any]
    plan: Plan
    dataset: str
    base: str

    def with_plan(self, plan: Plan) -> Job:
        """The same job by other numbers."""
        return replace(self, plan=plan)


@dataclass(frozen=True)
class Failure:
    """Why a training process ended.

    Attributes:
        kind (`str`): `memory`, the `user`'s to mend, the `run`'s, or a `bug`.
        message (`str`): What went wrong.
        remedy (`str`, *optional*): What to do.
        at (`str`): What it was doing: `loading`, `training`, `measuring` or `saving`.
    """

    kind: Kind
    message: str
    remedy: str | None
    at: str


@dataclass(frozen=True)
class Change:
    """A measure that was taken because memory ran out.

    Attributes:
        step (`int`): Steps that were done by then.
        measure (`str`): In words.
        reason (`str`): What ran out, where.
        plan (`Plan`): The numbers from then on.
    """

    step: int
    measure: str
    reason: str
    plan: Plan


@dataclass(frozen=True)
class Outcome:
    """What a finished run measured.

    Attributes:
        eval_before, eval_after (`float`, *optional*): Loss on validation rows: mean over rows of their mean a token.
        resumed_from (`int`, *optional*): Step from which an interrupted run was continued.
        processes (`int`): Processes that trained.
        peak_memory (`int`): Bytes of main memory that a process held at most.
    """

    eval_before: float | None
    eval_after: float | None
    resumed_from: int | None
    processes: int
    peak_memory: int


def write_json(path: Path, value: Any) -> None:
    """Writes a dataclass, or a list of them, whole or not at all."""
    content = [asdict(item) for item in value] if isinstance(value, list) else asdict(value)
    partial = path.with_name(f".{path.name}")
    partial.write_text(json.dumps(content, indent=1), encoding="utf-8")
    partial.replace(path)


def read_job(folder: Path) -> Job:
    """Reads the job of a folder."""
    found = json.loads((folder / JOB).read_text(encoding="utf-8"))
    return Job(**found | {"plan": Plan(**found["plan"])})


def read_failure(folder: Path) -> Failure | None:
    """Reads why the last process ended, where it could say so."""
    path = folder / FAILURE
    try:
        return Failure(**json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError):
        return None


def read_changes(folder: Path) -> list[Change]:
    """Reads the measures that were taken so far."""
    path = folder / CHANGES
    if not path.is_file():
        return []
    found = json.loads(path.read_text(encoding="utf-8"))
    return [Change(**entry | {"plan": Plan(**entry["plan"])}) for entry in found]


def read_outcome(folder: Path) -> Outcome:
    """Reads what a finished run measured."""
    return Outcome(**json.loads((folder / RESULT).read_text(encoding="utf-8")))
