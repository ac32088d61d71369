"""The stages of a job as values: what each reads, what it writes, and how far the job has come."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from itertools import count
from pathlib import Path
from typing import Any

from pydantic import BaseModel
from rich.console import Console
from rich.table import Table

from gymtrl.formats.grpo import format_grpo
from gymtrl.formats.preference import format_dpo
from gymtrl.formats.settings import FormatSettings
from gymtrl.formats.sft import format_sft
from gymtrl.formats.source import format_inputs
from gymtrl.formats.unpaired import format_kto
from gymtrl.reports import comparison_page, training_page
from gymtrl.reports.comparison import render_comparison
from gymtrl.reports.plan import render_start
from gymtrl.reports.progress import watch
from gymtrl.reports.reading import watch_reading
from gymtrl.reports.stage import render_manifest
from gymtrl.reports.training import read_run, render_run
from gymtrl.selection.filter import files_read, filter_rollouts
from gymtrl.selection.settings import FilterSettings
from gymtrl.training.prepare import Prepared, train_inputs
from gymtrl.training.run import train
from gymtrl.validation.session import GymSession
from gymtrl.validation.settings import ValidateSettings
from gymtrl.validation.validate import read_comparison, validate, validate_inputs
from gymtrl.workspace.artefact import MANIFEST, Manifest, up_to_date
from gymtrl.workspace.stage import once

_FORMATS: dict[str, Callable[..., object]] = {
    "sft": format_sft,
    "dpo": format_dpo,
    "kto": format_kto,
    "grpo": format_grpo,
}


@dataclass(frozen=True)
class Step:
    """A stage of a job.

    Attributes:
        verb (`str`): As on the command line.
        folder (`Path`): What it writes.
        settings (`BaseModel`): Its settings.
        inputs (`Callable[[], list[Path]]`): What it reads, once the stages before it are done.
        work (`Callable[[Console], object]`): Writes the folder; the console shows progress.
        finish (`Callable[[], object]`): Adds to the folder what an interruption right after `work` left out.
    """

    verb: str
    folder: Path
    settings: BaseModel
    inputs: Callable[[], list[Path]]
    work: Callable[[Console], object]
    finish: Callable[[], object] = lambda: None

    @property
    def stage(self) -> str:
        """The verb without the objective."""
        return self.verb.split()[0]

    def done(self) -> bool:
        """Whether the folder is there and was made from the same inputs and settings."""
        if not (self.folder / MANIFEST).is_file():
            return False
        return up_to_date(self.folder, verb=self.verb, settings=self.settings, inputs=self.inputs()) is not None


@dataclass
class Clock:
    """Goes through stages, prints each one's name as it begins and what came of it, and keeps its time."""

    console: Console
    rows: list[tuple[str, float, bool]] = field(default_factory=list)

    @contextmanager
    def stage(self, name: str, what: str) -> Iterator[Callable[[bool], None]]:
        """Times what happens inside; the function that it yields is told whether there was something to do."""
        self.console.print(f"\n[bold cyan]{name}[/] {what}")
        ran = [True]
        start = time.monotonic()
        yield lambda did: ran.__setitem__(0, did)
        self.rows.append((name, time.monotonic() - start, ran[0]))

    def go(self, step: Step, what: str, *, anew: bool = False) -> Manifest:
        """Does a step unless its folder is up to date, and shows what the folder says."""
        with self.stage(step.stage, what) as ran:
            manifest, did = once(
                step.folder,
                verb=step.verb,
                settings=step.settings,
                inputs=step.inputs(),
                work=lambda: step.work(self.console),
                anew=anew,
            )
            ran(did)
            step.finish()
            if step.verb == "validate":
                render_comparison(read_comparison(step.folder), self.console)
            elif step.stage == "train":
                render_run(read_run(step.folder), step.folder, self.console)
            else:
                render_manifest(step.folder, manifest, self.console)
        return manifest

    def table(self) -> Table:
        """Each stage with its time, and whether there was something to do."""
        table = Table("stage", "seconds", "", box=None, padding=(0, 2))
        for name, seconds, ran in self.rows:
            table.add_row(name, f"{seconds:.1f}", "" if ran else "up to date")
        table.add_row("together", f"{sum(seconds for _, seconds, _ in self.rows):.1f}", "")
        return table


def filter_step(files: Sequence[Path], folder: Path, settings: FilterSettings) -> Step:
    """Chooses rollouts."""

    def work(console: Console) -> None:
        with watch_reading(files, console) as on_bytes:
            filter_rollouts(files, folder, settings, on_bytes=on_bytes)

    return Step("filter", folder, settings, lambda: files_read(files, settings), work)


def format_step(objective: str, source: Path, folder: Path, settings: FormatSettings) -> Step:
    """Makes the dataset of an objective: `sft`, `dpo`, `kto` or `grpo`."""

    def work(console: Console) -> None:
        rows = count(1)
        with watch(console) as progress:
            _FORMATS[objective](source, folder, settings, on_row=lambda: progress("rows", next(rows), 0))

    return Step(f"format {objective}", folder, settings, lambda: format_inputs(source, settings), work)


def train_step(objective: str, dataset: Path, folder: Path, settings: Any) -> Step:
    """Trains on a dataset of the objective, and writes the run's page."""

    def work(console: Console) -> None:
        def told(ready: Prepared) -> None:
            render_start(asdict(ready.planned.plan), ready.planned.notes, ready.findings, console)

        train(dataset, folder, settings, told=told)

    def finish() -> None:
        page = folder / "report.html"
        if not page.is_file():
            training_page.write_page(read_run(folder), page)

    return Step(f"train {objective}", folder, settings, lambda: train_inputs(dataset, settings), work, finish)


def validate_step(
    checkpoint: Path | None, folder: Path, settings: ValidateSettings, session: GymSession | None = None
) -> Step:
    """Tries the model before and after on held-out tasks, in a session that is open or one of its own, and writes the
    page."""

    def work(console: Console) -> None:
        with watch(console) as progress:
            if session is not None:
                session.progress = progress
            validate(checkpoint, folder, settings, session=session, progress=progress)

    def finish() -> None:
        page = folder / comparison_page.REPORT
        if not page.is_file():
            comparison_page.write_page(read_comparison(folder), page)

    return Step("validate", folder, settings, lambda: validate_inputs(checkpoint, settings), work, finish)
