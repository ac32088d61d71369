"""What a rule found in a run, and the file that keeps it."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Literal

Severity = Literal["error", "warning", "note"]
SEVERITIES: tuple[Severity, ...] = ("error", "warning", "note")


@dataclass(frozen=True)
class Finding:
    """Something that is wrong with a run, or may be.

    Attributes:
        rule (`str`): Code of the rule.
        severity (`str`): `error`: the run cannot work; `warning`: look at it; `note`: good to know.
        title (`str`): What is the matter, in a few words.
        evidence (`str`): What was seen, with numbers.
        cause (`str`): The likely cause.
        remedy (`str`): What to do.
    """

    rule: str
    severity: Severity
    title: str
    evidence: str
    cause: str
    remedy: str


def write_findings(path: Path, findings: Iterable[Finding]) -> None:
    """Writes findings as a JSON list, whole or not at all."""
    partial = path.with_name(f".{path.name}")
    partial.write_text(json.dumps([asdict(finding) for finding in findings], indent=2) + "\n", encoding="utf-8")
    partial.replace(path)


def read_findings(path: Path) -> list[Finding]:
    """Reads what `write_findings` wrote; nothing where there is no such file."""
    if not path.is_file():
        return []
    names = [field.name for field in fields(Finding)]
    return [Finding(**{name: entry[name] for name in names}) for entry in json.loads(path.read_text(encoding="utf-8"))]
