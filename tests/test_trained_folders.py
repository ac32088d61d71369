"""The folders that training leaves, as servers find them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from gymtrl import FormatSftSettings, RunError, TrainSftSettings, format_sft, train
from gymtrl.models.adapter import require_own_adapter, vllm_rank
from gymtrl.models.fingerprint import load_config
from gymtrl.training.export import export_model
from tiny import filtered, sums
from tiny_vision import tiny_qwen3_5


def test_adapter_and_model_are_plain_readable_folders(tmp_path: Path) -> None:
    config = LlamaConfig(
        vocab_size=32, hidden_size=8, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, dtype="bfloat16"
    )
    config.tie_word_embeddings = True
    lora = LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM")
    model = LlamaForCausalLM(config)
    model.to(torch.bfloat16).save_pretrained(tmp_path / "base")
    get_peft_model(model.float(), lora).save_pretrained(tmp_path / "checkpoint")
    export_model(tmp_path / "checkpoint", tmp_path, str(tmp_path / "base"), lora=True)

    adapter = {path.name: path for path in (tmp_path / "adapter").iterdir()}
    assert adapter.keys() == {"adapter_config.json", "adapter_model.safetensors"}
    # What one user trained, another one serves.
    for folder in ("adapter", "model"):
        for path in (tmp_path / folder).iterdir():
            assert path.stat().st_mode & 0o777 == (tmp_path / folder).stat().st_mode & 0o666, path
    merged = LlamaForCausalLM.from_pretrained(tmp_path / "model", dtype="auto")
    assert merged.dtype == torch.bfloat16
    assert merged.lm_head.weight is merged.model.embed_tokens.weight


def test_rank_that_vllm_is_started_with_holds_the_adapter() -> None:
    assert [vllm_rank(rank) for rank in (4, 16, 17, 32, 100, 300)] == [8, 16, 32, 32, 128, 320]


@pytest.fixture(scope="module")
def with_eyes(tmp_path_factory: pytest.TempPathFactory, smollm2_dir: Path) -> Path:
    """A folder with a Qwen3.5 (`model`), and a dataset made for it (`dataset`)."""
    folder = tmp_path_factory.mktemp("eyes")
    model = tiny_qwen3_5(folder / "model", smollm2_dir)
    source = filtered(folder / "filtered", sums(4), [])
    format_sft(source, folder / "dataset", FormatSftSettings(model=str(model)))
    return folder


@pytest.mark.parametrize("method", ["lora", "full"])
def test_a_model_with_eyes_is_exported_whole_and_trained(with_eyes: Path, tmp_path: Path, method: str) -> None:
    chosen = TrainSftSettings(method=method, max_steps=1, effective_batch=4, learning_rate=0.05, warmup_ratio=0)
    done = train(with_eyes / "dataset", tmp_path / "run", chosen)
    before, after = (load_file(folder / "model.safetensors") for folder in (with_eyes / "model", done.model))
    assert after.keys() == before.keys() and any(".visual." in name for name in after)
    layers = [name for name in after if ".language_model.layers." in name and name.endswith("_proj.weight")]
    assert layers and not any(torch.equal(before[name], after[name]) for name in layers)
    if done.adapter is not None:
        require_own_adapter(done.adapter, str(with_eyes / "model"), load_config(str(with_eyes / "model")))


def test_an_adapter_that_finds_no_layer_is_no_export(with_eyes: Path, tmp_path: Path, smollm2_dir: Path) -> None:
    base = with_eyes / "model"
    model = get_peft_model(
        AutoModelForCausalLM.from_pretrained(base),
        LoraConfig(r=2, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"),
    )
    model.save_pretrained(tmp_path / "checkpoint")  # of the text alone: its layers have other names
    with pytest.raises(RunError, match=r"8 weights of .* are not those of the model"):
        export_model(tmp_path / "checkpoint", tmp_path, str(base), lora=True)
