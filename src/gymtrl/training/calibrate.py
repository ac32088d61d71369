"""How fast a run will be: the longest rows, trained on for a few steps by as many processes as the run will have.

Run as: python -m gymtrl.training.calibrate FOLDER, where FOLDER holds a `job.json`; or so by torchrun
"""

from __future__ import annotations

import json
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
from gymtrl.processes import Supervised
from gymtrl.training.data import Sequence
from gymtrl.training.job import CHECKPOINTS, JOB, Failure, Job, failure_file, first_failure, read_job, write_json
from gymtrl.training.launch import Launch, worker_command, worker_environment
from gymtrl.training.quiet import quiet

if TYPE_CHECKING:
    from datasets import Dataset

STEPS = 3
"""The first warms up; the faster of the others counts."""


_SPEED = "speed.json"


@dataclass(frozen=True)
class Speed:
    """What a calibration measured.

    Attributes:
        tokens_per_second (`float`): Of all processes of one machine together, on the longest rows.
        processes (`int`): So many they were.
        peak_memory (`int`): Bytes that the first held at most, Python and its libraries included.
    """

    tokens_per_second: float
    processes: int
    peak_memory: int

    def seconds(self, tokens: int, nodes: int) -> float:
        """Time that so many tokens take to train on; no bound, as short rows are cheaper by attention and dearer by
        what every row costs."""
        return tokens / self.tokens_per_second / nodes


def calibrate(job: Job, launch: Launch) -> Speed:
    """Trains on the longest rows for a few steps, and throws away what was trained.

    Args:
        job (`Job`): The run that is planned.
        launch (`Launch`): Its processes. Those of one node are started, on this machine.

    Raises:
        RunError: It failed, as where memory is short.
    """
    here = replace(launch, processes=launch.per_node, nodes=1)
    with tempfile.TemporaryDirectory(prefix="gymtrl-plan-") as name:
        folder = Path(name)
        write_json(folder / JOB, job.with_plan(replace(job.plan, processes=here.processes)))
        command = worker_command(folder, here, module=__name__)
        with Supervised(command, log=folder / "log", env=worker_environment(here), grace=5.0) as process:
            while (code := process.exit_code()) is None:
                time.sleep(0.1)
        if not code:
            return Speed(**json.loads((folder / _SPEED).read_text()))
        failure = first_failure(folder)
        ended = f"a process ended with status {code}, as where memory is short"
    raise RunError(
        f"a few steps on the longest rows failed: {failure.message if failure is not None else ended}",
        remedy="plan with --no-calibrate, or with a smaller micro_batch",
    )


def measure(folder: Path) -> Speed:
    """Measures the job of a folder, in this process."""
    from gymtrl.training.data import load_rows, read_dataset
    from gymtrl.training.objectives import OBJECTIVES
    from gymtrl.training.progress import peak_memory
    from gymtrl.training.worker import make_trainer

    job = read_job(folder)
    objective = OBJECTIVES[job.objective]  # type: ignore[index]
    plan = replace(job.plan, accumulation=1, steps=STEPS)
    settings = objective.settings.model_validate(job.settings | {"max_steps": STEPS, "report_to": []})
    data = read_dataset(Path(job.dataset), objective.made_by, objective.sequences)
    rows = load_rows(data.train.files, objective.columns, folder / "rows")
    lengths = row_tokens(rows, objective.sequences)
    longest = np.resize(np.argsort(lengths)[::-1], plan.micro_batch * plan.processes)
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
    return Speed(float(lengths[longest].sum()) / fastest, plan.processes, peak_memory())


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


def main(folder: Path) -> int:
    """Measures what `folder` asks for, and writes it there. Returns the exit status."""
    from gymtrl.training.progress import is_first_process

    try:
        found = measure(folder)
    except Exception as error:  # whatever it is, the process that started this one has to hear of it
        write_json(
            folder / failure_file(), Failure("run", f"{type(error).__name__}: {error}", None, "a plan", time.time())
        )
        return 1
    if is_first_process():
        write_json(folder / _SPEED, found)
    return 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
