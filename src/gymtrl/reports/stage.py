"""What a stage did, for a terminal, from its manifest."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from gymtrl.text import plain
from gymtrl.workspace.artefact import Manifest


def render_manifest(folder: Path, manifest: Manifest, console: Console | None = None) -> None:
    """Prints counts, reasons for drops, further facts and the folder's path; of a filter also the split."""
    console = console or Console()
    counts = manifest.counts
    if counts is not None:
        console.print(
            f"[bold]{counts.read}[/] read, [bold]{counts.written}[/] kept, {sum(counts.dropped.values())} dropped"
        )
        if counts.dropped:
            table = Table(box=None, show_header=False, padding=(0, 2))
            for reason, number in sorted(counts.dropped.items(), key=lambda item: -item[1]):
                table.add_row(str(number), Text(plain(reason)), Text(_words(manifest.verb, reason), style="dim"))
            console.print(table)
    if "kept_tasks" in manifest.extra:
        console.print(split_line(manifest.extra["rollouts"], manifest.extra["kept_tasks"]))
    for key, value in manifest.extra.items():
        if isinstance(value, str | int | float) and not _is_hash(value):
            shown = f"{value:.4g}" if isinstance(value, float) else plain(str(value))
            console.print(f"{escape(key.replace('_', ' '))}: {escape(shown)}", soft_wrap=True)
    console.print(f"[green]→[/] {escape(str(folder))}", soft_wrap=True)


def split_line(rows: Mapping[str, int], tasks: Mapping[str, int]) -> str:
    """How much is trained on and how much is held out, in words."""
    return ", ".join(f"{side} {rows[side]:,} rows of {tasks[side]:,} tasks" for side in rows)


def _words(verb: str, reason: str) -> str:
    """What a drop reason means, where it is one of the filter or of a format verb."""
    if verb == "filter":
        from gymtrl.selection.rules import DROP_SENTENCES

        return DROP_SENTENCES.get(reason.partition(":")[0], "")
    if verb.startswith("format "):
        from gymtrl.formats.reasons import words_for

        return words_for(reason)
    return ""


def _is_hash(value: object) -> bool:
    return isinstance(value, str) and len(value) == 64 and all(c in "0123456789abcdef" for c in value)
