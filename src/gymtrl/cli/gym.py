"""`gymtrl gym`"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from gymtrl.cli.options import Json, Stage, stage_options
from gymtrl.gym.settings import GymSetupSettings


def register(app: typer.Typer) -> None:
    """Adds the verbs."""
    group = typer.Typer(no_args_is_help=True, rich_markup_mode=None, help="NeMo Gym in an environment of its own.")
    group.command("setup")(setup)
    group.command("status")(status)
    app.add_typer(group, name="gym")


@stage_options(GymSetupSettings, "gym setup")
def setup(
    server: Annotated[
        list[str] | None, typer.Argument(help="Resources servers to install packages for; as --servers.")
    ] = None,
    *,
    stage: Stage,
) -> None:
    """Find a fitting Python and install NeMo Gym, with what its servers need, in an environment of its own."""
    import msgspec

    from gymtrl.gym.install import setup_gym

    settings = stage.settings.model_copy(update={"servers": server}) if server else stage.settings
    installation = setup_gym(settings, say=lambda line: print(line, file=sys.stderr))
    if stage.json:
        print(msgspec.json.encode(installation).decode())


def status(
    home: Annotated[
        Path | None, typer.Option("--home", help="Where Gym is installed, if not in its usual place.")
    ] = None,
    head: Annotated[str, typer.Option("--head", help="Head server to ask.")] = "http://127.0.0.1:11000",
    as_json: Json = False,
) -> None:
    """Tell what is installed, and which servers run."""
    from gymtrl.gym.status import gym_status, render_status

    found = gym_status(home, head)
    sys.stdout.write(found.to_json() if as_json else render_status(found))
