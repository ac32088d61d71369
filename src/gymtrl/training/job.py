"""What a training process is told, and what it tells: files of the folder that a run is made in."""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

from gymtrl.doctor.run import DataFacts, RunRecord
from gymtrl.training.plan import Plan

JOB, RESULT, CHANGES, FINDINGS = "job.json", "result.json", "changes.json", "findings.json"
METRICS, CHECKPOINTS, LOCK, OUTCOME = "metrics.jsonl", "checkpoints", ".worker.lock", "outcome.json"

Kind = Literal["memory", "disk", "user", "run", "bug"]
EXIT: dict[Kind, int] = {"bug": 1, "user": 2, "run": 3, "disk": 74, "memory": 75}
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
        data (`DataFacts`): Of its training rows.
    """

    objective: str
    settings: dict[str, Any]
    plan: Plan
    dataset: str
    base: str
    data: DataFacts

    def record(self) -> RunRecord:
        """What is known of the run before it begins, for the rules of `doctor`."""
        return RunRecord(
            objective=self.objective,
            method=self.plan.method,
            dataset=self.dataset,
            data=self.data,
            planned_steps=self.plan.steps,
            effective_batch=self.plan.effective_batch,
            learning_rate=self.plan.learning_rate,
            desirable_weight=self.settings.get("desirable_weight"),
            undesirable_weight=self.settings.get("undesirable_weight"),
            stop_ratio=self.settings.get("stop_ratio"),
            stop_kl=self.settings.get("stop_kl"),
        )

    def with_plan(self, plan: Plan) -> Job:
        """The same job by other numbers."""
        return replace(self, plan=plan)


@dataclass(frozen=True)
class Failure:
    """Why a training process ended.

    Attributes:
        kind (`str`): `memory` or `disk` that is full, the `user`'s to mend, the `run`'s, or a `bug`.
        message (`str`): What went wrong.
        remedy (`str`, *optional*): What to do.
        at (`str`): What it was doing: `loading`, `training`, `measuring` or `saving`.
        time (`float`): When, in seconds since 1970; of several processes the first knows the reason.
    """

    kind: Kind
    message: str
    remedy: str | None
    at: str
    time: float


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
        steps (`int`): Optimizer steps that were taken.
        eval_before, eval_after (`float`, *optional*): Loss on validation rows: mean over rows of their mean a token.
        resumed_from (`int`, *optional*): Step from which an interrupted run was continued.
        processes (`int`): Processes that trained.
        peak_memory (`int`): Bytes that the first process held at most, of the GPU where it had one.
        stopped (`str`, *optional*): Why training ended before its last step.
        parameters (`dict[str, int]`): Weights and layers, as `RunRecord` counts them.
    """

    steps: int
    eval_before: float | None
    eval_after: float | None
    resumed_from: int | None
    processes: int
    peak_memory: int
    stopped: str | None
    parameters: dict[str, int]


def write_json(path: Path, value: Any) -> None:
    """Writes a dataclass, or a list of them, whole or not at all."""
    content = [asdict(item) for item in value] if isinstance(value, list) else asdict(value)
    partial = path.with_name(f".{path.name}")
    partial.write_text(json.dumps(content, indent=1), encoding="utf-8")
    partial.replace(path)


def read_job(folder: Path) -> Job:
    """Reads the job of a folder."""
    found = json.loads((folder / JOB).read_text(encoding="utf-8"))
    return Job(**found | {"plan": Plan(**found["plan"]), "data": DataFacts(**found["data"])})


def failure_file() -> str:
    """Name of the file in which this process says why it ended; each of several has its own."""
    return f"failure-{os.environ.get('RANK', '0')}.json"


def failure_files(folder: Path) -> list[Path]:
    """The files in which processes said why they ended."""
    return sorted(folder.glob("failure-*.json"))


def first_failure(folder: Path) -> Failure | None:
    """Reads why the first process ended, where it could say so; the others lose the connection to it."""
    found = []
    for path in failure_files(folder):
        try:
            found.append(Failure(**json.loads(path.read_text(encoding="utf-8"))))
        except (OSError, ValueError):
            continue
    return min(found, key=lambda failure: failure.time, default=None)


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
