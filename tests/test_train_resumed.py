"""A run that goes on: from what is whole, by which numbers, and what is told of it. Nothing is trained here."""

from __future__ import annotations

import errno
import json
import os
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import pytest
from torch import distributed, multiprocessing

from gymtrl import FormatSftSettings, RunError, TrainSftSettings, format_sft, train
from gymtrl.training.checkpoints import Seal, drop_torn, last_sealed
from gymtrl.training.job import Outcome, write_json
from gymtrl.training.progress import MetricsLog
from gymtrl.workspace.metrics import read_metrics
from tiny import filtered, sums, tiny_llama

_ENDS = """
import os, sys
if sys.orig_argv[1:3] == ["-m", "gymtrl.training.worker"]:
    os._exit(9)
"""


def test_a_run_keeps_its_plan_and_its_card_tells_what_was_done(
    tmp_path: Path, smollm2_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_llama(tmp_path / "model", smollm2_dir)
    commit, hub = "ab" * 20, tmp_path / "hub" / "models--tiny--llama"
    (hub / "refs").mkdir(parents=True)
    (hub / "refs" / "main").write_text(commit)
    (hub / "snapshots").mkdir()
    (hub / "snapshots" / commit).symlink_to(model)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    source = filtered(tmp_path / "filtered", sums(8), [])
    format_sft(source, tmp_path / "dataset", FormatSftSettings(model=str(model)))

    (tmp_path / "hook").mkdir()
    (tmp_path / "hook" / "sitecustomize.py").write_text(_ENDS)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "hook"), prepend=":")
    chosen, out = TrainSftSettings(method="full", max_steps=4, model="tiny/llama"), tmp_path / "run"
    with pytest.raises(RunError, match="status 9"):
        train(tmp_path / "dataset", out, chosen)
    job_file = tmp_path / ".run.partial" / "job.json"
    job = json.loads(job_file.read_text())
    assert job["plan"]["gradient_checkpointing"] is False
    job["plan"]["gradient_checkpointing"] = True  # as where less memory was free
    job_file.write_text(json.dumps(job))
    with pytest.raises(RunError, match="status 9"):
        train(tmp_path / "dataset", out, chosen)
    assert json.loads(job_file.read_text()) == job

    counted = {"trainable": 1, "parameters": 1, "adapted": 0, "linear": 1, "vocabulary": 49152}
    write_json(
        job_file.with_name("result.json"), Outcome(2, None, None, None, 1, 1, "the policy had moved too far", counted)
    )
    line = {"step": 2, "loss": 1.0, "lr": 1e-5, "grad_norm": 1.0, "tokens": 9, "seconds": 1.0}
    job_file.with_name("metrics.jsonl").write_text(json.dumps(line) + "\n")
    done = train(tmp_path / "dataset", out, chosen)
    assert done.plan.gradient_checkpointing and done.plan.steps == 4
    card = (out / "README.md").read_text()
    assert ", 2 steps of " in card and "| stopped before its last step | the policy had moved too far |" in card
    assert json.loads((out / "manifest.json").read_text())["extra"]["revision"] == commit


def test_metrics_survive_a_kill_while_they_are_rewritten(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(f'{{"step": {i}, "eval_loss": 1.0}}\n' for i in range(3)))
    write = Path.write_text

    def torn(self: Path, data: str, **options: Any) -> int:
        write(self, data[:5], **options)
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, "write_text", torn)
    with pytest.raises(KeyboardInterrupt):
        MetricsLog(path, 1)
    monkeypatch.undo()
    assert len(read_metrics(path)) == 3
    MetricsLog(path, 1)
    assert [entry["step"] for entry in read_metrics(path)] == [0, 1]


def test_torn_checkpoints_are_passed_over(tmp_path: Path) -> None:
    for step in (2, 4, 6):
        folder = tmp_path / f"checkpoint-{step}"
        folder.mkdir()
        (folder / "optimizer.pt").write_bytes(bytes(100))
        if step < 6:
            _save(Seal(), tmp_path, step)
    assert last_sealed(tmp_path) == tmp_path / "checkpoint-4"  # the last one was never sealed
    (tmp_path / "checkpoint-4" / "optimizer.pt").write_bytes(bytes(50))
    assert last_sealed(tmp_path) == tmp_path / "checkpoint-2"
    drop_torn(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-2"]
    (tmp_path / "checkpoint-2" / "sealed.json").write_text('{"optimi')
    assert last_sealed(tmp_path) is None and last_sealed(tmp_path / "absent") is None


def test_a_checkpoint_that_cannot_be_sealed_ends_training_before_the_next(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)  # some file systems find out only when they write
    (tmp_path / "checkpoint-2").mkdir()
    (tmp_path / "checkpoint-2" / "optimizer.pt").write_bytes(bytes(100))
    seal, going_on = Seal(), SimpleNamespace(should_save=False, should_training_stop=False)
    _save(seal, tmp_path, 2, wait=False)
    seal.on_step_end(None, None, going_on)
    with pytest.raises(OSError, match="No space left"):
        seal.on_step_end(None, None, SimpleNamespace(should_save=True, should_training_stop=False))
    assert last_sealed(tmp_path) is None


def test_no_process_goes_on_before_the_last_checkpoint_is_sealed(tmp_path: Path) -> None:
    (tmp_path / "checkpoint-2").mkdir()
    (tmp_path / "checkpoint-2" / "optimizer.pt").write_bytes(bytes(100))
    multiprocessing.spawn(_ends_training, (tmp_path,), nprocs=2)
    assert [(tmp_path / f"seen-{rank}").read_text() for rank in range(2)] == ["checkpoint-2", "checkpoint-2"]


def _ends_training(rank: int, folder: Path) -> None:
    distributed.init_process_group("gloo", f"file://{folder}/meeting", world_size=2, rank=rank)
    fsync = os.fsync
    os.fsync = lambda descriptor: (time.sleep(1), fsync(descriptor))[1]  # a slow disk
    seal, state = Seal(), SimpleNamespace(global_step=2, is_world_process_zero=rank == 0)
    seal.on_save(SimpleNamespace(output_dir=str(folder)), state, None)
    seal.on_train_end(None, state, None)
    found = last_sealed(folder)
    (folder / f"seen-{rank}").write_text(found.name if found is not None else "none")


def _save(seal: Seal, folder: Path, step: int, *, wait: bool = True) -> None:
    state = SimpleNamespace(global_step=step, is_world_process_zero=True)
    seal.on_save(SimpleNamespace(output_dir=str(folder)), state, None)
    if wait:
        seal.on_train_end(None, state, None)
