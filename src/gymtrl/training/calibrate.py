"""How fast a run will be: the longest rows, trained on for a few steps in a process of their own.

Run as: python -m gymtrl.training.calibrate FOLDER, where FOLDER holds a `job.json`
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from gymtrl.errors import RunError
from gymtrl.training.data import Sequence
from gymtrl.training.job import CHECKPOINTS, JOB, Job, read_job, write_json
from gymtrl.training.launch import Launch, worker_environment
from gymtrl.training.quiet import quiet

if TYPE_CHECKING:
    from datasets import Dataset

STEPS = 3
"""The first warms up; the faster of the others counts."""


@dataclass(frozen=True)
class Speed:
    """What a calibration measured.

    Attributes:
        tokens_per_second (`float`): Of one process, on the longest rows.
        peak_memory (`int`): Bytes that it held at most, Python and its libraries included.
    """

    tokens_per_second: float
    peak_memory: int

    def seconds(self, tokens: int, processes: int) -> float:
        """Time for so many tokens; an upper bound, since attention costs shorter rows less."""
        return tokens / self.tokens_per_second / processes


def calibrate(job: Job) -> Speed:
    """Trains on the longest rows for a few steps, and throws away what was trained.

    Args:
        job (`Job`): The run that is planned.

    Raises:
        RunError: It failed, as where memory is short.
    """
    with tempfile.TemporaryDirectory(prefix="gymtrl-plan-") as folder:
        write_json(Path(folder) / JOB, job)
        command = [sys.executable, "-P", "-m", "gymtrl.training.calibrate", folder]
        environment = worker_environment(Launch(processes=1, cuda=job.plan.cuda))
        done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    if done.returncode:
        told = done.stderr.strip().splitlines() or [f"status {done.returncode}"]
        raise RunError(
            f"a few steps on the longest rows failed: {told[-1]}",
            remedy="plan with --no-calibrate, or with a smaller micro_batch",
        )
    return Speed(**json.loads(done.stdout.splitlines()[-1]))


def measure(folder: Path) -> Speed:
    """Measures the job of a folder, in this process."""
    from gymtrl.training.data import load_rows, read_dataset
    from gymtrl.training.objectives import OBJECTIVES
    from gymtrl.training.progress import peak_memory
    from gymtrl.training.worker import make_trainer

    job = read_job(folder)
    objective = OBJECTIVES[job.objective]  # type: ignore[index]
    plan = replace(job.plan, accumulation=1, processes=1, steps=STEPS)
    settings = objective.settings.model_validate(job.settings | {"max_steps": STEPS, "report_to": []})
    data = read_dataset(Path(job.dataset), objective.made_by, objective.sequences)
    rows = load_rows(data.train.files, objective.columns, folder / "rows")
    lengths = row_tokens(rows, objective.sequences)
    longest = np.argsort(lengths)[::-1][: plan.micro_batch]
    if "reward" in objective.columns:
        trainer_of = objective.trainer
        objective = replace(objective, trainer=lambda parts: trainer_of(replace(parts, train=_one_group(parts.train))))
    times: list[float] = []
    with quiet():
        trainer: Any = make_trainer(
            replace(job, plan=plan), objective, settings, data, folder / CHECKPOINTS, only=[*longest] * STEPS
        )
        step = trainer.training_step

        def timed(*arguments: Any, **named: Any) -> Any:
            times.append(time.monotonic())
            return step(*arguments, **named)

        trainer.training_step = timed
        trainer.args.save_strategy = "no"
        trainer.train()
        times.append(time.monotonic())
    fastest = min(after - before for before, after in pairwise(times[1:]))
    return Speed(float(lengths[longest].sum()) / fastest, peak_memory())


def row_tokens(rows: Dataset, sequences: Iterable[Sequence]) -> np.ndarray[Any, Any]:
    """Counts the tokens of each row, of all its sequences; what two of them begin with counts twice.

    Args:
        rows (`Dataset`): Rows of a dataset folder.
        sequences (`Iterable[Sequence]`): What each gives the model.
    """
    columns = [name for sequence in sequences for name in sequence.ids]
    counted: np.ndarray[Any, Any] = np.sum([[len(ids) for ids in rows[name]] for name in columns], axis=0)
    return counted


def _one_group(rows: Dataset) -> Dataset:
    """The rows as one group whose rewards differ: one in which they do not is not trained on."""
    bare = rows.remove_columns(["group", "reward"])
    return bare.add_column("group", ["0"] * len(rows)).add_column("reward", [float(at % 2) for at in range(len(rows))])


if __name__ == "__main__":
    found = measure(Path(sys.argv[1]))
    print(json.dumps({"tokens_per_second": found.tokens_per_second, "peak_memory": found.peak_memory}))
