"""Labelled rollouts: mixed, weighted, and with the same tokens as every other dataset."""

from __future__ import annotations

from collections import Counter
from itertools import pairwise
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from gymtrl import (
    FilterSettings,
    FormatDpoSettings,
    FormatKtoSettings,
    FormatSftSettings,
    UserError,
    filter_rollouts,
    format_dpo,
    format_kto,
    format_sft,
)
from rows import row, write_rows
from tool_rows import tool_row

COLLECTED = Path(__file__).parent / "data" / "reasoning-gym-8x.jsonl"


def rows_of(folder: Path) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = pq.read_table(next((folder / "data").glob("train-*"))).to_pylist()
    return rows


def test_labels_are_mixed_and_the_weights_balance_them(tmp_path: Path, smollm2_dir: Path) -> None:
    filter_rollouts([COLLECTED], tmp_path / "filtered", FilterSettings(validation=0.25, reward_threshold=1.0))
    model = str(smollm2_dir)
    result = format_kto(tmp_path / "filtered", tmp_path / "out", FormatKtoSettings(model=model))
    rows = rows_of(result.path)
    assert result.rows["validation"]
    assert all(entry["label"] == (entry["reward"] >= 1.0) for entry in rows)
    labels = [entry["label"] for entry in rows]
    good, bad = labels.count(True), labels.count(False)
    assert (result.facts["good"], result.facts["bad"]) == (good, bad)  # of what is trained on
    weighed = good * result.facts["desirable_weight"] / (bad * result.facts["undesirable_weight"])
    assert 1 - 1e-9 <= weighed <= 4 / 3 + 1e-9
    assert sum(left != right for left, right in pairwise(labels)) > good  # good ones stand alone among the bad
    assert max(Counter((entry["task_key"], entry["label"]) for entry in rows).values()) == 4
    script = (result.path / "train_with_trl.py").read_text()
    assert f"desirable_weight={result.facts['desirable_weight']}," in script
    other = rows_of(format_kto(tmp_path / "filtered", tmp_path / "b", FormatKtoSettings(model=model, seed=1)).path)
    assert [entry["row_id"] for entry in other] != [entry["row_id"] for entry in rows]


@pytest.mark.parametrize("tools", [True, False])
def test_sft_dpo_and_kto_agree_on_the_tokens_of_a_rollout(
    tools: bool, tmp_path: Path, smollm2_dir: Path, smollm2_tools_dir: Path
) -> None:
    model, source = str(smollm2_dir), COLLECTED
    if tools:
        steps = [("stone", "12 pounds"), ("feather", "nothing")]
        pair = [tool_row("Weigh.", steps[:n], f"answer {n}", float(n == 2), repeat=n) for n in (1, 2)]
        model, source = str(smollm2_tools_dir), write_rows(tmp_path / "rollouts.jsonl", pair)
    sft = rows_of(format_sft(source, tmp_path / "sft", FormatSftSettings(model=model)).path)
    wanted = {entry["row_id"]: (entry["input_ids"], [int(label != -100) for label in entry["labels"]]) for entry in sft}
    settings = FormatDpoSettings(model=model, reward_threshold=1.0, kind="trajectory")
    found: list[tuple[str, list[int], list[int], list[int]]] = []
    for entry in rows_of(format_dpo(source, tmp_path / "dpo", settings).path):
        for side in ("chosen", "rejected"):
            tokens = (entry["prompt_ids"], entry[f"{side}_ids"], entry[f"{side}_mask"])
            found.append((entry[f"{side}_row_id"], *tokens))
    kto = rows_of(format_kto(source, tmp_path / "kto", FormatKtoSettings(model=model, reward_threshold=1.0)).path)
    found += [(e["row_id"], e["prompt_ids"], e["completion_ids"], e["completion_mask"]) for e in kto]
    assert len(found) == (4 if tools else 16 + 71)
    for row_id, prompt, ids, mask in found:
        assert (prompt + ids, [0] * len(prompt) + mask) == wanted[row_id]


def test_when_all_of_a_kind_is_dropped_it_is_told_why(tmp_path: Path, smollm2_dir: Path) -> None:
    rows = [row("q", "right " * 90, 1.0), row("q", "wrong", 0.0, repeat=1)]
    settings = FormatKtoSettings(model=str(smollm2_dir), max_length=64)
    with pytest.raises(UserError, match="no good row is left of 2 lines: 1 too_long") as caught:
        format_kto(write_rows(tmp_path / "r.jsonl", rows), tmp_path / "out", settings)
    assert "max-length" in (caught.value.remedy or "") and not (tmp_path / "out").exists()
