"""Every objective trains, and to the same numbers as a plain script with the same trainer."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from gymtrl import (
    FormatDpoSettings,
    FormatGrpoSettings,
    FormatKtoSettings,
    FormatSftSettings,
    RecordedGroupConfig,
    RecordedGroupTrainer,
    TokenDPOTrainer,
    TokenKTOTrainer,
    TrainDpoSettings,
    TrainGrpoSettings,
    TrainKtoSettings,
    TrainSftSettings,
    UserError,
    format_dpo,
    format_grpo,
    format_kto,
    format_sft,
    recompute_log_probs,
    train,
)
from gymtrl.training.settings import TrainSettings
from rows import write_rows
from tiny import filtered, metrics, sums, tiny_llama

SETTINGS: dict[str, type[TrainSettings]] = {
    "sft": TrainSftSettings,
    "dpo": TrainDpoSettings,
    "kto": TrainKtoSettings,
    "grpo": TrainGrpoSettings,
}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory, smollm2_dir: Path) -> Path:
    return tiny_llama(tmp_path_factory.mktemp("tiny") / "model", smollm2_dir)


@pytest.fixture(scope="module")
def datasets(tmp_path_factory: pytest.TempPathFactory, model: Path) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("datasets")
    rows = sums(12)
    source = write_rows(folder / "rollouts.jsonl", rows)
    made = {"sft": folder / "sft", "dpo": folder / "dpo", "kto": folder / "kto", "grpo": folder / "grpo"}
    kept = filtered(folder / "filtered", rows[:20], rows[20:])
    format_sft(kept, made["sft"], FormatSftSettings(model=str(model)))
    format_dpo(source, made["dpo"], FormatDpoSettings(model=str(model)))
    format_kto(source, made["kto"], FormatKtoSettings(model=str(model)))
    format_grpo(source, made["grpo"], FormatGrpoSettings(model=str(model), kind="groups"))
    return made


def settings(name: str, **fields: Any) -> TrainSettings:
    sizes = {"effective_batch": 8 if name == "kto" else 4, "learning_rate": 0.01, "lora_r": 4, "lora_alpha": 4}
    return SETTINGS[name](**sizes | {"max_steps": 4} | fields)


def plain_sft(dataset: Path, model: Path, options: dict[str, Any], peft: Any) -> Any:
    from trl import SFTConfig, SFTTrainer

    rows = rows_of(dataset).select_columns(["input_ids", "labels"])
    return SFTTrainer(
        str(model),
        args=SFTConfig(train_sampling_strategy="batch_rebalance", **options),
        train_dataset=rows,
        peft_config=peft,
    )


def rows_of(dataset: Path) -> Any:
    from datasets import load_dataset

    return load_dataset(str(dataset), split="train").shuffle(seed=0)


def plain_dpo(dataset: Path, model: Path, options: dict[str, Any], peft: Any) -> Any:
    from trl import DPOConfig

    config = DPOConfig(loss_type=["sigmoid", "sft"], **options)
    return TokenDPOTrainer(str(model), args=config, train_dataset=rows_of(dataset), peft_config=peft)


def plain_kto(dataset: Path, model: Path, options: dict[str, Any], peft: Any) -> Any:
    from trl import KTOConfig

    extra = json.loads((dataset / "manifest.json").read_text())["extra"]
    weights = {name: extra[name] for name in ("desirable_weight", "undesirable_weight")}
    config = KTOConfig(train_sampling_strategy="sequential", **weights, **options)
    return TokenKTOTrainer(str(model), args=config, train_dataset=rows_of(dataset), peft_config=peft)


def plain_grpo(dataset: Path, model: Path, options: dict[str, Any], peft: Any) -> Any:
    options = {name: value for name, value in options.items() if name != "max_length"}
    rows = recompute_log_probs(str(model), rows_of(dataset))
    config = RecordedGroupConfig(lr_scheduler_type="constant", **options)
    return RecordedGroupTrainer(str(model), config, rows, peft_config=peft)


PLAIN: dict[str, Callable[..., Any]] = {"sft": plain_sft, "dpo": plain_dpo, "kto": plain_kto, "grpo": plain_grpo}


@pytest.mark.parametrize(
    ("name", "method"),
    [
        ("sft", "lora"),
        ("dpo", "full"),
        ("kto", "lora"),
        ("grpo", "full"),
        *(
            pytest.param(name, method, marks=pytest.mark.long)
            for name, method in (("sft", "full"), ("dpo", "lora"), ("kto", "full"), ("grpo", "lora"))
        ),
    ],
)
def test_loss_and_weights_equal_those_of_a_plain_script(
    name: str, method: str, datasets: dict[str, Path], model: Path, tmp_path: Path
) -> None:
    from peft import LoraConfig

    result = train(datasets[name], tmp_path / "run", settings(name, method=method))
    micro = 4 if name == "kto" else 1
    options = {
        "output_dir": str(tmp_path / "plain"),
        "per_device_train_batch_size": micro,
        "gradient_accumulation_steps": (8 if name == "kto" else 4) // micro,
        "max_steps": 4,
        "learning_rate": 0.01,
        "warmup_steps": 0,
        "max_length": None,
        "gradient_checkpointing": False,
        "seed": 0,
        "use_cpu": True,
        "bf16": False,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
    }
    lora = LoraConfig(r=4, lora_alpha=4, lora_dropout=0.0, target_modules="all-linear", task_type="CAUSAL_LM")
    trainer = PLAIN[name](datasets[name], model, options, lora if method == "lora" else None)
    trainer.train()
    ours = [line["loss"] for line in metrics(tmp_path / "run")]
    theirs = [line["loss"] for line in trainer.state.log_history if "loss" in line]
    assert ours == pytest.approx(theirs, abs=1e-6)
    merged = trainer.model.merge_and_unload() if method == "lora" else trainer.model
    weights = load_file(result.model / "model.safetensors")
    expected = merged.state_dict()
    assert max(float((weights[key] - expected[key]).abs().max()) for key in weights) <= 1e-6


def test_an_adapter_is_trained_on(datasets: dict[str, Path], model: Path, tmp_path: Path) -> None:
    import torch

    first = train(datasets["sft"], tmp_path / "first", settings("sft"))
    assert first.adapter is not None
    second = train(datasets["dpo"], tmp_path / "second", settings("dpo", adapter=str(first.adapter), max_steps=2))
    assert second.adapter is not None
    before, after = (load_file(run / "adapter_model.safetensors") for run in (first.adapter, second.adapter))
    assert before.keys() == after.keys()
    assert not all(torch.equal(before[name], after[name]) for name in before)
    # Its first step starts from the adapter, which is the reference as well.
    assert metrics(tmp_path / "second")[0]["rewards/margins"] == pytest.approx(0.0, abs=1e-6)


def test_an_adapter_of_another_model_is_refused(
    datasets: dict[str, Path], model: Path, tmp_path: Path, smollm2_dir: Path
) -> None:
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    def adapter(folder: Path, base: Path) -> Path:
        lora = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")
        get_peft_model(AutoModelForCausalLM.from_pretrained(base), lora).save_pretrained(folder)
        return folder

    named = adapter(tmp_path / "named", tiny_llama(tmp_path / "other", smollm2_dir))
    shaped = adapter(tmp_path / "shaped", tiny_llama(tmp_path / "x" / "model", smollm2_dir, hidden_size=16))
    shutil.rmtree(tmp_path / "x")  # else it is known to be another folder
    for folder, message in ((named, "was trained on"), (shaped, "does not fit"), (model, "is no LoRA adapter")):
        with pytest.raises(UserError, match=message):
            train(datasets["sft"], tmp_path / "run", settings("sft", adapter=str(folder)))
    assert not (tmp_path / "run").exists()


def test_a_dataset_of_another_objective_is_refused(datasets: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no column input_ids") as caught:
        train(datasets["dpo"], tmp_path / "run", settings("sft"))
    assert "'format dpo'" in (caught.value.remedy or "")


def test_options_are_passed_on_and_mistakes_in_them_named(datasets: dict[str, Path], tmp_path: Path) -> None:
    chosen = settings("dpo", trl={"label_smoothing": 0.1, "loss_type": "ipo"})
    with pytest.raises(UserError, match="'loss_type' is set by 'loss_type'"):
        train(datasets["dpo"], tmp_path / "run", chosen)
    with pytest.raises(UserError, match="did you mean 'lora_dropout'"):
        train(datasets["dpo"], tmp_path / "run", settings("dpo", peft={"lora_dropuot": 0.1}))
    with pytest.raises(UserError, match="quantization is for method qlora"):
        train(datasets["dpo"], tmp_path / "run", settings("dpo", quantization={"load_in_8bit": True}))
    result = train(datasets["sft"], tmp_path / "run", settings("sft", max_steps=1, peft={"use_rslora": True}))
    assert result.adapter is not None
    assert json.loads((result.adapter / "adapter_config.json").read_text())["use_rslora"] is True
