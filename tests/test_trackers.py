"""Trackers: told before a model is loaded when one is missing; TensorBoard's record is in the run folder."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

from gymtrl.errors import UserError
from gymtrl.training.progress import MetricsLog
from gymtrl.training.trackers import check_trackers, place_trackers
from gymtrl.workspace.metrics import read_metrics
from tiny_runs import rows, tiny_model, trainer


@pytest.mark.parametrize("name", ["tensorboard", "wandb", "trackio", "mlflow"])
def test_a_missing_package_is_named(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    found = importlib.util.find_spec
    hidden = {name, "tensorboardX"}
    monkeypatch.setattr(importlib.util, "find_spec", lambda package: None if package in hidden else found(package))
    with pytest.raises(UserError, match=f"needs the package '{name}'") as caught:
        check_trackers([name])
    assert f"pip install {name}" in (caught.value.remedy or "")


def test_what_needs_nothing_passes_and_what_does_not_exist_is_named() -> None:
    for names in ([], ["none"], ["comet_ml", "swanlab"]):
        check_trackers(names)
    with pytest.raises(UserError, match="no tracker 'tensorbord'; did you mean 'tensorboard'"):
        check_trackers(["tensorbord"])


def test_tensorboard_has_every_number_of_the_run(
    smollm2_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", "")
    monkeypatch.delenv("TENSORBOARD_LOGGING_DIR")
    check_trackers(["tensorboard"])
    place_trackers(["tensorboard"], tmp_path / "run")
    model = tiny_model(tmp_path / "model", smollm2_dir)
    made = trainer("dpo", model, tmp_path / "run" / "checkpoints", rows("dpo", 8), report_to=["tensorboard"])
    log = MetricsLog(tmp_path / "metrics.jsonl", 0)
    made.add_callback(log)
    made.train()
    assert not list((tmp_path / "run" / "checkpoints").rglob("events*"))
    record = EventAccumulator(str(tmp_path / "run" / "tensorboard")).Reload()
    for key in ("loss", "grad_norm", "rewards/margins"):
        seen = [(event.step, event.value) for event in record.Scalars(f"train/{key}")]
        assert seen == [(line["step"], pytest.approx(line[key])) for line in read_metrics(log.path)]
