"""Standard input as a file: rows are found again by their byte offset, so what is piped in is kept."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path

from gymtrl.rollouts.inputs import spool
from gymtrl.workspace.artefact import sha256_of


def spooled(inputs: Sequence[Path], folder: Path) -> list[Path]:
    """Returns `inputs` with `-` replaced by a file in `folder` that holds standard input, named by its content."""
    return [_spooled(folder) if str(path) == "-" else path for path in inputs]


def _spooled(folder: Path) -> Path:
    draft = spool(sys.stdin.buffer, folder / f".stdin.{os.getpid()}.partial")
    return draft.rename(folder / f"stdin-{sha256_of(draft)[:16]}-rollouts.jsonl")
