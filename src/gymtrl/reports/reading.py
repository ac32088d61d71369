"""How far reading is, for a person who waits."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

_PATIENCE = 2.0


@contextmanager
def watch_reading(files: Iterable[Path], console: Console | None = None) -> Iterator[Callable[[int], object]]:
    """Yields a function to be told how many bytes were read since its last call.

    A bar appears after two seconds, and only on a terminal.

    Args:
        files (`Iterable[Path]`): What is read.
        console (`Console`, *optional*): Standard error unless given.
    """
    console = console or Console(stderr=True)
    columns = (TextColumn("reading"), BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    progress = Progress(*columns, console=console, transient=True)
    task = progress.add_task("reading", total=sum(path.stat().st_size for path in files))
    started = time.monotonic()

    def advance(count: int) -> None:
        progress.advance(task, count)
        late = time.monotonic() - started > _PATIENCE
        if late and console.is_terminal and not progress.live.is_started:
            progress.start()

    try:
        yield advance
    finally:
        if progress.live.is_started:
            progress.stop()
