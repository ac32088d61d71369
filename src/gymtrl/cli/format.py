"""`gymtrl format`: a TRL dataset from rollouts."""

from __future__ import annotations

from collections.abc import Callable
from itertools import count
from pathlib import Path
from typing import Annotated, Any

import typer

from gymtrl.cli.options import Out, Stage, default_out, stage_options
from gymtrl.formats.settings import (
    FormatDpoSettings,
    FormatGrpoSettings,
    FormatKtoSettings,
    FormatRewardSettings,
    FormatSftSettings,
)

Filtered = Annotated[Path, typer.Argument(help="Folder that filter wrote, or a rollouts file (JSONL).")]
Pool = Annotated[
    Path,
    typer.Argument(
        help="Folder that filter wrote: what it kept is good, what lies below its threshold bad. Or rollouts: a JSONL "
        "file, a folder of them, or a table that inspect wrote."
    ),
]
Show = Annotated[int, typer.Option("--show", help="Print this many rows with the trained tokens coloured.")]
Page = Annotated[
    Path | None,
    typer.Option("--html", help="Write a page that shows rows with the trained tokens coloured.", show_default=False),
]

_ROWS_OF_A_PAGE = 20


def register(app: typer.Typer) -> None:
    """Adds the verb."""
    group = typer.Typer(no_args_is_help=True, rich_markup_mode=None, help="Make a TRL dataset from rollouts.")
    for verb in (sft, dpo, kto, grpo, reward):
        group.command(verb.__name__)(verb)
    app.add_typer(group, name="format")


@stage_options(FormatSftSettings, "format sft")
def sft(source: Filtered, out: Out = None, show: Show = 0, html: Page = None, *, stage: Stage) -> None:
    """Make a dataset for supervised fine-tuning: exactly the tokens that the policy produced carry loss."""
    from gymtrl.formats.sft import format_sft

    _format(format_sft, "sft", source, out, show, html, stage)


@stage_options(FormatDpoSettings, "format dpo")
def dpo(source: Pool, out: Out = None, show: Show = 0, html: Page = None, *, stage: Stage) -> None:
    """Make pairs of a good and a bad rollout of the same task, for DPO."""
    from gymtrl.formats.preference import format_dpo

    _format(format_dpo, "dpo", source, out, show, html, stage)


@stage_options(FormatKtoSettings, "format kto")
def kto(source: Pool, out: Out = None, show: Show = 0, html: Page = None, *, stage: Stage) -> None:
    """Make a dataset of good and bad rollouts for KTO, with weights that balance them."""
    from gymtrl.formats.unpaired import format_kto

    _format(format_kto, "kto", source, out, show, html, stage)


@stage_options(FormatGrpoSettings, "format grpo")
def grpo(source: Pool, out: Out = None, show: Show = 0, html: Page = None, *, stage: Stage) -> None:
    """Choose prompts for online GRPO by their logged pass rate, or put recorded groups together."""
    from gymtrl.formats.grpo import format_grpo

    _format(format_grpo, "grpo", source, out, show, html, stage)


@stage_options(FormatRewardSettings, "format reward")
def reward(source: Pool, out: Out = None, show: Show = 0, html: Page = None, *, stage: Stage) -> None:
    """Make pairs of whole trajectories for a reward model."""
    from gymtrl.formats.preference import format_reward

    _format(format_reward, "reward", source, out, show, html, stage)


def _format(
    write: Callable[..., Any], name: str, source: Path, out: Path | None, show: int, html: Path | None, stage: Stage
) -> None:
    from gymtrl.cli.run import run_stage
    from gymtrl.formats.source import format_inputs
    from gymtrl.reports.progress import watch
    from gymtrl.rollouts.outputs import check_output

    if html is not None:
        check_output(html, [source])
    folder = out or default_out([source], name)

    def work() -> None:
        rows = count(1)
        with watch() as progress:
            write(source, folder, stage.settings, on_row=lambda: progress("rows", next(rows), 0))

    run_stage(
        folder,
        verb=f"format {name}",
        settings=stage.settings,
        inputs=format_inputs(source, stage.settings),
        work=work,
        as_json=stage.json,
    )
    script = folder / "train_with_trl.py"
    if not stage.json and script.is_file():
        print(f"\n{script}:\n\n{script.read_text(encoding='utf-8')}")
    if show or html is not None:
        _show(folder, show, html, stage)


def _show(folder: Path, show: int, html: Path | None, stage: Stage) -> None:
    from rich.console import Console

    from gymtrl.formats.painted import painted_rows
    from gymtrl.models.fingerprint import load_tokenizer
    from gymtrl.reports.dataset import print_rows
    from gymtrl.reports.dataset_page import write_page

    tokenizer = load_tokenizer(stage.settings.model, trust_remote_code=stage.settings.trust_remote_code)
    if show:
        print_rows(painted_rows(folder, tokenizer, show), Console(stderr=stage.json))
    if html is not None:
        write_page(folder, painted_rows(folder, tokenizer, show or _ROWS_OF_A_PAGE), html)
