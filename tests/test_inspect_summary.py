from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import msgspec
import pytest
from rich.console import Console

from gymtrl.reports.inspection import render, summary_json
from gymtrl.rollouts.quality import default_threshold
from gymtrl.rollouts.reader import read_lines
from gymtrl.rollouts.remedies import remedy_for
from gymtrl.rollouts.summary import Summary, summarize


def row(task: int, repeat: int, reward: float | None, text: str | None = None, **more: Any) -> dict[str, Any]:
    said = {"type": "message", "role": "assistant", "content": text or f"answer {repeat}"}
    return (
        {
            "responses_create_params": {"input": f"question {task}"},
            "response": {"output": [said], "model": "m"},
            "_ng_task_index": task,
            "_ng_rollout_index": repeat,
        }
        | ({} if reward is None else {"reward": reward})
        | more
    )


def summary(tmp_path: Path, *rows: Any) -> Summary:
    path = tmp_path / "rollouts.jsonl"
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return summarize(read_lines([path]))


def view(found: Summary, width: int = 100) -> str:
    out = io.StringIO()
    render(found, Console(file=out, width=width, color_system=None))
    return out.getvalue()


def test_tasks_rewards_and_what_it_is_good_for(tmp_path: Path) -> None:
    (tmp_path / "rollouts_failures.jsonl").write_text('{"_ng_failure_class": "timeout"}\n')
    found = summary(
        tmp_path,
        *(row(0, i, 0.0) for i in range(3)),
        *(row(1, i, 1.0) for i in range(6)),
        row(2, 0, 1.0),
        row(2, 1, 0.0),
        row(2, 2, 1.0, "answer 0"),
        row(3, 0, None),
        row(3, 1, float("nan")),
        row(3, 2, 1.0, mask_sample=True),
        "garbage",
    )
    assert found.lines == 16
    assert found.verdicts == {"ok": 15, "context": 0, "reject": 1, "skip": 0}
    tasks = found.tasks
    assert (tasks.never, tasks.sometimes, tasks.always) == (1, 1, 1)
    assert tasks.group_sizes == {3: 3, 6: 1}
    rewards = found.rewards
    assert (rewards.n, rewards.missing, rewards.non_finite, rewards.masked, rewards.distinct) == (12, 1, 1, 1, 2)
    assert rewards.mean == pytest.approx(8 / 12)
    assert [(b.low, b.count) for b in rewards.bins] == [(0.0, 4), (1.0, 8)]
    # Task 1: six distinct, capped at four; task 2: a duplicate.
    assert (found.good_for.sft_rows, found.good_for.dpo_pairs, found.good_for.grpo_groups) == (5, 1, 1)
    assert found.world_failures == {"timeout": 1}


def test_every_problem_comes_with_a_place_and_a_remedy(gym_site_packages: Path) -> None:
    found = summarize(read_lines(sorted(gym_site_packages.rglob("*rollout*.jsonl"))))
    problems = [finding for finding in found.findings if finding.verdict != "ok"]
    assert len(problems) == 12
    assert sum(finding.count for finding in found.findings) == found.lines == 695
    assert all(finding.remedy and finding.detail and finding.examples for finding in problems)
    assert {finding.reason: finding.count for finding in problems}["malformed_json"] == 20


def test_the_cap_counts_a_task_once_whether_or_not_its_input_row_is_known(tmp_path: Path) -> None:
    files = []
    for name in ("a", "b"):
        files.append(tmp_path / f"{name}.jsonl")
        rows = [row(0, i, 1.0, f"{name} {i}") for i in range(3)]
        files[-1].write_text("".join(json.dumps(r) + "\n" for r in rows))
    asked = [{k: v for k, v in row(0, i, None).items() if k != "response"} for i in range(3)]
    (tmp_path / "a_materialized_inputs.jsonl").write_text("".join(json.dumps(r) + "\n" for r in asked))
    assert summarize(read_lines(files)).good_for.sft_rows == 4


def test_text_that_is_no_utf8_does_not_break_the_summary(tmp_path: Path) -> None:
    (tmp_path / "rollouts_failures.jsonl").write_text('{"_ng_failure_class": "\\ud800"}\n')
    found = summary(tmp_path, row(0, 0, 1.0), {"\ud800": 1})
    assert json.loads(summary_json(found))["world_failures"] == {"?": 1}


def test_remedies_name_no_flag_that_the_verb_lacks() -> None:
    assert "--" not in remedy_for("reject", "line_too_long")
    assert "'gymtrl filter'" in remedy_for("context", "hidden_context")


def test_a_summary_is_plain_data(tmp_path: Path) -> None:
    found = summary(tmp_path, row(0, 0, 0.5), "garbage")
    assert msgspec.json.decode(summary_json(found), type=Summary) == found


def test_wide_rewards_are_binned(tmp_path: Path) -> None:
    rewards = [-100.0, *(i / 7 for i in range(30)), 19.4]
    bins = summary(tmp_path, *(row(i, 0, reward) for i, reward in enumerate(rewards))).rewards.bins
    assert len(bins) == 10
    assert sum(b.count for b in bins) == 32
    assert (bins[0].low, bins[0].count, bins[-1].high) == (-100.0, 1, 19.4)


@pytest.mark.parametrize(
    ("rewards", "threshold"),
    [
        ([0.0, 1.0], 1.0),
        ([0.0], 1.0),
        ([-1.0, 1.0], 1.0),
        ([0.0, 10.0], 10.0),
        ([0.0, 0.5, 1.0], 0.8),
        ([0.1, 0.2], 0.8),
        ([-100.0, 0.5, 19.4], None),
        ([5.0], None),
        ([], None),
    ],
)
def test_default_threshold(rewards: list[float], threshold: float | None) -> None:
    assert default_threshold(rewards)[0] == threshold


def test_the_view_fits_and_takes_nothing_for_markup(tmp_path: Path) -> None:
    found = summary(
        tmp_path,
        row(0, 0, 1.0, agent_ref={"name": "[bold]agent[/nope] \x1b[31m"}),
        row(0, 1, 0.0, agent_ref={"name": "[bold]agent[/nope] \x1b[31m"}),
        {"[red]key": 1},
        "garbage",
    )
    shown = view(found)
    assert max(map(len, shown.splitlines())) <= 100
    assert "[bold]agent[/nope]" in shown and "\x1b" not in shown and "[red]key" in shown
    assert "rollouts.jsonl:4" in shown.replace("\n", "").replace("│", "").replace(" ", "")
    assert "1 sometimes" in shown and "DPO" in shown


def test_a_file_of_rejects_can_still_be_shown(tmp_path: Path) -> None:
    shown = view(summary(tmp_path, "garbage"))
    assert "malformed_json" in shown and "Rewards" not in shown
    assert "0" in view(summary(tmp_path))
