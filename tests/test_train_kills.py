"""A run that is killed again and again ends with the weights of one that was left alone."""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import statistics
import subprocess
import sys
import time
from collections import Counter, defaultdict
from pathlib import Path

import psutil
import pytest
from safetensors.torch import load_file

from gymtrl import FormatSftSettings, TrainSftSettings, format_sft, train
from tiny import filtered, metrics, sums, tiny_llama

STAGES = ("preparation", "loading", "first step", "checkpoint", "end")
KILLS_EACH = 4
MOST_KILLS = 60
STEPS = 60
_TRAIN = """
import sys
from pathlib import Path
from gymtrl import TrainSftSettings, train
train(Path(sys.argv[1]), Path(sys.argv[2]), TrainSftSettings.model_validate_json(sys.argv[3]))
"""


class Attempt:
    """A training run in a process of its own, and what its folder shows of it."""

    def __init__(self, dataset: Path, out: Path, settings: TrainSftSettings) -> None:
        self.out, self.draft = out, out.parent / f".{out.name}.partial"
        self._metrics = self.draft / "metrics.jsonl"
        self._resumed = max((step for step, whole in self._checkpoints().items() if whole), default=0)
        self._log = (self._state()[0], -1)  # the file of metrics that was there before, and the size of the new one
        self.started = time.time()
        arguments = [str(dataset), str(out), settings.model_dump_json()]
        self.process = subprocess.Popen([sys.executable, "-c", _TRAIN, *arguments], stderr=subprocess.DEVNULL)
        self._below: list[psutil.Process] = []
        self._counted = 0.0

    def stage(self) -> str:
        """What it is doing: one of `STAGES`, or `steps` between them."""
        time.sleep(0.002)  # to leave it the cores
        job, all_saved = self.draft / "job.json", f"checkpoint-{STEPS}/sealed.json"
        if self.out.exists():
            return "end"
        if _time(job) < self.started:
            return "preparation"
        if not all(self._checkpoints().values()):
            return "checkpoint"
        if (self.draft / "checkpoints" / all_saved).exists():
            return "end"
        before, begun = self._log
        now, size = self._state()
        if begun < 0:  # the worker's first deed is to write anew what still holds of it
            if now != before:
                self._log = (before, size)
            return "loading"
        if size == begun:
            return "loading"
        return "steps" if f'"step":{self._resumed + 1},' in self._text() else "first step"

    def kill(self, *, all_of_it: bool) -> None:
        """Kills it, with all that it started or alone; in the latter case the others have to end by themselves."""
        for process in reversed(self._below if all_of_it else []):
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        os.kill(self.process.pid, signal.SIGKILL)
        self.process.wait()

    def look_below(self) -> None:
        """Finds its children now and then; it takes too long for the moment of the kill."""
        if time.monotonic() > self._counted + 0.2 and self.process.poll() is None:
            self._below = psutil.Process(self.process.pid).children(recursive=True)
            self._counted = time.monotonic()

    def _checkpoints(self) -> dict[int, bool]:
        """Step of each checkpoint → whether it is sealed, without those that an earlier attempt left torn."""
        since = getattr(self, "started", float("inf"))
        found = {int(path.name.rpartition("-")[2]): path for path in self.draft.glob("checkpoints/checkpoint-*")}
        whole = {step: (path / "sealed.json").exists() for step, path in found.items()}
        return {step: sealed for step, sealed in whole.items() if sealed or _time(found[step]) >= since}

    def _state(self) -> tuple[int, int]:
        try:
            state = self._metrics.stat()
        except FileNotFoundError:
            return 0, 0
        return state.st_ino, state.st_size

    def _text(self) -> str:
        return self._metrics.read_text().replace('": ', '":') if self._metrics.exists() else ""


def _time(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except FileNotFoundError:
        return 0.0


@pytest.mark.long
@pytest.mark.parametrize("method", ["lora", "full"])
def test_killed_at_random_moments(method: str, tmp_path: Path, smollm2_dir: Path) -> None:
    model = tiny_llama(tmp_path / "model", smollm2_dir)
    rows = sums(40)
    dataset = tmp_path / "dataset"
    format_sft(filtered(tmp_path / "filtered", rows[:72], rows[72:]), dataset, FormatSftSettings(model=str(model)))
    chosen = TrainSftSettings(method=method, max_steps=STEPS, save_steps=3, learning_rate=0.01, effective_batch=4)
    took = defaultdict[str, list[float]](list)
    attempt = Attempt(dataset, tmp_path / "whole", chosen)
    last, entered = "preparation", time.monotonic()
    while attempt.process.poll() is None:
        if (now := attempt.stage()) != last:
            took[last].append(time.monotonic() - entered)
            last, entered = now, time.monotonic()
    took[last].append(time.monotonic() - entered)
    takes = {stage: statistics.median(seconds) for stage, seconds in took.items()}
    assert attempt.process.returncode == 0

    moments = random.Random(0)
    aims = moments.sample(STAGES * KILLS_EACH, len(STAGES) * KILLS_EACH)
    hit: Counter[tuple[str, str]] = Counter()
    finished = 0
    while left := aims or sorted(set(STAGES) - {seen for _, seen in hit}):  # a short stage may take more kills to hit
        assert hit.total() < MOST_KILLS, hit
        aim = left[0]
        attempt = Attempt(dataset, tmp_path / "killed", chosen)
        while attempt.process.poll() is None and attempt.stage() != aim:
            attempt.look_below()
        time.sleep(moments.uniform(0, takes[aim]))
        if attempt.process.poll() is None:
            seen = attempt.stage()
            attempt.kill(all_of_it=moments.random() < 0.5)
            hit[aim, seen] += 1
            aims = aims[1:]
        else:  # it was too late for this stage
            assert attempt.process.returncode == 0
            same_result(tmp_path / "whole", tmp_path / "killed")
            (tmp_path / "killed").rename(tmp_path / f"done-{finished}")
            finished += 1
    print(f"seconds of each stage: {takes}")
    print(f"kills, as aimed and as seen: {dict(hit)}; {finished} runs ended between them")
    train(dataset, tmp_path / "killed", chosen)
    same_result(tmp_path / "whole", tmp_path / "killed")


def same_result(whole: Path, killed: Path) -> None:
    assert [line["step"] for line in metrics(killed)] == [line["step"] for line in metrics(whole)]
    assert [line["loss"] for line in metrics(killed)] == pytest.approx([line["loss"] for line in metrics(whole)])
    assert evaluations(killed) == pytest.approx(evaluations(whole))
    a, b = (load_file(run / "model" / "model.safetensors") for run in (whole, killed))
    assert all(float((a[key] - b[key]).abs().max()) <= 1e-6 for key in a)


def evaluations(run: Path) -> list[float]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [line["eval_loss"] for line in lines if "eval_loss" in line]
