"""Training in processes of its own, started again by other numbers where memory runs out."""

from __future__ import annotations

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
    JOB,
    METRICS,
    Change,
    Failure,
    Job,
    failure_files,
    first_failure,
    read_changes,
    write_json,
)
from gymtrl.training.launch import Launch, worker_command, worker_environment
from gymtrl.training.measures import next_measure
from gymtrl.training.objective import Objective
from gymtrl.training.space import Room, disk_full
from gymtrl.workspace.metrics import append_metrics

_KILLED = (128 + signal.SIGKILL, 128 + signal.SIGABRT, 128 + signal.SIGSEGV)
_AGAIN = "run it again to go on from the last checkpoint"
_SMALLER = "train an adapter (method lora), a smaller model or shorter rows (format with --max-length)"
_AFTER_TRAINING = {
    "measuring": "free memory and run it again, as training itself is done; or format without validation rows",
    "saving": "free main memory, which the whole model takes in 32 bits, and run it again: only the export is left",
}
"""What to do where memory ran out after the last step, so that no smaller step helps."""


def train_in_processes(folder: Path, job: Job, objective: Objective, launch: Launch, room: Room) -> None:
    """Runs a job until it is done.

    What ran out of memory is started again, by the next measure of `measures.py`, from its last checkpoint;
    `changes.json` tells which were taken. A process that the kernel killed for memory is treated alike, which is why
    training does not run in this process. After the last step no measure helps, but a process that did not train does.

    Args:
        folder (`Path`): Of the run in the making. Measures of an interrupted attempt, noted there, hold on.
        job (`Job`): What to train.
        objective (`Objective`): Its objective.
        launch (`Launch`): Its processes.
        room (`Room`): Disk space that it needs, for the message where that ends.

    Raises:
        UserError: The job cannot be trained as it is.
        RunError: Nothing is left to try, the disk is full, or a process ended without a word. What was trained is kept.
    """
    from gymtrl.training.checkpoints import drop_torn, is_final, last_sealed, step_of

    changes = read_changes(folder)
    if changes:
        job = job.with_plan(changes[-1].plan)
    repeated: set[str] = set()
    while True:
        write_json(folder / JOB, job)
        for path in failure_files(folder):
            path.unlink()
        drop_torn(folder / CHECKPOINTS)
        killed_before = _kernel_kills()
        code = _run(folder, launch)
        if code == 0:
            return
        failure = first_failure(folder)
        if failure is None or failure.kind == "bug":
            at = failure.at if failure is not None else "training"
            failure = _killed(code, launch, at, by_kernel=_kernel_kills() > killed_before) or failure
        if code == EXIT["disk"] or (failure is not None and failure.kind == "disk"):
            raise disk_full(folder, room, failure.message if failure is not None else None)
        if failure is None:
            raise RunError(f"the training process ended with status {code}", remedy=_AGAIN)
        if failure.kind == "user":
            raise UserError(failure.message, remedy=failure.remedy)
        if failure.kind != "memory":
            raise RunError(failure.message, remedy=failure.remedy or _AGAIN)
        last = last_sealed(folder / CHECKPOINTS)
        at = "saving" if last is not None and is_final(last) else failure.at
        if at in _AFTER_TRAINING and at not in repeated:
            repeated.add(at)  # a process that did not train holds no optimizer
            print(f"memory: memory ran out in {at}; once more in a fresh process", file=sys.stderr)
            continue
        found = next_measure(job.plan, objective) if at == "training" else None
        if found is None:
            raise RunError(
                f"memory ran out in {at}, and nothing is left to try: {failure.message}",
                remedy=_AFTER_TRAINING.get(at, _SMALLER),
            )
        job = job.with_plan(found[0])
        done = step_of(last) if last is not None else 0
        changes.append(Change(done, found[1], f"memory ran out in {at}", found[0]))
        write_json(folder / CHANGES, changes)
        _note(folder, changes[-1])


def _run(folder: Path, launch: Launch) -> int:
    command, environment = worker_command(folder, launch), worker_environment(launch)
    with Supervised(command, env=environment, grace=5.0) as process:
        while (code := process.exit_code()) is None:
            time.sleep(0.1)
    return code


def _killed(code: int, launch: Launch, at: str, *, by_kernel: bool) -> Failure | None:
    """A lack of memory that no process could tell of, or that others took for a lost connection."""
    limited = resource.getrlimit(resource.RLIMIT_AS)[0] != resource.RLIM_INFINITY
    # One of several that the kernel killed says nothing, and the others only that they lost it.
    died = code in _KILLED or launch.processes > 1
    if code == EXIT["memory"] or (died and by_kernel) or (code in _KILLED and limited):
        return Failure("memory", f"the process ended with status {code}", None, at, 0.0)
    return None


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


def _note(folder: Path, change: Change) -> None:
    append_metrics(folder / METRICS, {"step": change.step, "event": f"{change.reason}: {change.measure}"})
    print(f"memory: {change.reason}; {change.measure}; going on after step {change.step}", file=sys.stderr)
