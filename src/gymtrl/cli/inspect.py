"""`gymtrl inspect`"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from typing import Annotated

import typer

from gymtrl.cli.options import Json
from gymtrl.errors import UserError
from gymtrl.text import plain


def register(app: typer.Typer) -> None:
    """Adds the verb."""
    app.command("inspect")(inspect_)


def inspect_(
    rollouts: Annotated[
        list[Path] | None,
        typer.Argument(
            help="Rollout files (JSONL), folders of them, or quoted patterns; '-' reads standard input. "
            "A table that --table wrote is taken as it is, without reading the files again.",
            show_default=False,
        ),
    ] = None,
    html: Annotated[
        Path | None,
        typer.Option(
            "--html",
            help="Write a page to read in a browser, with everything in it: all figures, and rollouts step by step.",
            show_default=False,
        ),
    ] = None,
    examples: Annotated[
        int,
        typer.Option(
            "--examples",
            min=0,
            help="Rollouts in the page: a good and a bad one a task where there are both, and rejected lines.",
        ),
    ] = 60,
    row: Annotated[
        str | None,
        typer.Option(
            "--row",
            metavar="FILE:LINE",
            help="Show this line only, as the policy saw it. Views name lines like this, so that they can be copied.",
            show_default=False,
        ),
    ] = None,
    table: Annotated[
        Path | None,
        typer.Option(
            "--table",
            help="Write the rollout table as Parquet: a row per line with verdict, keys, reward and lengths.",
            show_default=False,
        ),
    ] = None,
    cluster: Annotated[
        str | None,
        typer.Option(
            "--cluster",
            metavar="PATH",
            help="Dotted path to what a split must not tear apart, such as verifier_metadata.template; "
            "a task is its own cluster if not given.",
            show_default=False,
        ),
    ] = None,
    reward_threshold: Annotated[
        float | None,
        typer.Option(
            "--reward-threshold",
            help="Lowest good reward; if not given, the highest of binary rewards and 0.8 of those within 0 and 1.",
            show_default=False,
        ),
    ] = None,
    workers: Annotated[
        int | None,
        typer.Option(
            "--workers",
            min=1,
            help="Processes that read; if not given one for small files, else one a core, at most four.",
            show_default=False,
        ),
    ] = None,
    max_line_bytes: Annotated[
        int, typer.Option("--max-line-bytes", min=1, help="Longer lines are refused unread.")
    ] = 64_000_000,
    as_json: Json = False,
) -> None:
    """Show what is in rollout files: rewards, groups, tools, lengths, every problem, and what they are good for."""
    if row is None:
        _inspect(rollouts or [], html, examples, table, cluster, reward_threshold, workers, max_line_bytes, as_json)
    elif rollouts or html or table:
        raise UserError("--row shows one line by itself", remedy="leave out the rollouts, --html and --table")
    else:
        _show_row(row, cluster, as_json)


def _inspect(
    rollouts: list[Path],
    html: Path | None,
    examples: int,
    table: Path | None,
    cluster: str | None,
    reward_threshold: float | None,
    workers: int | None,
    max_line_bytes: int,
    as_json: bool,
) -> None:
    from rich.console import Console

    from gymtrl.reports.inspection import render, summary_json
    from gymtrl.reports.inspection_page import write_page
    from gymtrl.reports.reading import watch_reading
    from gymtrl.rollouts.inputs import expand_inputs
    from gymtrl.rollouts.inspection import inspect_rollouts
    from gymtrl.rollouts.outputs import check_output
    from gymtrl.workspace.spool import spooled

    for output in (html, table):
        if output is not None:
            check_output(output, rollouts)
    if html and table and html.resolve() == table.resolve():
        raise UserError(f"--html and --table both name {html}", remedy="name two files")
    with tempfile.TemporaryDirectory() as folder:
        # A table is of use only as long as the files that it names are there.
        inputs = expand_inputs(spooled(rollouts, table.parent if table else Path(folder)))
        made = table or Path(folder) / "table.parquet"
        with watch_reading(inputs) as on_bytes:
            summary = inspect_rollouts(
                inputs,
                cluster=cluster,
                reward_threshold=reward_threshold,
                max_line_bytes=max_line_bytes,
                workers=workers,
                table=made,
                on_bytes=on_bytes,
            )
        if html is not None:
            write_page(summary, made, html, examples=examples, cluster=cluster)
    if as_json:
        sys.stdout.write(summary_json(summary))
    else:
        render(summary, Console())
    if html is not None:
        print(f"→ {plain(str(html))}", file=sys.stderr)


def _show_row(row: str, cluster: str | None, as_json: bool) -> None:
    from msgspec.structs import asdict, replace
    from rich.console import Console

    from gymtrl.reports.rollout import line_json, render_rollout
    from gymtrl.rollouts.inputs import packing
    from gymtrl.rollouts.inspection import read_row
    from gymtrl.rollouts.record import Origin
    from gymtrl.workspace.spool import spooled

    class Unpacked(Origin, frozen=True):
        """A place that is read in the copy and shown in the packed file."""

        def __str__(self) -> str:
            return row

    packed = Path(row.rpartition(":")[0])
    with tempfile.TemporaryDirectory() as folder:
        if not packed.is_file() or not packing(packed):
            line = read_row(row, cluster=cluster)
        else:
            (copy,) = spooled([packed], Path(folder))
            line = read_row(row, cluster=cluster, unpacked=copy)
            place = asdict(line.origin)
            shown = Origin(**place | {"file": str(packed)}) if as_json else Unpacked(**place)
            line = replace(line, origin=shown)
        if as_json:
            sys.stdout.write(line_json(line))
        else:
            render_rollout(line, Console())
