"""Tiny models of random weights and datasets for them, for tests that train."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from rows import row, write_rows


def tiny_llama(folder: Path, tokenizer: Path, **changes: Any) -> Path:
    """Saves a Llama of two layers with the tokenizer of another model; returns its folder."""
    import torch
    from transformers import AutoTokenizer, GenerationConfig, LlamaConfig, LlamaForCausalLM

    AutoTokenizer.from_pretrained(tokenizer).save_pretrained(folder)
    torch.manual_seed(0)
    sizes: dict[str, Any] = {
        "hidden_size": 8,
        "intermediate_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "max_position_embeddings": 1024,
    }
    config = LlamaConfig(vocab_size=49152, tie_word_embeddings=True, bos_token_id=1, eos_token_id=2, **sizes | changes)
    model = LlamaForCausalLM(config)
    model.generation_config = GenerationConfig(eos_token_id=2, temperature=0.7, do_sample=True)
    model.save_pretrained(folder)
    return folder


def sums(tasks: int, *, words: int = 0) -> list[dict[str, Any]]:
    """Rows of `tasks` sums, each with a right and a wrong answer of some length."""
    made = []
    for number in range(tasks):
        for repeat, (answer, reward) in enumerate(((2 * number, 1.0), (2 * number + 1, 0.0))):
            said = f"{number} + {number} = {answer}" + " indeed" * (words + number % 5)
            made.append(row(f"{number} + {number} =", said, reward, index=number, repeat=repeat))
    return made


def filtered(folder: Path, rows: list[dict[str, Any]], held_out: list[dict[str, Any]]) -> Path:
    """A filter folder of good rows."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, part in (("train", rows), ("validation", held_out)):
        write_rows(folder / f"{name}.jsonl", [made for made in part if made["reward"] == 1.0])
    return folder


def metrics(run: Path) -> list[dict[str, Any]]:
    """The training steps of a run."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if "loss" in line]
