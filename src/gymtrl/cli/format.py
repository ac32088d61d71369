"""`gymtrl format`"""

from __future__ import annotations

from itertools import count
from pathlib import Path
from typing import Annotated

import typer

from gymtrl.cli.options import Out, Stage, default_out, stage_options
from gymtrl.formats.settings import FormatSftSettings


def register(app: typer.Typer) -> None:
    """Adds the verb."""
    group = typer.Typer(no_args_is_help=True, rich_markup_mode=None, help="Make a TRL dataset from filtered rollouts.")
    group.command("sft")(sft)
    app.add_typer(group, name="format")


@stage_options(FormatSftSettings, "format sft")
def sft(
    source: Annotated[Path, typer.Argument(help="Folder that filter wrote, or a rollouts file (JSONL).")],
    out: Out = None,
    show: Annotated[int, typer.Option("--show", help="Print this many rows with the trained tokens coloured.")] = 0,
    *,
    stage: Stage,
) -> None:
    """Make a dataset for supervised fine-tuning: exactly the tokens that the policy produced carry loss."""
    from gymtrl.cli.run import run_stage
    from gymtrl.formats.sft import format_sft
    from gymtrl.formats.source import format_inputs
    from gymtrl.reports.progress import watch

    folder = out or default_out([source], "sft")

    def work() -> None:
        rows = count(1)
        with watch() as progress:
            format_sft(source, folder, stage.settings, on_row=lambda: progress("rows", next(rows), 0))

    run_stage(
        folder,
        verb="format sft",
        settings=stage.settings,
        inputs=format_inputs(source, stage.settings),
        work=work,
        as_json=stage.json,
    )
    if show:
        from rich.console import Console

        from gymtrl.formats.show import show as show_rows
        from gymtrl.models.fingerprint import load_tokenizer

        tokenizer = load_tokenizer(stage.settings.model, trust_remote_code=stage.settings.trust_remote_code)
        show_rows(folder, tokenizer, show, Console(stderr=stage.json))
