"""What follows when a training process ends, by how it ended; the processes here only tell it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from gymtrl import RunError, TrainSftSettings, UserError
from gymtrl.doctor.run import DataFacts
from gymtrl.training import supervise
from gymtrl.training.job import CHANGES, Job, Outcome
from gymtrl.training.launch import Launch
from gymtrl.training.plan import Plan
from gymtrl.training.sft import SFT
from gymtrl.training.space import Room
from gymtrl.training.supervise import train_in_processes

# In place of training, a process says what a file has for it, and ends.
_TELLS = """
import os, sys, json
if "gymtrl.training.worker" in sys.orig_argv and sys.orig_argv[1] == "-m":
    folder = sys.orig_argv[-1]
    with open(folder + "/starts", "a") as stream:
        stream.write("x")
    with open(folder + "/ending") as stream:
        ending = json.load(stream)
    if ending["failure"]:
        with open(folder + "/failure-0.json", "w") as stream:
            json.dump(ending["failure"], stream)
    os._exit(ending["code"])
"""

PLAN = Plan(
    objective="sft",
    method="lora",
    rows=8,
    epochs=1.0,
    steps=4,
    effective_batch=8,
    micro_batch=2,
    accumulation=4,
    processes=1,
    learning_rate=1e-3,
    save_steps=1,
    gradient_checkpointing=False,
    dtype="float32",
    cuda=False,
)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Of a run whose processes do what `ends` says."""
    (tmp_path / "hook").mkdir()
    (tmp_path / "hook" / "sitecustomize.py").write_text(_TELLS)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "hook"), prepend=":")
    (tmp_path / "run").mkdir()
    return tmp_path / "run"


def ends(folder: Path, code: int, kind: str | None, at: str = "training") -> None:
    told = {"kind": kind, "message": "it failed", "remedy": None, "at": at, "time": 1.0}
    (folder / "ending").write_text(json.dumps({"code": code, "failure": told if kind else None}))


def run(folder: Path, processes: int = 1) -> None:
    job = Job("sft", TrainSftSettings().model_dump(mode="json"), PLAN, "dataset", "model", DataFacts(rows=8))
    train_in_processes(folder, job, SFT, Launch(processes=processes, cuda=False), Room(1, 1))


def starts(folder: Path) -> int:
    return len((folder / "starts").read_text())


@pytest.mark.parametrize(("at", "remedy"), [("saving", "only the export is left"), ("measuring", "without validation")])
def test_memory_that_runs_out_after_training_takes_a_fresh_process_and_no_measure(
    at: str, remedy: str, folder: Path
) -> None:
    ends(folder, 75, "memory", at)
    with pytest.raises(RunError, match=f"memory ran out in {at}, and nothing is left to try") as caught:
        run(folder)
    assert remedy in (caught.value.remedy or "")
    assert starts(folder) == 2 and not (folder / CHANGES).exists()


def test_a_process_that_is_killed_while_it_saves_was_saving(folder: Path) -> None:
    checkpoint = folder / "checkpoints" / "checkpoint-4"
    checkpoint.mkdir(parents=True)
    (checkpoint / "weights").write_bytes(b"1234")
    (checkpoint / "sealed.json").write_text(json.dumps({"weights": 4}))
    supervise.write_json(checkpoint / "outcome.json", Outcome(4, None, None, None, 1, 1, None, {}))
    ends(folder, 75, None)
    with pytest.raises(RunError, match="memory ran out in saving"):
        run(folder)
    assert starts(folder) == 2 and not (folder / CHANGES).exists()


def test_memory_that_runs_out_in_training_takes_a_measure(folder: Path) -> None:
    ends(folder, 75, "memory")
    with pytest.raises(RunError, match="memory ran out in training"):
        run(folder)
    measures = [change["measure"].partition(",")[0] for change in json.loads((folder / CHANGES).read_text())]
    assert measures == ["micro-batch 2 -> 1", "gradient checkpointing on"] and starts(folder) == 3


@pytest.mark.parametrize(("kind", "error"), [("user", UserError), ("run", RunError), ("disk", RunError)])
def test_what_a_process_told_is_not_taken_for_what_the_kernel_killed_meanwhile(
    kind: str, error: type[Exception], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kills = iter(range(10))
    monkeypatch.setattr(supervise, "_kernel_kills", lambda: next(kills))
    ends(folder, 1, kind)
    with pytest.raises(error, match="disk is full" if kind == "disk" else "it failed"):
        run(folder, processes=2)
    assert starts(folder) == 1


@pytest.mark.parametrize(("sealed", "remedy"), [(False, "correct the option that it names"), (True, "run it again")])
def test_to_run_it_again_is_the_remedy_only_where_something_was_trained(
    sealed: bool, remedy: str, folder: Path
) -> None:
    if sealed:
        checkpoint = folder / "checkpoints" / "checkpoint-1"
        checkpoint.mkdir(parents=True)
        (checkpoint / "weights").write_bytes(b"1234")
        (checkpoint / "sealed.json").write_text(json.dumps({"weights": 4}))
    ends(folder, 1, "bug", "loading")
    with pytest.raises(RunError, match="it failed") as caught:
        run(folder)
    assert (caught.value.remedy or "").startswith(remedy)


def test_a_lost_connection_is_lack_of_memory_where_the_kernel_killed_one(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kills = iter(range(10))
    monkeypatch.setattr(supervise, "_kernel_kills", lambda: next(kills))
    ends(folder, 1, "bug", "loading")
    with pytest.raises(RunError, match="memory ran out in loading, and nothing is left to try"):
        run(folder, processes=2)
    assert starts(folder) == 1
