"""What ends a run before its last step holds when the run is taken up again."""

from __future__ import annotations

import io
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from datasets import Dataset
from rich.console import Console
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainerCallback, TrainerControl, TrainingArguments

from gymtrl import UserError
from gymtrl.doctor.run import RunRecord
from gymtrl.training.checkpoints import SaveLast, Seal, has_all_steps, last_sealed, stop_reason
from gymtrl.training.watch import Watch
from gymtrl.training.worker import EVAL_ROWS, evaluated_rows, is_out_of_memory, load_options


def model() -> LlamaForCausalLM:
    sizes = {"hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=32, **sizes))


def test_a_loss_that_is_no_number_stops_every_attempt(tmp_path: Path) -> None:
    steps = tuple({"step": step, "loss": 2.0 if step < 3 else math.nan, "grad_norm": 1.0} for step in (1, 2, 3))
    state, screen = SimpleNamespace(global_step=3, is_world_process_zero=True), io.StringIO()
    for _ in range(2):
        watch = Watch(RunRecord(objective="sft", steps=steps), tmp_path / "findings.json", Console(file=screen))
        control = TrainerControl()
        with pytest.raises(UserError, match="nan") as caught:
            watch.on_train_begin(None, state, control, model=model())
        assert caught.value.remedy and control.should_training_stop
        with pytest.raises(UserError):
            watch.require_sense()
    assert screen.getvalue().count("training stops here") == 1


class _StopAt(TrainerCallback):  # type: ignore[misc]
    """Stops a trainer after a step, as one does that has seen enough."""

    def __init__(self, trainer: Any, step: int) -> None:
        self.trainer, self.step = trainer, step

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.step:
            self.trainer.stop_reason = "it has seen enough"
            control.should_training_stop = True


@pytest.mark.parametrize("stop", [2, 9])
def test_a_checkpoint_knows_that_training_stopped_with_it(tmp_path: Path, stop: int) -> None:
    rows = [{"input_ids": torch.tensor([1, 2, 3]), "labels": torch.tensor([1, 2, 3])}] * 8
    options: dict[str, Any] = {"use_cpu": True, "report_to": "none", "disable_tqdm": True, "save_steps": 1}
    args = TrainingArguments(str(tmp_path), max_steps=3, per_device_train_batch_size=1, **options)
    trainer = Trainer(model(), args, train_dataset=rows, callbacks=[Seal()])
    trainer.add_callback(_StopAt(trainer, stop))
    trainer.add_callback(SaveLast(trainer))
    trainer.train()
    last = last_sealed(tmp_path)
    assert last is not None and last.name == f"checkpoint-{min(stop, 3)}" and has_all_steps(last)
    assert stop_reason(last) == ("it has seen enough" if stop == 2 else None)
    before = tmp_path / "checkpoint-1"
    assert not has_all_steps(before) and stop_reason(before) is None


def test_of_several_processes_each_holds_the_model_with_an_adapter_whole() -> None:
    args = SimpleNamespace(trust_remote_code=False, model_init_kwargs={"dtype": "float32"})
    alone = {"trust_remote_code": False, "dtype": "float32"}
    assert load_options(args, None, 1) == alone
    assert load_options(args, None, 2) == alone | {"device_map": None}
    assert load_options(args, "4 bits", 1) == alone | {"quantization_config": "4 bits"}


def test_a_library_on_the_gpu_that_gets_no_memory() -> None:
    words = "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"
    assert is_out_of_memory(RuntimeError(words))
    assert not is_out_of_memory(RuntimeError(words.replace("ALLOC_FAILED", "EXECUTION_FAILED")))


def test_validation_rows_are_drawn_from_the_whole_split_and_always_the_same() -> None:
    rows = Dataset.from_dict({"row": list(range(600))})  # as of two environments, one after the other
    drawn = list(evaluated_rows(rows, seed=3)["row"])
    assert len(set(drawn)) == EVAL_ROWS and 60 < sum(row >= 300 for row in drawn) < 140
    assert list(evaluated_rows(rows, seed=3)["row"]) == drawn
    assert list(evaluated_rows(rows.select(range(100)), seed=3)["row"]) == list(range(100))
