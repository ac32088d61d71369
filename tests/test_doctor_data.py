"""What `doctor` says before a run: of datasets by hand, and of those that the verbs make of rollouts."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from doctor_runs import (
    FIRST,
    KNOWN,
    LETTERS,
    WIDE,
    Rows,
    dataset,
    group_rows,
    pair_rows,
    sft_rows,
    text,
    unpaired_rows,
)
from gymtrl import (
    FilterSettings,
    FormatGrpoSettings,
    FormatSftSettings,
    TrainSftSettings,
    filter_rollouts,
    format_grpo,
    format_sft,
)
from gymtrl.doctor.diagnose import diagnose
from gymtrl.doctor.facts import data_facts
from gymtrl.doctor.finding import Finding
from gymtrl.doctor.run import DataFacts, RunRecord
from gymtrl.training.prepare import prepare
from rows import row, write_rows
from tiny import sums, tiny_llama


def codes(findings: list[Finding]) -> set[str]:
    return {finding.rule for finding in findings}


def long_prompts(count: int) -> Rows:
    shared = text(KNOWN, 125, random.Random(1))
    labels = [-100] * 125 + shared[-1:]
    return [{"input_ids": [FIRST + at % LETTERS, *shared], "labels": labels} for at in range(count)]


def changed(rows: Rows, change: Callable[[dict[str, Any]], dict[str, Any]]) -> Rows:
    return [row | change(row) for row in rows]


def long_side(row: dict[str, Any]) -> dict[str, Any]:
    return {"rejected_ids": row["rejected_ids"][:6], "rejected_mask": row["rejected_mask"][:6]}


SAME_SIDES = changed(pair_rows(80), lambda row: {"rejected_ids": row["chosen_ids"]})
BAD_ONLY = changed(unpaired_rows(pair_rows(40)), lambda row: {"label": False})
SHORT_BAD = changed(
    unpaired_rows(pair_rows(60)), lambda row: {} if row["label"] else {"completion_mask": [1] * 6 + [0] * 6}
)
BEFOREHAND: dict[str, tuple[str, Rows, dict[str, Any], dict[str, Any], str]] = {
    "few_loss_tokens": ("sft", long_prompts(120), {}, {}, "120 of 15,120 tokens carry loss (0.79%)"),
    "duplicates": ("sft", sft_rows(100) + sft_rows(20), {}, {}, "20 of 120 rows stand in the data already"),
    "length_bias": (
        "dpo",
        changed(pair_rows(100), long_side),
        {},
        {},
        "median length 12 tokens of the good side, 6 of the bad; the good one is longer in 100% of the pairs",
    ),
    "few_rows": ("sft", sft_rows(30), {}, {}, "30 rows of 30 tasks"),
    "pairs_identical": (
        "dpo",
        SAME_SIDES + SAME_SIDES[:30],
        {},
        {},
        "all 110 pairs have the same tokens on both sides",
    ),
    "some_pairs_identical": (
        "dpo",
        SAME_SIDES[:10] + pair_rows(100),
        {},
        {},
        "10 of 110 pairs have the same tokens on both sides",
    ),
    "one_label": ("kto", BAD_ONLY, {}, {}, "0 good and 40 bad rows"),
    "weights_unbalanced": (
        "kto",
        changed(unpaired_rows(pair_rows(100)), lambda row: {"label": row["label"] and row["task_key"][-1] < "4"}),
        {},
        {},
        "20 good rows of weight 1 against 80 bad ones of weight 1: 0.25 to 1",
    ),
    "groups_all_alike": ("grpo", group_rows([[1.0] * 4, [0.0, None, 0.0, 0.0]] * 20), {}, {}, "in all 40 groups"),
    "length_bias_unpaired": (
        "kto",
        SHORT_BAD,
        {},
        {},
        "median length 12 tokens of the good side, 6 of the bad",
    ),
    "groups_alike": ("grpo", group_rows([[1.0] * 4] * 30 + WIDE), {}, {}, "30 of 55 groups"),
}


FROM_ROLLOUTS = {"long_rows_lost", "batch_larger_than_data", "few_steps", "few_rows", "groups_alike"}


@pytest.mark.parametrize("code", BEFOREHAND)
def test_a_real_dataset_provokes_each_rule_about_data(tmp_path: Path, code: str) -> None:
    objective, rows, manifest, plan, evidence = BEFOREHAND[code]
    data = data_facts(dataset(tmp_path / "data", rows, **manifest))
    record = RunRecord(objective, **{"data": data, "planned_steps": 50, "effective_batch": 8} | plan)
    found = {finding.rule: finding for finding in diagnose(record, "preflight")}
    assert code in found and found[code].evidence.startswith(evidence), found
    also = {"few_rows", "pairs_identical", "duplicates", "few_loss_tokens", "length_bias", "weights_unbalanced"}
    assert found.keys() <= {code} | also


def test_length_of_kto_rows_and_weights_of_the_dataset(tmp_path: Path) -> None:
    facts = data_facts(dataset(tmp_path / "short", SHORT_BAD))
    assert (facts.good, facts.bad, facts.good_length, facts.bad_length) == (30, 30, 12, 6)
    assert codes(diagnose(RunRecord("kto", data=facts), "preflight")) == {"length_bias_unpaired", "few_rows"}
    rows = changed(unpaired_rows(pair_rows(100)), lambda row: {"label": row["task_key"][-1] < "2"})
    weighted = dataset(tmp_path / "weighted", rows, extra={"desirable_weight": 4.5, "undesirable_weight": 1.0})
    record = RunRecord("kto", data=data_facts(weighted))
    assert diagnose(record, "preflight") == []
    assert codes(diagnose(dataclasses.replace(record, desirable_weight=1.0), "preflight")) == {"weights_unbalanced"}


def test_facts_are_those_of_the_rows(tmp_path: Path) -> None:
    rows = pair_rows(50)
    assert data_facts(dataset(tmp_path / "pairs", rows, validation=pair_rows(9, seed=5))) == DataFacts(
        rows=50,
        tokens=50 * 2 * 17,
        loss_tokens=50 * 24,
        longest=17,
        tasks=50,
        read=50,
        good_length=12,
        bad_length=12,
    )
    groups = data_facts(dataset(tmp_path / "groups", group_rows([[1.0, None], [0.5, 0.5], [0.0, 1.0]])))
    assert (groups.groups, groups.groups_alike, groups.rows, groups.tasks) == (3, 2, 6, 3)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory, smollm2_dir: Path) -> str:
    return str(tiny_llama(tmp_path_factory.mktemp("base") / "model", smollm2_dir))


def cut_off(made: dict[str, Any]) -> dict[str, Any]:
    return made | {"response": made["response"] | {"status": "incomplete"}}


def test_what_the_verbs_make_of_rollouts_provokes_rules_about_the_plan(tmp_path: Path, base: str) -> None:
    rows = [cut_off(made) if made["_ng_task_index"] % 4 == 0 else made for made in sums(20)]
    source = write_rows(tmp_path / "rollouts.jsonl", rows)
    filter_rollouts([source], tmp_path / "filtered", FilterSettings(validation=0))
    format_sft(tmp_path / "filtered", tmp_path / "sft", FormatSftSettings(model=base))
    settings = TrainSftSettings(method="full", max_steps=3, effective_batch=64)
    found = {finding.rule: finding for finding in prepare(tmp_path / "sft", settings).findings}
    assert {rule: finding.evidence for rule, finding in found.items()} == {
        "long_rows_lost": "of 40 lines 10 truncated",
        "batch_larger_than_data": "15 rows, 64 of them in an optimizer step",
        "few_steps": "3 optimizer steps",
        "few_rows": "15 rows of 15 tasks",
    }
    assert found["few_steps"].remedy == (
        "Train with a smaller --effective-batch, or on more rollouts: 15 rows in more passes are learned by heart"
    )
    assert found.keys() <= FROM_ROLLOUTS
    settings = TrainSftSettings(method="full", max_steps=3, effective_batch=2)
    (few,) = [f for f in prepare(tmp_path / "sft", settings).findings if f.rule == "few_steps"]
    assert few.remedy.startswith("Train without --max-steps")


def test_groups_that_the_dataset_left_out_count(tmp_path: Path, base: str) -> None:
    rewards = [[1.0, 1.0]] * 9 + [[1.0, 0.0]] * 3
    rows = [
        row(f"Is {task} even?", "yes", reward, index=task, repeat=repeat)
        for task, group in enumerate(rewards)
        for repeat, reward in enumerate(group)
    ]
    source = write_rows(tmp_path / "rollouts.jsonl", rows)
    format_grpo(source, tmp_path / "grpo", FormatGrpoSettings(model=base, kind="groups"))
    record = RunRecord("grpo", data=data_facts(tmp_path / "grpo"))
    found = {finding.rule: finding.evidence for finding in diagnose(record, "preflight")}
    # Equal answers in a group are no copies to be left out.
    assert found.keys() == {"groups_alike", "few_rows"} and record.data is not None and record.data.duplicates == 3
    assert found["groups_alike"] == "18 of 24 rollouts were left out of the dataset for it (no_variance)"


def test_lengths_within_groups(tmp_path: Path) -> None:
    def shorter(made: dict[str, Any]) -> dict[str, Any]:
        return {} if made["reward"] else {"completion_ids": [9] * 4, "completion_mask": [1] * 4}

    data = data_facts(dataset(tmp_path / "groups", changed(group_rows(WIDE), shorter)))
    assert (data.good_length, data.bad_length, data.longer_share, data.good, data.bad) == (8, 4, 1.0, 0, 0)
    (found,) = [f for f in diagnose(RunRecord("grpo", data=data), "preflight") if f.rule == "length_bias_unpaired"]
    assert found.evidence.endswith("the good one is longer in 100% of the groups")
    few = data_facts(dataset(tmp_path / "few", changed(group_rows(WIDE[:19]), shorter)))
    assert "length_bias_unpaired" not in codes(diagnose(RunRecord("grpo", data=few), "preflight"))


def test_weights_of_sides_of_one_size() -> None:
    record = RunRecord("kto", data=DataFacts(rows=400, good=200, bad=200))
    assert diagnose(record, "preflight") == []
    assert codes(diagnose(dataclasses.replace(record, desirable_weight=10.0), "preflight")) == {"weights_unbalanced"}
