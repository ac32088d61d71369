"""`metrics.jsonl` of a training run: one JSON object a line, for a step, an evaluation or an event.

    {"step": 7, "loss": 1.93, "lr": 0.0002, "grad_norm": 0.8, "tokens": 9120, "seconds": 4.1, …}
    {"step": 7, "eval_loss": 2.04, …}
    {"step": 7, "event": "continued from step 7"}

JSON has no word for numbers that are not finite: they are written as the strings `nan`, `inf` and `-inf`, which
`float` understands, and are numbers again when they are read.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

METRICS = "metrics.jsonl"
"""Its name in a run folder."""

_NOT_FINITE = {"nan": math.nan, "inf": math.inf, "-inf": -math.inf}


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Reads the lines of a metrics file.

    Args:
        path (`Path`): The file; one that is missing has no lines.

    Returns:
        `list[dict[str, Any]]`: What stands in them; a line that an interruption cut short is left out.
    """
    if not path.is_file():
        return []
    entries = []
    with path.open(encoding="utf-8", errors="replace") as stream:
        for line in stream:
            try:
                entry = json.loads(line)
            except ValueError:
                continue
            if isinstance(entry, dict) and isinstance(entry.get("step"), int):
                entries.append(
                    {
                        name: _NOT_FINITE.get(value, value) if isinstance(value, str) else value
                        for name, value in entry.items()
                    }
                )
    return entries


def append_metrics(path: Path, entry: Mapping[str, Any]) -> None:
    """Adds a line to a metrics file."""
    with path.open("a", encoding="utf-8") as stream:
        stream.write(_line(entry))


def rewrite_metrics(path: Path, entries: Iterable[Mapping[str, Any]]) -> None:
    """Replaces the lines of a metrics file, all or none of them."""
    partial = path.with_name(f".{path.name}")
    partial.write_text("".join(map(_line, entries)), encoding="utf-8")
    partial.replace(path)


def _line(entry: Mapping[str, Any]) -> str:
    told = {
        name: str(value) if isinstance(value, float) and not math.isfinite(value) else value
        for name, value in entry.items()
    }
    return json.dumps(told, allow_nan=False) + "\n"
