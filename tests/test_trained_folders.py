"""The folders that training leaves, as servers find them."""

from __future__ import annotations

from pathlib import Path


def test_adapter_and_model_are_plain_readable_folders(tmp_path: Path) -> None:
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaConfig, LlamaForCausalLM

    from gymtrl.training.export import export_model

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
    from gymtrl.training.export import vllm_rank

    assert [vllm_rank(rank) for rank in (4, 16, 17, 32, 100, 300)] == [8, 16, 32, 32, 128, 320]
