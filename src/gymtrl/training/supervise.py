"""Training in processes of its own, started again by other numbers where memory runs out."""

from __future__ import annotations

import json
import resource
import signal
import sys
import time
from pathlib import Path

from gymtrl.errors import RunError, UserError
from gymtrl.processes import Supervised
from gymtrl.training.job import (
    CHANGES,
    CHECKPOINTS,
    EXIT,
    FAILURE,
    JOB,
    METRICS,
    Change,
    Failure,
    Job,
    read_changes,
    read_failure,
    write_json,
)
from gymtrl.training.measures import next_measure
from gymtrl.training.objective import Objective

_KILLED = (128 + signal.SIGKILL, 128 + signal.SIGABRT, 128 + signal.SIGSEGV)
_AGAIN = "run it again to go on from the last checkpoint"


def train_in_processes(folder: Path, job: Job, objective: Objective) -> None:
    """Runs a job until it is done.

    What ran out of memory is started again, by the next measure of `measures.py`, from its last checkpoint;
    `changes.json` tells which were taken. A process that the kernel killed for memory is treated alike, which is why
    training does not run in this process.

    Args:
        folder (`Path`): Of the run in the making. Measures of an interrupted attempt, noted there, hold on.
        job (`Job`): What to train.
        objective (`Objective`): Its objective.

    Raises:
        UserError: The job cannot be trained as it is.
        RunError: Nothing is left to try, the disk is full, or a process ended without a word. What was trained is kept.
    """
    changes = read_changes(folder)
    if changes:
        job = job.with_plan(changes[-1].plan)
    while True:
        write_json(folder / JOB, job)
        (folder / FAILURE).unlink(missing_ok=True)
        killed_before = _kernel_kills()
        code = _run(folder)
        if code == 0:
            return
        failure = read_failure(folder) or _unsaid(code, killed_before)
        if failure.kind == "user":
            raise UserError(failure.message, remedy=failure.remedy)
        if failure.kind != "memory":
            raise RunError(failure.message, remedy=failure.remedy or _AGAIN)
        found = next_measure(job.plan, objective) if failure.at != "loading" else None
        if found is None:
            raise RunError(
                f"memory ran out in {failure.at}, and nothing is left to try: {failure.message}",
                remedy="train an adapter (method lora), a smaller model or shorter rows (format with --max-length)",
            )
        job = job.with_plan(found[0])
        changes.append(Change(_steps_done(folder), found[1], f"memory ran out in {failure.at}", found[0]))
        write_json(folder / CHANGES, changes)
        _note(folder, changes[-1])


def _run(folder: Path) -> int:
    command = [sys.executable, "-P", "-m", "gymtrl.training.worker", str(folder)]
    with Supervised(command, log=None, grace=5.0) as process:
        while (code := process.exit_code()) is None:
            time.sleep(0.1)
    return code


def _unsaid(code: int, killed_before: int) -> Failure:
    """What a process died of that could not say so."""
    limited = resource.getrlimit(resource.RLIMIT_AS)[0] != resource.RLIM_INFINITY
    if code == EXIT["memory"] or (code in _KILLED and (limited or _kernel_kills() > killed_before)):
        return Failure("memory", f"the process ended with status {code}", None, "training")
    return Failure("run", f"the training process ended with status {code}", None, "training")


def _kernel_kills() -> int:
    """Processes that the kernel has killed for memory so far, on this machine; 0 where it does not say."""
    try:
        for line in Path("/proc/vmstat").read_text().splitlines():
            name, _, value = line.partition(" ")
            if name == "oom_kill":
                return int(value)
    except (OSError, ValueError):
        pass
    return 0


def _steps_done(folder: Path) -> int:
    """Steps that the next attempt need not take again."""
    from gymtrl.training.checkpoints import last_sealed, step_of

    last = last_sealed(folder / CHECKPOINTS)
    return step_of(last) if last is not None else 0


def _note(folder: Path, change: Change) -> None:
    entry = {"step": change.step, "event": f"{change.reason}: {change.measure}"}
    with (folder / METRICS).open("a", encoding="utf-8") as stream:
        stream.write(json.dumps(entry) + "\n")
    print(f"memory: {change.reason}; {change.measure}; going on after step {change.step}", file=sys.stderr)
