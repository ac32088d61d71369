"""A finding of the doctor on a terminal."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console
from rich.text import Text

from gymtrl.doctor.finding import Finding
from gymtrl.text import plain

_COLOURS = {"error": "bold red", "warning": "yellow", "note": "cyan"}


def finding_text(finding: Finding) -> Text:
    """A finding with its evidence, cause and remedy, a line each."""
    told = Text.assemble((finding.severity, _COLOURS[finding.severity]), f": {plain(finding.title)}")
    told.append(f" ({plain(finding.rule)})", style="dim")
    for name, words in (("seen", finding.evidence), ("cause", finding.cause), ("remedy", finding.remedy)):
        told.append(f"\n  {name + ':':<8}{plain(words)}")
    return told


def render_each(findings: Sequence[Finding], console: Console) -> None:
    """Prints findings with an empty line before each."""
    for finding in findings:
        console.print()
        console.print(finding_text(finding), soft_wrap=True)
