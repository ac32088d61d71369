"""A run that is killed again and again ends with the weights of one that was left alone."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from safetensors.torch import load_file

from gymtrl import FormatSftSettings, TrainSftSettings, format_sft, train
from tiny import filtered, metrics, sums, tiny_llama

KILLS = 20
_TRAIN = """
import sys
from pathlib import Path
from gymtrl import TrainSftSettings, train
train(Path(sys.argv[1]), Path(sys.argv[2]), TrainSftSettings.model_validate_json(sys.argv[3]))
"""


@pytest.mark.long
@pytest.mark.parametrize("method", ["lora", "full"])
def test_killed_at_random_moments(method: str, tmp_path: Path, smollm2_dir: Path) -> None:
    model = tiny_llama(tmp_path / "model", smollm2_dir)
    rows = sums(40)
    dataset = tmp_path / "dataset"
    format_sft(filtered(tmp_path / "filtered", rows[:72], rows[72:]), dataset, FormatSftSettings(model=str(model)))
    chosen = TrainSftSettings(method=method, max_steps=60, save_steps=3, learning_rate=0.01, effective_batch=4)
    begun = time.monotonic()
    train(dataset, tmp_path / "whole", chosen)
    seconds = time.monotonic() - begun

    moments = random.Random(0)
    arguments = [str(dataset), str(tmp_path / "killed"), chosen.model_dump_json()]
    killed = 0
    while killed < KILLS:
        child = subprocess.Popen([sys.executable, "-c", _TRAIN, *arguments], stderr=subprocess.DEVNULL)
        # Anywhere: before the model is there, in a step, while a checkpoint or the model is written.
        try:
            child.wait(moments.uniform(0.2, 1.1) * seconds)
        except subprocess.TimeoutExpired:
            os.kill(child.pid, signal.SIGKILL)
            child.wait()
            killed += 1
            continue
        assert child.returncode == 0
        same_result(tmp_path / "whole", tmp_path / "killed")
        (tmp_path / "killed").rename(tmp_path / f"done-{killed}")
    train(dataset, tmp_path / "killed", chosen)
    same_result(tmp_path / "whole", tmp_path / "killed")


def same_result(whole: Path, killed: Path) -> None:
    assert [line["step"] for line in metrics(killed)] == [line["step"] for line in metrics(whole)]
    assert [line["loss"] for line in metrics(killed)] == pytest.approx([line["loss"] for line in metrics(whole)])
    a, b = (load_file(run / "model" / "model.safetensors") for run in (whole, killed))
    assert all(float((a[key] - b[key]).abs().max()) <= 1e-6 for key in a)
