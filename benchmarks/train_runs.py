"""Processes that train, watched: what they have used up by each step."""

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


class Training:
    """A process that trains, which can be held up: what it had used up whenever it had logged a step.

    Args:
        command (`list[str]`): Logs every step.
        folder (`Path`): Emptied; its output is kept beside it.
        metrics (`Path`, *optional*): Where it logs; its output unless given.
    """

    def __init__(self, command: list[str], folder: Path, metrics: Path | None = None) -> None:
        shutil.rmtree(folder, ignore_errors=True)
        self.folder, self._log = folder, folder.with_name(f"{folder.name}.log")
        self._source, self._seen = metrics or self._log, 0
        self._noted: list[tuple[float, float]] = []  # CPU and wall seconds at each step
        self._ran, self._since = 0.0, time.perf_counter()
        with self._log.open("wb") as stream:
            self._child = subprocess.Popen(
                command, stdout=stream, stderr=subprocess.STDOUT, env=compiled() | ENVIRONMENT
            )
        self._process = psutil.Process(self._child.pid)

    def until(self, step: int | None = None) -> None:
        """Lets it run until it has logged a step, or ended."""
        while self._child.poll() is None and (step is None or len(self._noted) < step):
            time.sleep(POLL_SECONDS)
            size = self._source.stat().st_size if self._source.is_file() else 0
            if size > self._seen:
                self._seen, now, wall = size, used(self._process), self._wall()
                steps = steps_logged(self._source.read_text(errors="replace"))
                self._noted += [(now, wall)] * (steps - len(self._noted))

    def hold(self) -> None:
        """Stops the clock, and the process with its children."""
        for one in (self._process, *self._process.children(recursive=True)):
            one.suspend()
        self._ran = self._wall()

    def go(self) -> None:
        """Takes back `hold`."""
        for one in (*self._process.children(recursive=True), self._process):
            one.resume()
        self._since = time.perf_counter()

    def run(self) -> Run:
        """Waits for its end, and returns what it took."""
        before = cpu_seconds(children_only=True)
        self.until()
        spent, wall = cpu_seconds(children_only=True) - before, self._wall()
        if self._child.returncode:
            told = self._log.read_text()[-2000:]
            raise SystemExit(f"{self.folder.name} ended with status {self._child.returncode}: {told}")
        steps = zip(history(self.folder), self._noted, strict=True)
        return Run([Mark(entry["step"], entry["tokens"], *at) for entry, at in steps], spent, wall, self.folder)

    def _wall(self) -> float:
        return self._ran + time.perf_counter() - self._since


def in_turn(sides: list[Training], steps: int) -> list[Run]:
    """Lets trainings that have begun take their steps in turn, so that both meet the same machine.

    Args:
        sides (`list[Training]`): Held, each at its first step.
        steps (`int`): Of each.
    """
    ended: dict[Training, Run] = {}
    for step in range(2, steps + 1):
        for one in sides if step % 2 else sides[::-1]:
            one.go()
            one.until(step)
            if step < steps:
                one.hold()
            else:
                ended[one] = one.run()
    return [ended[one] for one in sides]


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
