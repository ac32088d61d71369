"""Progress of long work: a bar where a person watches, a line now and then where nobody does."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

_LINE_SECONDS = 15.0


@contextmanager
def watch(console: Console | None = None) -> Iterator[Callable[[str, int, int], None]]:
    """Yields a function of (name, done, total) that shows progress; total 0 means that nobody knows it."""
    console = console or Console(stderr=True)
    if not console.is_terminal:
        yield _lines(console)
        return
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, TimeRemainingColumn(), console=console, transient=True) as progress:
        tasks: dict[str, TaskID] = {}

        def show(name: str, done: int, total: int) -> None:
            if name not in tasks:
                for earlier in tasks.values():
                    progress.update(earlier, visible=False)
                tasks[name] = progress.add_task(name, total=total or None)
            progress.update(tasks[name], completed=done, total=total or None)

        yield show


def _lines(console: Console) -> Callable[[str, int, int], None]:
    shown: dict[str, float] = {}

    def show(name: str, done: int, total: int) -> None:
        now = time.monotonic()
        if (done != total or not total) and now - shown.get(name, -_LINE_SECONDS) < _LINE_SECONDS:
            return
        if total and done == total and shown.get(name) == -1:
            return
        shown[name] = -1 if total and done == total else now
        console.print(f"  {name}: {done} of {total}" if total else f"  {name}: {done}", highlight=False)

    return show
