"""`gymtrl export`"""

from __future__ import annotations

from itertools import count
from pathlib import Path
from typing import Annotated

import typer

from gymtrl.cli.options import Out, Stage, default_out, stage_options
from gymtrl.exports.settings import ExportSettings


def register(app: typer.Typer) -> None:
    """Adds the verb."""
    app.command("export")(export)


@stage_options(ExportSettings, "export")
def export(
    dataset: Annotated[Path, typer.Argument(help="Dataset folder that format wrote.")],
    out: Out = None,
    *,
    stage: Stage,
) -> None:
    """Write a dataset for another trainer; rows that its format cannot hold are dropped with a reason.

    nemo-rl takes datasets for SFT and pairs; openai the same; tokens all that have token ids and a loss mask. Only
    tokens keeps the ids and the mask that were checked: the others hold messages, which the trainer tokenizes anew.
    """
    from gymtrl.cli.run import run_stage
    from gymtrl.exports.export import export_dataset
    from gymtrl.reports.progress import watch

    folder = out or default_out([dataset], f"export-{stage.settings.to}")

    def work() -> None:
        rows = count(1)
        with watch() as progress:
            export_dataset(dataset, folder, stage.settings, on_row=lambda: progress("rows", next(rows), 0))

    run_stage(folder, verb="export", settings=stage.settings, inputs=[dataset], work=work, as_json=stage.json)
