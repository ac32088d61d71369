"""`gymtrl init`, `gymtrl run` and `gymtrl schema`: the whole job from one recipe"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from gymtrl.pipeline.sections import Stage


def register(app: typer.Typer) -> None:
    """Adds the verbs."""
    app.command("init")(init)
    app.command("run")(run)
    app.command("schema")(schema)


def init(
    rollouts: Annotated[list[Path], typer.Argument(help="Rollout files (JSONL), folders of them, or quoted patterns.")],
    model: Annotated[str, typer.Option("--model", "-m", help="Model to train: a folder or a hub id.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="Recipe to write.")] = Path("recipe.yaml"),
    force: Annotated[bool, typer.Option("--force", help="Replace a recipe of that name.")] = False,
) -> None:
    """Write a commented recipe for these rollouts and this machine, with the objective that fits them."""
    from gymtrl.pipeline.first import write_recipe
    from gymtrl.text import plain

    advice = write_recipe(rollouts, model, out, force=force)
    print(plain(f"{advice.objective}: {advice.why}"))
    print(plain(f"→ {out}"))


def run(
    recipe: Annotated[Path, typer.Argument(help="Recipe (YAML), such as init writes.")],
    start: Annotated[
        Stage | None,
        typer.Option(
            "--from",
            help="Take what the stages before this one wrote as it is; do this one and the rest anew.",
            show_default=False,
        ),
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print what is up to date, and the settings that are no defaults.")
    ] = False,
) -> None:
    """Go through the stages of a recipe; skip what is up to date, go on where it was interrupted."""
    from gymtrl.pipeline.run import open_job, run_job, show_job

    job = open_job(recipe, dry=dry_run)
    if dry_run:
        show_job(job, start=start)
    else:
        raise typer.Exit(run_job(job, start=start))


def schema() -> None:
    """Print the JSON schema of recipes, for editors; init writes it beside the recipe."""
    import json

    from gymtrl.pipeline.schema import recipe_schema

    sys.stdout.write(json.dumps(recipe_schema(), indent=1, ensure_ascii=False) + "\n")
