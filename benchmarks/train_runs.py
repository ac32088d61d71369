"""A process that trains, watched: what it has used up by each step."""

from __future__ import annotations

import json
import shutil
import subprocess
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
from read import compiled
from read_sides import Result, cpu_seconds

POLL_SECONDS = 0.02
ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "PYTHONUNBUFFERED": "1",  # a step is noted when it is logged
}


@dataclass(frozen=True)
class Mark:
    """What a run had used up when it logged a step: CPU and wall seconds, and tokens that it had trained on."""

    step: int
    tokens: int
    cpu: float
    wall: float


@dataclass(frozen=True)
class Run:
    """A finished process.

    Attributes:
        marks (`list[Mark]`): One a step.
        cpu, wall (`float`): Seconds of the whole process, with its children.
        folder (`Path`): What it left.
    """

    marks: list[Mark]
    cpu: float
    wall: float
    folder: Path = field(repr=False)

    def between(self, first: int, last: int) -> Result:
        """Rates of the steps after `first` up to `last`."""
        begin, end = (next(mark for mark in self.marks if mark.step == step) for step in (first, last))
        tokens, cpu, wall = end.tokens - begin.tokens, end.cpu - begin.cpu, end.wall - begin.wall
        rates = {"tokens_per_cpu_s": tokens / cpu, "tokens_per_s": tokens / wall}
        return {"steps": last - first, "tokens": tokens, "cpu_s": cpu, "wall_s": wall} | rates

    def result(self) -> Result:
        """Rates of all steps but the first, and the whole process."""
        loop = self.between(self.marks[0].step, self.marks[-1].step)
        return loop | {"whole": {"cpu_s": self.cpu, "wall_s": self.wall, "tokens": self.marks[-1].tokens}}


def steps_logged(text: str) -> int:
    """Steps in a log: in `metrics.jsonl`, or in what transformers prints, where a progress bar may stand before it."""
    return sum(line.endswith("}") and ("{'loss'" in line or '"loss"' in line) for line in text.splitlines())


def history(folder: Path) -> list[Result]:
    """What a finished run has logged of each step, with all digits: `metrics.jsonl`, or the state of its trainer."""
    if (folder / "metrics.jsonl").is_file():
        lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        return [line for line in lines if "loss" in line]
    state = max(folder.rglob("trainer_state.json"), key=lambda path: int(path.parent.name.rpartition("-")[2]))
    steps = [entry for entry in json.loads(state.read_text())["log_history"] if "loss" in entry]
    return [entry | {"tokens": int(entry["num_tokens"])} for entry in steps]


def watched(command: list[str], folder: Path, metrics: Path | None = None) -> Run:
    """Runs a command that trains, and notes what it has used up whenever it has logged a step.

    Args:
        command (`list[str]`): Logs every step.
        folder (`Path`): Emptied; its output is kept beside it.
        metrics (`Path`, *optional*): Where it logs; its output unless given.
    """
    shutil.rmtree(folder, ignore_errors=True)
    log = folder.with_name(f"{folder.name}.log")
    source = metrics or log
    noted: list[tuple[float, float]] = []
    seen = 0
    spent, start = cpu_seconds(children_only=True), time.perf_counter()
    with log.open("wb") as stream:
        child = subprocess.Popen(command, stdout=stream, stderr=subprocess.STDOUT, env=compiled() | ENVIRONMENT)
    process = psutil.Process(child.pid)
    while child.poll() is None:
        time.sleep(POLL_SECONDS)
        size = source.stat().st_size if source.is_file() else 0
        if size > seen:
            seen, now, wall = size, used(process), time.perf_counter() - start
            steps = steps_logged(source.read_text(errors="replace"))
            noted += [(now, wall)] * (steps - len(noted))
    wall, spent = time.perf_counter() - start, cpu_seconds(children_only=True) - spent
    if child.returncode:
        raise SystemExit(f"{folder.name} ended with status {child.returncode}: {log.read_text()[-2000:]}")
    marks = [Mark(entry["step"], entry["tokens"], *at) for entry, at in zip(history(folder), noted, strict=True)]
    return Run(marks, spent, wall, folder)


def used(process: psutil.Process) -> float:
    """CPU seconds of a process and of its children."""
    total = 0.0
    for one in (process, *process.children(recursive=True)):
        try:
            total += sum(one.cpu_times()[:4])  # its own and those of children that have ended, user and system
        except psutil.NoSuchProcess:
            continue
    return total


def answer(command: list[str], folder: Path) -> Any:
    """What a script prints as its last line."""
    with (folder / "answer.log").open("wb") as log:
        child = subprocess.run(command, stdout=subprocess.PIPE, stderr=log, env=compiled() | ENVIRONMENT)
    if child.returncode:
        raise SystemExit(f"{' '.join(command[1:3])}: {(folder / 'answer.log').read_text()[-2000:]}")
    return json.loads(child.stdout.splitlines()[-1])
