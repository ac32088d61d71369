"""`gymtrl train`"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from gymtrl.cli.options import Out, Stage, default_out, stage_options
from gymtrl.training.settings import TrainSftSettings


def register(app: typer.Typer) -> None:
    """Adds the verb."""
    group = typer.Typer(no_args_is_help=True, rich_markup_mode=None, help="Train on a dataset with TRL.")
    group.command("sft")(sft)
    app.add_typer(group, name="train")


@stage_options(TrainSftSettings, "train sft")
def sft(
    dataset: Annotated[Path, typer.Argument(help="Folder that 'format sft' wrote.")],
    out: Out = None,
    *,
    stage: Stage,
) -> None:
    """Fine-tune with TRL's SFTTrainer; resumes after an interruption; writes an adapter and a merged model."""
    from gymtrl.cli.run import run_stage
    from gymtrl.training.sft import train_inputs, train_sft

    folder = out or default_out([dataset], "trained")
    run_stage(
        folder,
        verb="train sft",
        settings=stage.settings,
        inputs=train_inputs(dataset, stage.settings),
        work=lambda: train_sft(dataset, folder, stage.settings),
        as_json=stage.json,
    )
