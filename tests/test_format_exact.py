"""What is trained is what the rollouts hold, to the bit: numbers, every plane of Unicode, tools of any shape."""

from __future__ import annotations

import json
import random
import shutil
import struct
from pathlib import Path
from typing import Any

import pytest

from gymtrl.formats.settings import FormatSftSettings
from gymtrl.formats.sft import format_sft

TAG = "<tool_call>\n"


def tool_rollout(arguments: str, tool: dict[str, Any] | None = None, answer: str = "Done.") -> dict[str, Any]:
    declared = tool or {"type": "function", "name": "weigh", "parameters": {"type": "object"}}
    output = [
        {"type": "function_call", "call_id": "c1", "name": declared["name"], "arguments": arguments},
        {"type": "function_call_output", "call_id": "c1", "output": "heavy"},
        {"type": "message", "role": "assistant", "content": [{"type": "output_text", "text": answer}]},
    ]
    return {
        "responses_create_params": {"input": [{"role": "user", "content": "Weigh it."}], "tools": [declared]},
        "response": {"output": output, "status": "completed", "model": "m"},
        "reward": 1.0,
        "agent_ref": {"name": "scales"},
    }


def formatted(rows: list[dict[str, Any]], model: Path, folder: Path) -> list[dict[str, Any]]:
    import pyarrow.parquet as pq

    source = folder / "rollouts.jsonl"
    source.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    result = format_sft(source, folder / "dataset", FormatSftSettings(model=str(model)))
    assert result.counts.dropped == {}
    return pq.read_table(folder / "dataset" / "data").to_pylist()


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory, smollm2_dir: Path) -> Path:
    """The real tokenizer with a chat template that knows tools."""
    import trl
    from transformers import AutoConfig, AutoTokenizer

    folder = tmp_path_factory.mktemp("model")
    tokenizer = AutoTokenizer.from_pretrained(smollm2_dir)
    template = Path(trl.__file__).parent / "chat_templates" / "qwen2_5.jinja"
    tokenizer.chat_template = template.read_text(encoding="utf-8")
    tokenizer.save_pretrained(folder)
    config = AutoConfig.from_pretrained(smollm2_dir)
    config.max_position_embeddings = 10**6
    config.save_pretrained(folder)
    return folder


