"""`gymtrl demo`"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def register(app: typer.Typer) -> None:
    """Adds the verb."""
    app.command("demo")(demo)


def demo(
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder to write.")] = Path("runs/demo"),
    seed: Annotated[int, typer.Option("--seed", help="Seed of sampling, of the split and of training.")] = 0,
    fresh: Annotated[bool, typer.Option("--fresh", help="Redo every stage; keep Gym and the model.")] = False,
) -> None:
    """Run the whole job once with a small real model in a real Gym: about five minutes on two cores."""
    from gymtrl.demo.run import run_demo

    run_demo(out, seed=seed, fresh=fresh)
