"""`gymtrl train`"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Literal

import typer

from gymtrl.cli.options import Out, Stage, default_out, stage_options
from gymtrl.cli.plan import preview
from gymtrl.training.settings import TrainDpoSettings, TrainGrpoSettings, TrainKtoSettings, TrainSftSettings

Dataset = Annotated[Path, typer.Argument(help="Folder that 'format' wrote for this objective.")]


Emit = Annotated[
    Literal["slurm"] | None,
    typer.Option("--emit", help="Print a job script for many nodes, in place of training.", show_default=False),
]
Hours = Annotated[float, typer.Option("--hours", min=0.5, help="Time limit of the job, for --emit.")]


def register(app: typer.Typer) -> None:
    """Adds the verb."""
    group = typer.Typer(no_args_is_help=True, rich_markup_mode=None, help="Train on a dataset with TRL.")
    for verb in (sft, dpo, kto, grpo):
        group.command(verb.__name__)(verb)
    app.add_typer(group, name="train")


@stage_options(TrainSftSettings, "train sft", preview=preview)
def sft(dataset: Dataset, out: Out = None, emit: Emit = None, hours: Hours = 24.0, *, stage: Stage) -> None:
    """Fine-tune on good rollouts; resumes after an interruption; writes an adapter and a merged model."""
    _train("sft", dataset, out, emit, hours, stage)


@stage_options(TrainDpoSettings, "train dpo", preview=preview)
def dpo(dataset: Dataset, out: Out = None, emit: Emit = None, hours: Hours = 24.0, *, stage: Stage) -> None:
    """Prefer the good rollout of each pair to the bad one."""
    _train("dpo", dataset, out, emit, hours, stage)


@stage_options(TrainKtoSettings, "train kto", preview=preview)
def kto(dataset: Dataset, out: Out = None, emit: Emit = None, hours: Hours = 24.0, *, stage: Stage) -> None:
    """Make good rollouts likelier and bad ones less likely, without pairs."""
    _train("kto", dataset, out, emit, hours, stage)


@stage_options(TrainGrpoSettings, "train grpo", preview=preview)
def grpo(dataset: Dataset, out: Out = None, emit: Emit = None, hours: Hours = 24.0, *, stage: Stage) -> None:
    """Learn from recorded groups of rollouts by their rewards; experimental."""
    _train("grpo", dataset, out, emit, hours, stage)


def _train(name: str, dataset: Path, out: Path | None, emit: str | None, hours: float, stage: Stage) -> None:
    folder = out or default_out([dataset], "trained")
    if emit is not None:
        from gymtrl.training.prepare import checked
        from gymtrl.training.slurm import job_script

        checked(dataset, stage.settings)
        print(job_script(sys.argv[1:], stage.settings, name=folder.name, hours=hours), end="")
        return
    from rich.console import Console

    from gymtrl.cli.run import run_stage
    from gymtrl.pipeline.steps import train_step
    from gymtrl.reports.training import read_run, render_run

    step = train_step(name, dataset, folder, stage.settings)
    run_stage(
        step.folder,
        verb=step.verb,
        settings=step.settings,
        inputs=step.inputs(),
        work=lambda: step.work(Console(stderr=True)),
        as_json=stage.json,
        finish=step.finish,
        show=lambda: render_run(read_run(step.folder), step.folder),
    )
