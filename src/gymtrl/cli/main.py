"""`gymtrl`: the verbs, and how failures are told."""

from __future__ import annotations

import os
import signal
import sys
from typing import Annotated

import typer
from typer.core import TyperGroup

from gymtrl import __version__
from gymtrl.cli import (
    compare,
    demo,
    doctor,
    export,
    filter,
    format,
    gym,
    inspect,
    model,
    plan,
    power,
    recipe,
    serve,
    train,
    validate,
)
from gymtrl.errors import GymtrlError, RunError
from gymtrl.text import plain

VERBS = (
    "inspect",
    "filter",
    "format",
    "export",
    "plan",
    "train",
    "doctor",
    "serve",
    "validate",
    "compare",
    "power",
    "init",
    "run",
    "schema",
    "gym",
    "model",
    "demo",
)


class _InOrder(TyperGroup):
    """Lists the verbs in the order of the job."""

    def list_commands(self, ctx: object) -> list[str]:
        return list(VERBS)


app = typer.Typer(
    cls=_InOrder,
    help="From NeMo Gym rollouts to a better model with TRL, with proof that it is better.",
    epilog="The way of the data: inspect → filter → format → train → validate. Start with 'gymtrl inspect ROLLOUTS'.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110},
)


def _print_version(wanted: bool) -> None:
    if wanted:
        print(__version__)
        raise typer.Exit


# Eager, or the missing verb would be found first.
_Version = Annotated[
    bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and stop.")
]


@app.callback()
def _root(version: _Version = False) -> None:
    pass


inspect.register(app)
filter.register(app)
format.register(app)
export.register(app)
plan.register(app)
train.register(app)
doctor.register(app)
serve.register(app)
validate.register(app)
compare.register(app)
power.register(app)
recipe.register(app)
gym.register(app)
model.register(app)
demo.register(app)


def main() -> None:
    """Runs the command line and exits: 0 done, 1 a check failed, 2 usage or bad input, 3 run-time failure, 130
    interrupted."""
    # Asked to end, we end as at Ctrl-C, so that everything that we started is stopped; a shell's background job would
    # otherwise ignore the latter.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.default_int_handler)
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    try:
        app()
    except GymtrlError as error:
        _tell(error.message, error.remedy)
        sys.exit(error.exit_status)
    except SystemExit as end:
        if isinstance(end.__context__, BrokenPipeError):
            # The reader of our output has gone, as with '| head'; nothing is wrong. Typer has silenced the output.
            sys.exit(0)
        if end.code == 130:
            print("interrupted; nothing half-done is left under its name; run it again to go on", file=sys.stderr)
        raise
    except OSError as error:
        _tell(
            f"{error.filename or 'file system'}: {error.strerror or error}",
            "check the path, its permissions and the disk",
        )
        sys.exit(RunError.exit_status)


def _tell(message: str, remedy: str | None) -> None:
    print(f"error: {plain(message)}", file=sys.stderr)
    if remedy:
        print(f"remedy: {plain(remedy)}", file=sys.stderr)
