"""A run on many nodes, as a Slurm job.

The job is one `gymtrl train` on its first node, the same that one machine would run: it checks, plans, watches, answers
a shortage of memory and writes the result. Only its worker command differs: `srun` starts torchrun on every node, and
the processes meet on the first. So a job needs no steps before or after training, and a run that was cut off at the
time limit, or by a node that failed, goes on when the job starts again.
"""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from gymtrl.errors import RunError, UserError
from gymtrl.training.launch import Launch
from gymtrl.training.settings import TrainSettings

RESTARTS = 50
"""Times that a job starts itself again; without an end, a run that cannot save within the time limit would go on."""

_OWN_OPTIONS = ("--emit", "--hours")

_SCRIPT = """\
#!/bin/bash
{options}
# Submit it from a shell in which gymtrl works: sbatch [--account=...] [--partition=...] THIS_FILE
# The folders must lie on a disk that all nodes see. Five minutes before the time limit the run is stopped and the job
# queued again; it goes on from the last checkpoint.
set -u
cd -- {folder} || exit 3

limit=
trap 'limit=near; kill -TERM "$run"' USR1
trap 'kill -TERM "$run"' TERM

{command} &
run=$!
wait "$run"
status=$?
wait "$run" 2>/dev/null  # a signal cuts the first short
if [ -n "$limit" ] && [ "${{SLURM_RESTART_COUNT:-0}}" -lt {restarts} ]; then
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$status"
"""


def job_script(words: Sequence[str], settings: TrainSettings, *, name: str, hours: float) -> str:
    """The job script that runs a command of `gymtrl train` on many nodes.

    Args:
        words (`Sequence[str]`): The command's words after `gymtrl`; those that asked for this script are left out.
        settings (`TrainSettings`): What they came to.
        name (`str`): Of the job.
        hours (`float`): Time limit of one start.
    """
    kept, skip = [], False
    for word in words:
        if not skip and word.partition("=")[0] not in _OWN_OPTIONS:
            kept.append(word)
        skip = not skip and word in _OWN_OPTIONS
    # Written where there may be no GPU, for nodes that have them.
    cuda = not settings.trl.get("use_cpu")
    launch = Launch(processes=settings.nproc, cuda=cuda, nodes=settings.nodes, engine=settings.engine)
    return slurm_script(kept, launch, name=name, folder=Path.cwd(), hours=hours)


def slurm_script(arguments: Sequence[str], launch: Launch, *, name: str, folder: Path, hours: float) -> str:
    """Writes the job script of a run.

    Args:
        arguments (`Sequence[str]`): Of `gymtrl`, from `train` on, with the processes and nodes of `launch` among them.
        launch (`Launch`): The processes.
        name (`str`): Of the job; what Slurm could read as anything else is left out of it.
        folder (`Path`): Working folder, to which relative paths in `arguments` belong.
        hours (`float`): Time limit of one start.

    Returns:
        `str`: A bash script for `sbatch`.
    """
    minutes = max(1, round(hours * 60))
    options = {
        "job-name": re.sub(r"[^A-Za-z0-9._-]+", "-", name).strip("-") or "gymtrl",
        "nodes": str(launch.nodes),
        "ntasks-per-node": "1",
        "exclusive": "",
        "mem": "0",
        "time": f"{minutes // 60}:{minutes % 60:02}:00",
        "output": "%x-%j.log",
        "open-mode": "append",
        "requeue": "",
        "signal": "B:USR1@300",
    }
    if launch.cuda:
        options["gpus-per-node"] = str(launch.per_node)
    lines = [f"#SBATCH --{key}={value}" if value else f"#SBATCH --{key}" for key, value in options.items()]
    return _SCRIPT.format(
        options="\n".join(lines),
        folder=shlex.quote(str(folder.absolute())),
        command=shlex.join([sys.executable, "-m", "gymtrl", *arguments]),
        restarts=RESTARTS,
    )


def meeting_point() -> tuple[str, int]:
    """Where the processes of a Slurm job meet: its first node, and a port that jobs beside it hardly share.

    Returns:
        `tuple[str, int]`: Host and port for `Launch`.

    Raises:
        UserError: This is no Slurm job.
        RunError: Slurm does not tell the job's nodes.
    """
    nodes, job = os.environ.get("SLURM_JOB_NODELIST"), os.environ.get("SLURM_JOB_ID", "")
    if not nodes or not job.isdecimal():
        raise UserError(
            "several nodes are started by Slurm, and this is no Slurm job",
            remedy="write a job script with --emit slurm and submit it with sbatch",
        )
    try:
        told = subprocess.run(["scontrol", "show", "hostnames", nodes], capture_output=True, text=True, check=True)
        return told.stdout.split()[0], 20_000 + int(job) % 20_000
    except (OSError, subprocess.CalledProcessError, IndexError) as error:
        raise RunError(
            f"scontrol does not tell the nodes of job {job}: {error}", remedy="run 'scontrol show hostnames' in the job"
        ) from error
