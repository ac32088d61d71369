"""Memory that runs out makes the steps smaller inside, and the run ends as one with memory to spare."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from transformers import LlamaConfig

from gymtrl import FormatSftSettings, RunError, TrainSftSettings, format_sft, train
from gymtrl.training.dpo import DPO
from gymtrl.training.kto import KTO
from gymtrl.training.machine import Gpu, Machine
from gymtrl.training.measures import next_measure
from gymtrl.training.memory import model_shape
from gymtrl.training.objective import Objective
from gymtrl.training.plan import plan
from gymtrl.training.settings import TrainDpoSettings, TrainKtoSettings, TrainSettings
from gymtrl.training.sft import SFT
from tiny import filtered, metrics, sums, tiny_llama

# Trains under a limit on address space, which the processes that it starts inherit.
_TRAIN = """
import resource, sys
from pathlib import Path
from gymtrl import TrainSftSettings, train
resource.setrlimit(resource.RLIMIT_AS, (int(sys.argv[4]), int(sys.argv[4])))
train(Path(sys.argv[1]), Path(sys.argv[2]), TrainSftSettings.model_validate_json(sys.argv[3]))
"""

# Tells the most address space that a training process took.
_PEAK = """
import atexit, sys
if sys.orig_argv[1:3] == ["-m", "gymtrl.training.worker"]:
    def tell():
        status = dict(line.split(":", 1) for line in open("/proc/self/status") if ":" in line)
        open({path!r}, "w").write(status["VmPeak"].split()[0])
    atexit.register(tell)
"""

# Stands for a GPU that is too small: steps of more than one row raise what torch raises there.
_SMALL_GPU = """
import sys
if sys.orig_argv[1:3] == ["-m", "gymtrl.training.worker"]:
    import torch, transformers
    step = transformers.Trainer.training_step
    def small(self, model, inputs, *more, **named):
        if len(next(iter(inputs.values()))) > 1:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return step(self, model, inputs, *more, **named)
    transformers.Trainer.training_step = small
"""


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory, smollm2_dir: Path) -> Path:
    folder = tmp_path_factory.mktemp("memory")
    model = tiny_llama(folder / "model", smollm2_dir)
    rows = sums(16, words=150)  # rows of about 200 tokens, whose logits are what takes the memory
    return format_sft(
        filtered(folder / "filtered", rows, []), folder / "dataset", FormatSftSettings(model=str(model))
    ).path


def settings(micro: int) -> TrainSftSettings:
    return TrainSftSettings(
        method="full", max_steps=4, save_steps=2, effective_batch=8, micro_batch=micro, learning_rate=1e-3
    )


def hook(folder: Path, code: str, patch: pytest.MonkeyPatch) -> None:
    folder.mkdir()
    (folder / "sitecustomize.py").write_text(code)
    patch.setenv("PYTHONPATH", str(folder), prepend=":")


@pytest.mark.long
def test_a_limit_on_address_space(dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    peaks = {}
    for micro in (2, 8):
        with monkeypatch.context() as patch:
            hook(tmp_path / f"hook{micro}", _PEAK.format(path=str(tmp_path / f"peak{micro}")), patch)
            train(dataset, tmp_path / f"free{micro}", settings(micro))
        peaks[micro] = int((tmp_path / f"peak{micro}").read_text()) * 1024
    limit = (peaks[2] + peaks[8]) // 2
    arguments = [str(dataset), str(tmp_path / "tight"), settings(8).model_dump_json(), str(limit)]
    done = subprocess.run([sys.executable, "-c", _TRAIN, *arguments], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "memory ran out in training; micro-batch 8 -> 4" in done.stderr
    manifest = json.loads((tmp_path / "tight" / "manifest.json").read_text())["extra"]
    assert manifest["plan"]["effective_batch"] == 8 and manifest["plan"]["micro_batch"] < 8
    free, tight = (metrics(tmp_path / name) for name in ("free8", "tight"))
    assert [line["step"] for line in tight] == [1, 2, 3, 4]
    assert [line["loss"] for line in tight] == pytest.approx([line["loss"] for line in free], abs=1e-4)


def test_what_a_gpu_raises(dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    train(dataset, tmp_path / "free", settings(4))
    with monkeypatch.context() as patch:
        hook(tmp_path / "hook", _SMALL_GPU, patch)
        result = train(dataset, tmp_path / "small", settings(4))
    assert [re.sub(",.*", "", change.measure) for change in result.changes] == [
        "micro-batch 4 -> 2",
        "micro-batch 2 -> 1",
    ]
    assert (result.plan.micro_batch, result.plan.accumulation) == (1, 8)
    free, small = (metrics(tmp_path / name) for name in ("free", "small"))
    assert [line["loss"] for line in small] == pytest.approx([line["loss"] for line in free], abs=1e-4)


def test_nothing_left_to_try_is_told_and_keeps_what_was_trained(
    dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        hook(tmp_path / "hook", _SMALL_GPU.replace("> 1", "> 0"), patch)
        with pytest.raises(RunError, match="nothing is left to try") as caught:
            train(dataset, tmp_path / "run", settings(1))
    assert "method lora" in (caught.value.remedy or "")
    assert not (tmp_path / "run").exists()


def test_measures_come_in_their_order_and_keep_the_effective_batch() -> None:
    def all_of(settings: TrainSettings, objective: Objective, *, cuda: bool) -> list[str]:
        gpus = (Gpu("small", 2**40, 2**40, True),) if cuda else ()
        machine = Machine(memory=2**40, limit="memory", cores=2, gpus=gpus)
        planned = plan(settings, objective, rows=100, longest=100, shape=model_shape(LlamaConfig()), machine=machine)
        first = current = replace(planned.plan, gradient_checkpointing=cuda)
        words = []
        while (found := next_measure(current, objective)) is not None:
            current = found[0]
            assert current.micro_batch * current.accumulation * current.processes == first.effective_batch
            words.append(found[1].partition(",")[0])
        return words

    sft = TrainSftSettings(effective_batch=12, micro_batch=6)
    assert all_of(sft, SFT, cuda=False) == [
        "micro-batch 6 -> 3",
        "micro-batch 3 -> 1",
        "gradient checkpointing on",
    ]
    dpo = TrainDpoSettings(effective_batch=8, micro_batch=2)
    assert all_of(dpo, DPO, cuda=True) == ["activations wait in main memory", "micro-batch 2 -> 1"]
    # KTO's loss depends on the rows that are paired in a micro-batch, of which it needs a few.
    kto = TrainKtoSettings(effective_batch=16, micro_batch=8)
    assert all_of(kto, KTO, cuda=False) == ["gradient checkpointing on", "micro-batch 8 -> 4"]
