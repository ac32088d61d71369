"""Rollouts really collected from Gym, with recorded ids: what was recorded is what is trained on, token for token."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from gymtrl.formats.checks import IGNORED
from gymtrl.formats.settings import FormatSftSettings
from gymtrl.formats.sft import FormatResult, format_sft
from gymtrl.models.fingerprint import load_tokenizer
from gymtrl.rollouts.reader import read_lines
from gymtrl.rollouts.record import Rollout

COLLECTED = Path(__file__).parent / "data" / "reasoning-gym-8x.jsonl"


@pytest.fixture(scope="module")
def rollouts() -> list[Rollout]:
    lines = list(read_lines([COLLECTED]))
    assert {line.verdict for line in lines} == {"ok"}
    return [line.rollout for line in lines if line.rollout is not None]


def trained(row: dict[str, Any]) -> list[int]:
    return [label for label in row["labels"] if label != IGNORED]


def formatted(out: Path, model: Path, **settings: Any) -> tuple[FormatResult, dict[str, dict[str, Any]]]:
    result = format_sft(COLLECTED, out, FormatSftSettings(model=str(model), **settings))
    return result, {row["row_id"]: row for row in pq.read_table(next((out / "data").glob("train-*"))).to_pylist()}


def test_groups_of_eight_good_and_bad(rollouts: list[Rollout]) -> None:
    groups = defaultdict(list)
    for rollout in rollouts:
        groups[rollout.task_key, rollout.input_key].append(rollout)
    assert len(groups) == len({r.task_key for r in rollouts}) == len({r.input_key for r in rollouts} - {None}) == 16
    assert all(sorted(r.rollout_index for r in group) == list(range(8)) for group in groups.values())
    spans = [(min(rewards), max(rewards)) for group in groups.values() if (rewards := [r.reward for r in group])]
    assert sum(worst < best == 1.0 for worst, best in spans) == 8  # right and wrong answers
    assert sum(worst < best < 1.0 for worst, best in spans) == 7  # none is right, some are better than others
    assert sum(worst == best == 0.0 for worst, best in spans) == 1
    assert sum(r.reward == 1.0 for r in rollouts) == 19
    assert sum(r.truncated for r in rollouts) == 19


def test_every_call_has_its_ids_and_log_probs(rollouts: list[Rollout], smollm2_dir: Path) -> None:
    tokenizer = load_tokenizer(str(smollm2_dir))
    for rollout in rollouts:
        (call,) = rollout.recorded
        assert rollout.turns == 1
        assert len(call.generation_log_probs) == len(call.generation_token_ids) <= 32
        assert all(log_prob <= 0 for log_prob in call.generation_log_probs)
        # The server keeps the turn's end, where there is one.
        assert (call.generation_token_ids[-1] == tokenizer.eos_token_id) is not rollout.truncated
        assert tokenizer.decode(call.generation_token_ids, skip_special_tokens=True) == rollout.completion[-1].content


def test_recorded_ids_are_trained_on(rollouts: list[Rollout], smollm2_dir: Path, tmp_path: Path) -> None:
    result, rows = formatted(tmp_path / "out", smollm2_dir)
    assert result.routes == {"recorded": 109} and result.counts.dropped == {"truncated": 19} and result.flags == {}
    whole = [rollout for rollout in rollouts if not rollout.truncated]
    for row, (call,) in [(rows[rollout.origin.row_id], rollout.recorded) for rollout in whole]:
        assert row["input_ids"] == [*call.prompt_token_ids, *call.generation_token_ids]
        assert row["labels"] == [IGNORED] * len(call.prompt_token_ids) + list(call.generation_token_ids)


def test_rendered_ids_are_not_always_the_policys_own(smollm2_dir: Path, tmp_path: Path) -> None:
    tokenizer = load_tokenizer(str(smollm2_dir))
    _, recorded = formatted(tmp_path / "recorded", smollm2_dir)
    result, rendered = formatted(tmp_path / "rendered", smollm2_dir, use_recorded_ids="never")
    assert "recorded" not in result.routes and rendered.keys() == recorded.keys()
    differing = [key for key in recorded if trained(rendered[key]) != trained(recorded[key])]
    assert len(differing) == 6  # of 109: the same text, cut into other tokens than the policy chose
    for key, row in recorded.items():
        start = len(row["labels"]) - len(trained(row))
        assert rendered[key]["input_ids"][:start] == row["input_ids"][:start]  # the prompt is the same
        assert tokenizer.decode(trained(rendered[key])) == tokenizer.decode(trained(row))