def decoded(row: dict[str, Any], model: Path) -> str:
    """The text of the tokens that carry loss."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    trained = [label for label in row["labels"] if label != -100]
    return str(tokenizer.decode(trained, clean_up_tokenization_spaces=False))


def numbers() -> list[float | int]:
    draw = random.Random(0)
    found: list[float | int] = []
    while len(found) < 10_000:
        (value,) = struct.unpack("<d", draw.randbytes(8))
        if value == value and abs(value) != float("inf"):
            found.append(value)
    return [*found, -0.0, 5e-324, 2.0**1023, 0.1 + 0.2, 2**64, 2**64 + 1, -(2**63) - 1, 10**40]


def test_numbers_are_exact_in_the_record_and_in_the_tokens(model: Path, tmp_path: Path) -> None:
    values = numbers()
    batches = [values[start : start + 500] for start in range(0, len(values), 500)]
    rows = formatted([tool_rollout(json.dumps({"x": batch})) for batch in batches], model, tmp_path)
    for batch, row in zip(batches, rows, strict=True):
        record = json.loads(row["record_json"])
        kept = record["completion"][0]["tool_calls"][0]["function"]["arguments"]["x"]
        call = decoded(row, model).split(TAG)[1].split("\n</tool_call>")[0]
        trained = json.loads(call)["arguments"]["x"]
        for source, stored, learned in zip(batch, kept, trained, strict=True):
            assert repr(source) == repr(stored) == repr(learned)


def planes() -> list[str]:
    texts = []
    for plane in range(17):
        start = plane << 16
        points = [point for point in range(start, start + 0x10000, 37) if not 0xD800 <= point <= 0xDFFF]
        texts.append("a" + "".join(chr(point) for point in points if point > 31) + "z")
    return texts


def test_every_plane_of_unicode_is_trained_as_it_is(model: Path, tmp_path: Path) -> None:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    # A vocabulary with every byte; that of SmolLM2 lacks some.
    bytewise = Tokenizer(models.BPE())
    bytewise.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bytewise.decoder = decoders.ByteLevel()
    marks = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    bytewise.train_from_iterator([], trainers.BpeTrainer(special_tokens=marks, initial_alphabet=alphabet))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bytewise, eos_token="<|im_end|>", pad_token="<|endoftext|>")
    tokenizer.chat_template = AutoTokenizer.from_pretrained(model).chat_template
    whole = tmp_path / "whole"
    shutil.copytree(model, whole, ignore=shutil.ignore_patterns("tokenizer*", "special*", "vocab*", "merges*"))
    tokenizer.save_pretrained(whole)
    texts = planes()
    rows = formatted([tool_rollout(json.dumps({"t": text}), answer=text) for text in texts], whole, tmp_path)
    for text, row in zip(texts, rows, strict=True):
        record = json.loads(row["record_json"])
        assert record["completion"][-1]["content"] == text
        assert record["completion"][0]["tool_calls"][0]["function"]["arguments"] == {"t": text}
        trained = decoded(row, whole)
        call = trained.split(TAG)[1].split("\n</tool_call>")[0]
        assert json.loads(call)["arguments"] == {"t": text}
        assert trained.endswith(f"{text}<|im_end|>")


def test_characters_that_a_vocabulary_lacks_are_not_lost_silently(model: Path, tmp_path: Path) -> None:
    import pyarrow.parquet as pq

    rollouts = [tool_rollout("{}", answer=text) for text in (*planes(), "plain")]
    source = tmp_path / "rollouts.jsonl"
    source.write_text("".join(json.dumps(rollout) + "\n" for rollout in rollouts))
    format_sft(source, tmp_path / "dataset", FormatSftSettings(model=str(model)))
    kept = pq.read_table(tmp_path / "dataset" / "data").to_pylist()
    dropped = pq.read_table(tmp_path / "dataset" / "dropped.parquet").to_pylist()
    assert {row["reason"] for row in dropped} == {"character_lost"} and "U+40000" in str(dropped)
    assert len(kept) + len(dropped) == 18
    for row in kept:
        text = json.loads(row["record_json"])["completion"][-1]["content"]
        assert decoded(row, model).endswith(f"{text}<|im_end|>")


def test_tools_of_any_shape_reach_the_trainer_without_a_none_key(model: Path, tmp_path: Path) -> None:
    from datasets import load_dataset

    tools = [
        {
            "type": "function",
            "name": "weigh",
            "parameters": {"type": "object", "properties": {"x": {"type": "number"}}},
        },
        {"type": "function", "name": "move", "parameters": {"type": "object", "required": ["to"], "default": None}},
        {"type": "function", "name": "look", "description": "Looks."},
    ]
    arguments = [{"x": 1.5, "deep": {"a": [1, None]}}, {"to": ["here", {"z": 1}]}, {}]
    rollouts = [tool_rollout(json.dumps(a), t) for a, t in zip(arguments, tools, strict=True)]
    formatted(rollouts, model, tmp_path)
    loaded = load_dataset(str(tmp_path / "dataset"), split="train", cache_dir=str(tmp_path / "cache"))
    mapped = loaded.map(lambda row: {"length": len(row["input_ids"])})
    for row, given, tool in zip(mapped, arguments, tools, strict=True):
        assert row["completion"][0]["tool_calls"][0]["function"]["arguments"] == given
        declared = {key: value for key, value in tool.items() if key != "type"}
        assert row["tools"] == [{"type": "function", "function": declared}]
        assert row["completion"][0]["content"] == "" and "reasoning_content" not in row["completion"][0]
        assert set(row["completion"][1]) == {"role", "content", "tool_call_id", "name"}
        strangers = {"x", "deep", "to"} - set(given) - set(tool.get("parameters", {}).get("properties", {}))
        assert not any(f'"{name}":' in decoded(row, model) for name in strangers)
    batch = batch_of_one_step(mapped.select_columns(["input_ids", "labels"]), model, tmp_path)
    assert sorted(batch) == sorted((row["input_ids"], row["labels"]) for row in mapped)


def batch_of_one_step(rows: Any, model: Path, folder: Path) -> list[tuple[list[int], list[int]]]:
    """What TRL's trainer is given to learn from, in a step that it really takes."""
    import torch
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM
    from trl import SFTConfig, SFTTrainer

    tokenizer = AutoTokenizer.from_pretrained(model)
    size = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    torch.manual_seed(0)
    tiny = LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), num_key_value_heads=2, **size))
    seen: list[tuple[list[int], list[int]]] = []

    class Watched(SFTTrainer):
        def compute_loss(self, net: Any, inputs: dict[str, Any], *more: Any, **others: Any) -> Any:
            for ids, labels, mask in zip(inputs["input_ids"], inputs["labels"], inputs["attention_mask"], strict=True):
                seen.append((ids[mask == 1].tolist(), labels[mask == 1].tolist()))
            return super().compute_loss(net, inputs, *more, **others)

    arguments = SFTConfig(
        output_dir=str(folder / "run"),
        max_length=None,
        max_steps=1,
        per_device_train_batch_size=len(rows),
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        report_to="none",
        save_strategy="no",
    )
    Watched(model=tiny, args=arguments, train_dataset=rows, processing_class=tokenizer).train()
    return seen


def test_shipped_rollouts_become_rows(gym_site_packages: Path, model: Path, tmp_path: Path) -> None:
    """Of all sound rollouts without images that Gym ships, length aside."""
    import pyarrow.parquet as pq
    import trl
    from transformers import AutoTokenizer

    from gymtrl.rollouts.reader import read_bytes, read_lines

    thinking = tmp_path / "model"
    shutil.copytree(model, thinking)
    tokenizer = AutoTokenizer.from_pretrained(model)
    template = Path(trl.__file__).parent / "chat_templates" / "qwen3.jinja"
    tokenizer.chat_template = template.read_text(encoding="utf-8")
    tokenizer.save_pretrained(thinking)
    sound = [line for line in read_lines(sorted(gym_site_packages.rglob("*rollout*.jsonl"))) if line.verdict == "ok"]
    source = tmp_path / "rollouts.jsonl"
    source.write_bytes(b"".join(read_bytes(line.origin) + b"\n" for line in sound))
    images = [
        line
        for line in sound
        if line.rollout and any(m.images for m in (*line.rollout.prompt, *line.rollout.completion))
    ]
    result = format_sft(source, tmp_path / "dataset", FormatSftSettings(model=str(thinking)))
    counts = result.counts
    assert counts.read == len(sound) == counts.written + sum(counts.dropped.values())
    assert counts.dropped["images_in_text_model"] == len(images) > 0
    assert counts.written >= 0.95 * (len(sound) - len(images))
    kept = pq.read_table(tmp_path / "dataset" / "data", columns=["line"])["line"].to_pylist()
    dropped = pq.read_table(tmp_path / "dataset" / "dropped.parquet", columns=["line"])["line"].to_pylist()
    assert sorted({*kept, *dropped}) == list(range(1, len(sound) + 1)) and not set(kept) & set(dropped)
