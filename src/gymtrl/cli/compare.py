"""`gymtrl compare`"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from gymtrl.cli.options import Stage, stage_options
from gymtrl.comparison.settings import CompareSettings
from gymtrl.text import plain


def register(app: typer.Typer) -> None:
    """Adds the verb."""
    app.command("compare")(compare)


@stage_options(CompareSettings, "compare")
def compare(
    before: Annotated[Path, typer.Argument(help="Rollouts before (JSONL), or a folder of them.")],
    after: Annotated[list[Path], typer.Argument(help="Rollouts after, of the same tasks; several are candidates.")],
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="Folder to keep the comparison in; printed only if not given.")
    ] = None,
    html: Annotated[
        Path | None,
        typer.Option("--html", help="Write a page to read in a browser; --out writes one as well.", show_default=False),
    ] = None,
    *,
    stage: Stage,
) -> None:
    """Compare collections of the same tasks: paired difference, cluster-robust interval, flips, costs, verdict."""
    from gymtrl.comparison.verdict import exit_status
    from gymtrl.reports.comparison import comparison_json, render_comparison
    from gymtrl.reports.comparison_page import REPORT, write_page
    from gymtrl.rollouts.outputs import check_output
    from gymtrl.validation.validate import compare_rollouts

    if html is not None:
        check_output(html, [before, *after])
    comparison = compare_rollouts(before, after, stage.settings, out=out)
    pages = [*([out / REPORT] if out is not None else []), *([html] if html is not None else [])]
    for page in pages:
        write_page(comparison, page)
    if stage.json:
        sys.stdout.write(comparison_json(comparison))
    else:
        render_comparison(comparison)
    for page in pages:
        print(f"→ {plain(str(page))}", file=sys.stderr)
    raise typer.Exit(exit_status(comparison, stage.settings.fail_on))
