"""The training script of every dataset folder runs as it is, on the tokens of the folder, and saves a model."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerBase

from gymtrl import (
    FilterSettings,
    FormatDpoSettings,
    FormatGrpoSettings,
    FormatKtoSettings,
    FormatRewardSettings,
    FormatSftSettings,
    filter_rollouts,
    format_dpo,
    format_grpo,
    format_kto,
    format_reward,
    format_sft,
)
from rows import row, write_rows
from tool_rows import recorded, tool_row

pytestmark = pytest.mark.long

# Runs the script, then tells what its trainer was given and what it logged.
TELL = """
import json, runpy, sys
sys.argv = sys.argv[1:]
trainer = runpy.run_path(sys.argv[0], run_name="__main__")["trainer"]
rows = trainer.train_dataset
tokens = {name: rows[name][:] for name in rows.column_names if name.endswith(("_ids", "_mask"))}
print(json.dumps({"tokens": tokens, "log": trainer.state.log_history, "steps": trainer.state.global_step}))
"""


@pytest.fixture(scope="module")
def tiny_model(tmp_path_factory: pytest.TempPathFactory, smollm2_tools_dir: Path) -> Path:
    """A random Llama of two layers, with a template that tells an empty list of tools from none."""
    import torch

    folder = tmp_path_factory.mktemp("tiny")
    tokenizer = AutoTokenizer.from_pretrained(smollm2_tools_dir)
    tokenizer.chat_template = tokenizer.chat_template.replace("{%- if tools %}", "{%- if tools is not none %}")
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
def tokenizer(tiny_model: Path) -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(tiny_model)


def with_tools() -> list[dict[str, Any]]:
    """Two tasks with tools and one without, each with a good and a bad rollout, and a fifth rollout of the first."""
    made = []
    for repeat, (good, answer) in enumerate(((1.0, "heavy"), (0.0, "light"))):
        made.append(tool_row("Weigh it.", [("stone", "12 pounds")], answer, good, repeat=repeat))
        made.append(tool_row("And this?", [(answer, "3 pounds")], answer, good, index=1, repeat=repeat))
        made.append(row("2 + 2 =", "4" if good else "5", good, index=2, repeat=repeat))
    return [*made, tool_row("Weigh it.", [("stone", "13 pounds")], "who knows", 0.0, repeat=2)]


def rows_of(folder: Path) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = pq.read_table(next((folder / "data").glob("train-*"))).to_pylist()
    return rows


def trained(dataset: Path, model: Path) -> dict[str, Any]:
    """Runs the script of a dataset; returns what its trainer tells."""
    out = dataset.parent / "trained"
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(dataset.parent / "hf"), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", TELL, str(dataset / "train_with_trl.py"), str(model), str(out)],
        env=environment,
        cwd=dataset.parent,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert (out / "model.safetensors").is_file()
    told: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    assert told["steps"] > 0 and math.isfinite(told["log"][-1]["train_loss"])
    return told


def assert_same_tokens(told: dict[str, Any], rows: list[dict[str, Any]], columns: list[str]) -> None:
    for name in columns:
        assert told["tokens"][name] == [row[name] for row in rows], name


def test_sft(tmp_path: Path, tiny_model: Path) -> None:
    source = write_rows(tmp_path / "rollouts.jsonl", with_tools()[:3])
    dataset = format_sft(source, tmp_path / "dataset", FormatSftSettings(model=str(tiny_model))).path
    assert_same_tokens(trained(dataset, tiny_model), rows_of(dataset), ["input_ids"])


def test_dpo_on_single_turns_is_plain_trl_with_our_tokens(tmp_path: Path, tiny_model: Path) -> None:
    source = write_rows(tmp_path / "rollouts.jsonl", with_tools())
    dataset = format_dpo(source, tmp_path / "dataset", FormatDpoSettings(model=str(tiny_model))).path
    assert "gymtrl" not in (dataset / "train_with_trl.py").read_text().partition("import torch")[2]
    rows = rows_of(dataset)
    assert sorted(row["depth"] for row in rows) == [0, 0, 2] and [] in [row["tools"] for row in rows]
    # TRL renders the messages once more, and scores the line break behind the turn as well.
    assert_same_tokens(trained(dataset, tiny_model), rows, ["prompt_ids", "chosen_ids", "rejected_ids"])


def test_dpo_on_trajectories_masks_tool_results(tmp_path: Path, tiny_model: Path) -> None:
    many = [
        made | {"_ng_task_index": 3 * copy + made["_ng_task_index"]}
        for copy in range(4)
        for made in (
            tool_row(f"Weigh {copy}.", [("it", "9 pounds")], a, r) for a, r in (("heavy", 1.0), ("light", 0.0))
        )
    ]
    source = write_rows(tmp_path / "rollouts.jsonl", many)
    filter_rollouts([source], tmp_path / "filtered", FilterSettings(validation=0.4))
    settings = FormatDpoSettings(model=str(tiny_model), kind="trajectory")
    result = format_dpo(tmp_path / "filtered", tmp_path / "dataset", settings)
    assert result.rows["train"] and result.rows["validation"]
    columns = ["prompt_ids", "chosen_ids", "chosen_mask", "rejected_ids", "rejected_mask"]
    assert_same_tokens(trained(result.path, tiny_model), rows_of(result.path), columns)


def test_reward(tmp_path: Path, tiny_model: Path) -> None:
    source = write_rows(tmp_path / "rollouts.jsonl", with_tools())
    dataset = format_reward(source, tmp_path / "dataset", FormatRewardSettings(model=str(tiny_model))).path
    rows = rows_of(dataset)
    assert len(rows) == 3 and len({len(row["chosen_ids"]) for row in rows}) > 1  # something is padded
    assert_same_tokens(trained(dataset, tiny_model), rows, ["chosen_ids", "rejected_ids"])


def test_kto_with_a_last_batch_of_one_row(tmp_path: Path, tiny_model: Path) -> None:
    extra = [row("3 + 3 =", answer, float(answer == "6"), index=3) for answer in ("6", "7")]
    source = write_rows(tmp_path / "rollouts.jsonl", [*with_tools(), *extra])
    dataset = format_kto(source, tmp_path / "dataset", FormatKtoSettings(model=str(tiny_model))).path
    rows = rows_of(dataset)
    assert len(rows) % 4 == 1
    assert_same_tokens(trained(dataset, tiny_model), rows, ["prompt_ids", "completion_ids", "completion_mask"])


def groups(folder: Path, model: Path, tokenizer: PreTrainedTokenizerBase, *, log_probs: bool) -> Path:
    """A dataset of two groups, of which the log-probabilities, if there are any, are made up."""
    made = [
        recorded(tool_row(f"Weigh {task}.", [("it", "9 pounds")], f"{kind} {task}", reward, index=task), tokenizer)
        for task in range(2)
        for kind, reward in (("heavy", 1.0), ("light", 0.0), ("broken", None))
    ]
    if not log_probs:
        for item in (item for one in made for item in one["response"]["output"]):
            item.pop("prompt_token_ids", None)
    source = write_rows(folder / "rollouts.jsonl", made)
    return format_grpo(source, folder / "dataset", FormatGrpoSettings(model=str(model), kind="groups")).path


def test_groups_are_trained_on_and_what_the_world_spoiled_has_no_reward(
    tmp_path: Path, tiny_model: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    dataset = groups(tmp_path, tiny_model, tokenizer, log_probs=False)
    rows = rows_of(dataset)
    assert [row["reward"] for row in rows] == [1.0, 0.0, None] * 2
    assert {row["log_probs"] for row in rows} == {None}
    told = trained(dataset, tiny_model)
    valued = [row for row in rows if row["reward"] is not None]
    assert_same_tokens(told, valued, ["prompt_ids", "completion_ids", "completion_mask"])
    log = {name: value for entry in told["log"] for name, value in entry.items()}
    assert log["kl"] < 1e-9 and log["ratio/negatives"] == pytest.approx(1, abs=1e-4)


def test_groups_of_another_policy_are_refused(
    tmp_path: Path, tiny_model: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    dataset = groups(tmp_path, tiny_model, tokenizer, log_probs=True)
    assert all(row["log_probs"] for row in rows_of(dataset))
    with pytest.raises(AssertionError, match="the recorded log-probabilities are not those of this model"):
        trained(dataset, tiny_model)
