"""`format sft`: the folder loads as it is, every row is there or has a reason, and plain TRL trains on it."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from gymtrl.errors import UserError
from gymtrl.formats.settings import FormatSftSettings
from gymtrl.formats.sft import format_sft
from gymtrl.formats.source import format_inputs
from gymtrl.workspace.artefact import read_manifest, up_to_date


def row(question: str, answer: str, **fields: Any) -> dict[str, Any]:
    output = [{"type": "message", "role": "assistant", "content": [{"type": "output_text", "text": answer}]}]
    return {
        "responses_create_params": {"input": [{"role": "user", "content": question}]},
        "response": {"output": output, "status": "completed", "model": "m"},
        "reward": 1.0,
        "agent_ref": {"name": "arithmetic"},
    } | fields


def tool_row() -> dict[str, Any]:
    tool = {
        "type": "function",
        "name": "weigh",
        "parameters": {"type": "object", "properties": {"x": {"type": "number", "default": None}}},
    }
    arguments = json.dumps({"x": 0.7390571438903143, "tiny": 1e-12, "none": None, "nested": {"a": [1, None]}})
    output = [
        {"type": "function_call", "call_id": "c1", "name": "weigh", "arguments": arguments},
        {"type": "function_call_output", "call_id": "c1", "output": "heavy"},
        {"type": "message", "role": "assistant", "content": [{"type": "output_text", "text": "It is heavy."}]},
    ]
    made = row("Weigh it.", "")
    made["responses_create_params"]["tools"] = [tool]
    made["response"]["output"] = output
    return made


def write_lines(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(entry) + "\n" for entry in rows), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def tiny_model(tmp_path_factory: pytest.TempPathFactory, smollm2_dir: Path) -> Path:
    """A random Llama of two layers with the real tokenizer and a chat template that knows tools."""
    import torch
    import trl
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("tiny")
    tokenizer = AutoTokenizer.from_pretrained(smollm2_dir)
    template = Path(trl.__file__).parent / "chat_templates" / "qwen2_5.jinja"
    tokenizer.chat_template = template.read_text(encoding="utf-8")
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=512,
        tie_word_embeddings=True,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path) -> Path:
    base = tmp_path_factory.mktemp("format")
    source = base / "filtered"
    write_lines(
        source / "train.jsonl",
        [
            row("1 + 1 =", "1 + 1 = 2"),
            tool_row(),
            row("long?", "word " * 600),
            {"not": "a rollout"},
            row("cut?", "half an ans", response={**row("", "half an ans")["response"], "status": "incomplete"}),
        ],
    )
    write_lines(source / "validation.jsonl", [row("2 + 2 =", "2 + 2 = 4", reward=0.5)])
    format_sft(source, base / "dataset", FormatSftSettings(model=str(tiny_model)))
    return base / "dataset"


def test_every_line_is_written_or_dropped_with_a_reason(dataset: Path) -> None:
    manifest = json.loads((dataset / "manifest.json").read_text())
    counts = manifest["counts"]
    assert counts["read"] == 6 and counts["written"] == 3
    dropped = pq.read_table(dataset / "dropped.parquet").to_pylist()
    assert {entry["line"]: entry["reason"] for entry in dropped} == {
        3: "too_long",
        4: "reject:custom_record",
        5: "truncated",
    }
    assert all(entry["split"] == "train" and entry["detail"] for entry in dropped if entry["line"] != 4)
    assert manifest["extra"]["rows"] == {"train": 2, "validation": 1}
    assert set(manifest["extra"]["fingerprint"]) == {"tokenizer", "chat_template"}
    assert "tokenizer.json" in manifest["extra"]["tokenizer_files"]


def test_folder_loads_as_it_is_and_loses_nothing(dataset: Path, tmp_path: Path) -> None:
    from datasets import load_dataset

    loaded = load_dataset(str(dataset), cache_dir=str(tmp_path))
    assert {split: len(rows) for split, rows in loaded.items()} == {"train": 2, "validation": 1}
    assert loaded["validation"][0]["reward"] == 0.5
    tool = loaded["train"][1]
    record = json.loads(tool["record_json"])
    arguments = {"x": 0.7390571438903143, "tiny": 1e-12, "none": None, "nested": {"a": [1, None]}}
    assert record["completion"][0]["tool_calls"][0]["function"]["arguments"] == arguments
    assert (tool["prompt"], tool["tools"]) == (record["prompt"], record["tools"])
    # The view gains no key and loses none, but `datasets` reads it with a float parser that misses the last digit.
    view = tool["completion"][0]["tool_calls"][0]["function"]["arguments"]
    assert view == arguments | {"x": pytest.approx(arguments["x"], rel=1e-14)}
    assert tool["tools"][0]["function"]["parameters"]["properties"] == {"x": {"type": "number", "default": None}}
    for entry in (*loaded["train"], *loaded["validation"]):
        assert len(entry["input_ids"]) == len(entry["labels"])
        assert any(label != -100 for label in entry["labels"])
    assert len(tool["row_id"]) == 16 and tool["line"] == 2 and tool["task_key"] and tool["cluster_key"]


def test_plain_rollout_file_becomes_training_rows(tmp_path: Path, smollm2_dir: Path) -> None:
    source = write_lines(tmp_path / "rollouts.jsonl", [row("a?", "b"), tool_row()])
    result = format_sft(source, tmp_path / "out", FormatSftSettings(model=str(smollm2_dir)))
    assert result.rows == {"train": 1, "validation": 0}
    assert result.counts.dropped == {"template_without_tools": 1}
    assert not list((tmp_path / "out" / "data").glob("validation*"))


def test_max_length_drops_and_never_cuts(tmp_path: Path, smollm2_dir: Path) -> None:
    source = write_lines(tmp_path / "rollouts.jsonl", [row("a?", "b"), row("a?", "b " * 60)])
    settings = FormatSftSettings(model=str(smollm2_dir), max_length=64)
    result = format_sft(source, tmp_path / "out", settings)
    assert result.counts.dropped == {"too_long": 1} and result.longest <= 64


def test_keys_of_a_filter_folder_come_from_its_table(tmp_path: Path, smollm2_dir: Path) -> None:
    import polars as pl

    first = format_sft(
        write_lines(tmp_path / "a" / "train.jsonl", [row("a?", "b")]).parent,
        tmp_path / "one",
        FormatSftSettings(model=str(smollm2_dir)),
    )
    identity = pl.read_parquet(first.path / "data" / "train-*.parquet")["row_id"][0]
    table = {
        "row_id": [identity] * 2,
        "file": ["results/rollouts.jsonl"] * 2,
        "line": [17, 18],
        "cluster_key": ["template-3", "other"],
        "split": ["train", "dropped"],
    }
    pl.DataFrame(table).write_parquet(tmp_path / "a" / "table.parquet")
    format_sft(tmp_path / "a", tmp_path / "two", FormatSftSettings(model=str(smollm2_dir)))
    got = pl.read_parquet(tmp_path / "two" / "data" / "train-*.parquet").row(0, named=True)
    assert (got["file"], got["line"], got["cluster_key"]) == ("results/rollouts.jsonl", 17, "template-3")
    assert got["task_key"]


def test_lines_with_the_same_bytes_keep_their_places(tmp_path: Path, smollm2_dir: Path) -> None:
    import hashlib

    import polars as pl

    source = write_lines(tmp_path / "a" / "train.jsonl", [row("a?", "b")] * 2)
    identity = hashlib.sha256(source.read_bytes().splitlines()[0]).hexdigest()[:16]
    table = {"row_id": [identity] * 2, "file": ["x.jsonl", "y.jsonl"], "line": [5, 9], "split": ["train"] * 2}
    pl.DataFrame(table).write_parquet(tmp_path / "a" / "table.parquet")
    format_sft(source.parent, tmp_path / "out", FormatSftSettings(model=str(smollm2_dir)))
    got = pl.read_parquet(tmp_path / "out" / "data" / "train-*.parquet")
    assert list(got.select("file", "line").iter_rows()) == [("x.jsonl", 5), ("y.jsonl", 9)]


def test_a_changed_template_or_sidecar_makes_the_dataset_out_of_date(tmp_path: Path, smollm2_dir: Path) -> None:
    model = tmp_path / "model"
    model.mkdir()
    for path in smollm2_dir.glob("*.*"):
        if path.suffix != ".safetensors":
            shutil.copyfile(path, model / path.name)
    source = write_lines(tmp_path / "r.jsonl", [row("a?", "b")])
    settings = FormatSftSettings(model=str(model))
    out = format_sft(source, tmp_path / "out", settings).path

    def fresh() -> bool:
        inputs = format_inputs(source, settings)
        return up_to_date(out, verb="format sft", settings=settings, inputs=inputs) is not None

    assert fresh()
    assert not any(path.path.endswith(".safetensors") for path in read_manifest(out).inputs)
    template = model / "chat_template.jinja"
    written = template.read_text()
    template.write_text(written + " ")
    assert not fresh()
    template.write_text(written)
    assert fresh()
    write_lines(tmp_path / "r_materialized_inputs.jsonl", [{}])
    assert not fresh()


def test_mistakes_are_told_with_a_remedy(tmp_path: Path, smollm2_dir: Path) -> None:
    source = write_lines(tmp_path / "rollouts.jsonl", [tool_row()])
    good = FormatSftSettings(model=str(smollm2_dir))
    with pytest.raises(UserError, match=r"no training row is left of 1 lines: 1 template_without_tools") as caught:
        format_sft(source, tmp_path / "out", good)
    assert "knows tools" in (caught.value.remedy or "")
    assert not (tmp_path / "out").exists()
    with pytest.raises(UserError, match="does not exist"):
        format_sft(source, tmp_path / "out", FormatSftSettings(model=str(tmp_path / "no-model")))
    with pytest.raises(UserError, match="does not exist"):
        format_sft(tmp_path / "nothing.jsonl", tmp_path / "out", good)
    with pytest.raises(UserError, match=r"no train\.jsonl"):
        format_sft(tmp_path, tmp_path / "out", good)


def test_the_folders_own_script_trains_with_plain_trl(dataset: Path, tiny_model: Path, tmp_path: Path) -> None:
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_TELEMETRY": "1", "HF_HOME": str(tmp_path / "hf")}
    done = subprocess.run(
        [sys.executable, str(dataset / "train_with_trl.py"), str(tiny_model), str(tmp_path / "out")],
        env=environment,
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert (tmp_path / "out" / "model.safetensors").is_file()


def test_folders_of_one_name_load_their_own_rows(tiny_model: Path, tmp_path: Path) -> None:
    from datasets import load_dataset

    loaded = []
    for number, place in enumerate(("one", "two", "one")):
        source = write_lines(tmp_path / f"{number}.jsonl", [row(f"{number}?", "Yes.")])
        folder = tmp_path / place / "dataset"
        shutil.rmtree(folder, ignore_errors=True)
        format_sft(source, folder, FormatSftSettings(model=str(tiny_model)))
        rows = load_dataset(str(folder), split="train", cache_dir=str(tmp_path / "cache"))
        loaded.append(rows[0]["prompt"][0]["content"])
    assert loaded == ["0?", "1?", "2?"]


def test_settings_import_nothing_heavy() -> None:
    code = (
        "import sys, gymtrl.formats.settings, gymtrl.training.settings;"
        "print([m for m in ('torch', 'polars', 'datasets', 'transformers', 'pyarrow') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
