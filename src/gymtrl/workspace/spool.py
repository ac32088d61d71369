"""Standard input as a file: rows are found again by their byte offset, so what is piped in is kept."""

from __future__ import annotations

import hashlib
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path


def spooled(inputs: Sequence[Path], folder: Path) -> list[Path]:
    """Returns `inputs` with `-` replaced by a file beside `folder` that holds standard input, named by its content."""
    return [_spool(folder) if str(path) == "-" else path for path in inputs]


def _spool(folder: Path) -> Path:
    folder.parent.mkdir(parents=True, exist_ok=True)
    draft = folder.parent / f".{folder.name}.stdin"
    with draft.open("wb") as stream:
        shutil.copyfileobj(sys.stdin.buffer, stream)
    with draft.open("rb") as stream:
        digest = hashlib.file_digest(stream, "sha256").hexdigest()
    return draft.rename(folder.parent / f"stdin-{digest[:16]}.jsonl")
