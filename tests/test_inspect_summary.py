from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import msgspec
import polars as pl
import pytest
from rich.console import Console

from gymtrl.errors import UserError
from gymtrl.reports.inspection import render, summary_json
from gymtrl.rollouts.inspection import inspect_rollouts
from gymtrl.rollouts.quality import default_threshold
from gymtrl.rollouts.reader import read_lines
from gymtrl.rollouts.reasons import remedy_for
from gymtrl.rollouts.summary import Bin, Component, Summary, Suspicion, summarize
from gymtrl.rollouts.table import rollout_table


def said(text: str) -> dict[str, Any]:
    return {"type": "message", "role": "assistant", "content": text}


def row(task: int, repeat: int, reward: float | None, text: str | None = None, **more: Any) -> dict[str, Any]:
    return (
        {
            "responses_create_params": {"input": f"question {task}"},
            "response": {"output": [said(text or f"answer {repeat}")], "model": "m"},
            "_ng_task_index": task,
            "_ng_rollout_index": repeat,
        }
        | ({} if reward is None else {"reward": reward})
        | more
    )


def summary(tmp_path: Path, *rows: Any) -> Summary:
    path = tmp_path / "rollouts.jsonl"
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return summarize(rollout_table(read_lines([path])).lazy())


def doubts(tmp_path: Path, *rows: Any) -> dict[str, Suspicion]:
    return {suspicion.kind: suspicion for suspicion in summary(tmp_path, *rows).suspicions}


def ask(folder: Path, *indexes: tuple[int, int]) -> None:
    """Writes the materialized inputs of `rollouts.jsonl`."""
    asked = [{k: v for k, v in row(*index, None).items() if k != "response"} for index in indexes]
    path = folder / "rollouts_materialized_inputs.jsonl"
    path.write_text("".join(json.dumps(r) + "\n" for r in asked))


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
    found = summarize(rollout_table(read_lines(sorted(gym_site_packages.rglob("*rollout*.jsonl")))).lazy())
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
    table = rollout_table(read_lines(files)).lazy()
    assert summarize(table).good_for.sft_rows == 4
    assert summarize(table, max_per_task=9).good_for.sft_rows == 6


def test_what_is_not_known_is_not_zero(tmp_path: Path) -> None:
    rows = [row(0, 0, -3.0), row(0, 1, 5.0), row(0, 2, 9.0)]
    found = summary(tmp_path, *rows)
    assert (found.good_for.sft_rows, found.good_for.dpo_pairs, found.good_for.grpo_groups) == (None, None, 1)
    assert view(found).count("not known: pass --reward-threshold") == 2
    # Where no reward is valid, no threshold would help.
    none = summary(tmp_path, row(0, 0, None))
    assert (none.good_for.sft_rows, none.good_for.dpo_pairs) == (0, 0)
    assert "--reward-threshold" not in view(none)


def test_a_threshold_that_was_set(tmp_path: Path) -> None:
    path = tmp_path / "rollouts.jsonl"
    path.write_text("".join(json.dumps(row(0, i, r)) + "\n" for i, r in enumerate([-3.0, 5.0, 9.0])))
    found = inspect_rollouts([path], reward_threshold=5.0)
    good = found.good_for
    assert (good.threshold, good.threshold_why, good.sft_rows, good.dpo_pairs) == (5.0, "as set", 2, 1)
    assert (found.tasks.never, found.tasks.sometimes, found.tasks.always) == (0, 1, 0)
    assert [b.count for b in found.tasks.pass_rates] == [0, 0, 0, 0, 0, 0, 1, 0, 0, 0]
    assert inspect_rollouts([path], reward_threshold=-3.0).tasks.always == 1
    assert "5 (as set)" in view(found)
    with pytest.raises(UserError, match="not finite"):
        inspect_rollouts([path], reward_threshold=float("nan"))


@pytest.mark.parametrize("reward", [0.0, 1.0])
def test_a_pair_has_two_whole_rollouts(tmp_path: Path, reward: float) -> None:
    cut = {"output": [said("cut")], "status": "incomplete"}
    other = row(0, 0, 1.0 - reward)
    assert summary(tmp_path, other, row(0, 1, reward)).good_for.dpo_pairs == 1
    assert summary(tmp_path, other, row(0, 1, reward, response=cut)).good_for.dpo_pairs == 0
    faulty = row(0, 1, reward, "<think>a<think>b</think>c")
    found = summary(tmp_path, other, faulty)
    assert (found.good_for.dpo_pairs, found.good_for.grpo_groups, found.verdicts["ok"]) == (0, 1, 2)


def test_one_unbounded_environment_does_not_hide_the_others(tmp_path: Path) -> None:
    def of(name: str, first: int, *rewards: float) -> list[dict[str, Any]]:
        return [row(first, i, r, agent_ref={"name": name}) for i, r in enumerate(rewards)]

    binary, fractions = of("binary", 0, 0.0, 1.0, 1.0), of("fractions", 1, 0.1, 0.7, 0.9)
    wide = of("wide", 2, -100.0, 3.0, 19.0)
    found = summary(tmp_path, *binary, *fractions, *wide)
    good = found.good_for
    assert (good.threshold, good.thresholds) == (None, {"binary": 1.0, "fractions": 0.8})
    assert "binary (1), fractions (0.8)" in good.threshold_why
    assert good.threshold_why.endswith("no rule for: wide (from -100 to 19)")
    assert (good.sft_rows, good.dpo_pairs, good.grpo_groups) == (3, 2, 3)
    assert (found.tasks.never, found.tasks.sometimes, found.tasks.always) == (0, 2, 0)
    assert "reach the threshold" in view(found) and "no rule for: wide" in view(found, 200)
    assert summary(tmp_path, *wide).good_for.thresholds == {}
    why = summary(tmp_path, *binary, *of("signs", 4, -1.0, 1.0)).good_for.threshold_why
    assert why == "environments or agents by themselves: binary (1), signs (1)"
    one = summary(tmp_path, *binary, *of("five", 5, 5.0, 5.0)).good_for
    assert one.threshold_why.endswith("no rule for: five (always 5)")
    assert summary(tmp_path, *wide, *of("other", 3, 5.0, 6.0, 7.0)).good_for.sft_rows is None


def test_agents_and_environments_are_counted_apart(tmp_path: Path) -> None:
    found = summary(tmp_path, row(0, 0, 1.0, agent_ref={"name": "a"}), row(0, 1, 1.0, agent_ref={"name": "a"}))
    assert (found.agents, found.environments) == ({"a": 2}, {})
    assert "environments  " not in view(found)
    table = rollout_table(read_lines([tmp_path / "rollouts.jsonl"])).with_columns(environment=pl.lit("e"))
    found = summarize(table.lazy())
    assert (found.agents, found.environments) == ({"a": 2}, {"e": 2})
    assert "environments  e (2)" in view(found)


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


def test_one_reward_reaches_from_nowhere_to_nowhere() -> None:
    assert default_threshold([5.0])[1].startswith("every reward is 5:")


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


def test_shipped_files_on_a_narrow_terminal(gym_site_packages: Path, tmp_path: Path) -> None:
    files = sorted(gym_site_packages.rglob("*rollout*.jsonl"))
    found = inspect_rollouts(files, table=tmp_path / "table.parquet")
    assert found.verdicts == {"ok": 485, "context": 53, "reject": 57, "skip": 100}
    assert list(found.files) == [str(file) for file in files]
    assert inspect_rollouts([tmp_path / "table.parquet"]) == found
    assert [path.name for path in tmp_path.iterdir()] == ["table.parquet"]
    shown = view(found, width=80)
    assert max(map(len, shown.splitlines())) == 80
    # The first place of each problem is whole, and others stand below the common parent.
    flat = "".join(line.strip("│ ") for line in shown.splitlines())
    firsts = [f.examples[0] for f in found.findings if f.verdict != "ok"] + [d.examples[0] for d in found.suspicions]
    assert all(first.replace(" ", "") in flat.replace(" ", "") for first in firsts)
    assert flat.count(str(gym_site_packages)) - len(firsts) in (0, 1)  # one stands at the top, where it has room
    assert found.findings[1].examples[0].startswith(str(gym_site_packages))


def test_what_was_asked_for_and_what_no_line_answers(tmp_path: Path) -> None:
    ask(tmp_path, *((task, repeat) for task in range(3) for repeat in range(2)))
    answers = [row(0, 0, 1.0), row(0, 0, 0.0), row(0, 1, 1.0), row(1, 0, 1.0), row(7, 0, 1.0)]
    tasks = summary(tmp_path, *answers).tasks
    assert (tasks.asked, tasks.missing, tasks.with_input_row) == (6, 3, 4)
    rejected = row(1, 1, 1.0, response={"output": []})
    found = summary(tmp_path, *answers, rejected)
    assert found.tasks.missing == 2
    assert "6 rollouts, 2 of them without a line" in view(found, 80)
    # A rollout without an index answers one as well; a line that is skipped does not.
    nameless = row(5, 0, 1.0, _ng_task_index=None)
    skipped = {"responses_create_params": {"input": "q"}, "_ng_rollout_index": 0}
    assert summary(tmp_path, *answers, rejected, nameless, skipped).tasks.missing == 1
    assert summary(tmp_path, *answers, *["garbage"] * 9).tasks.missing == 0


def test_an_index_beyond_every_column_is_asked_for_and_missing(tmp_path: Path) -> None:
    ask(tmp_path, (0, 0), (2**70, 0))
    tasks = summary(tmp_path, row(0, 0, 1.0)).tasks
    assert (tasks.asked, tasks.missing) == (2, 1)
    assert summary(tmp_path, row(0, 0, 1.0), row(2**70, 0, 1.0)).tasks.missing == 0


def test_nothing_is_missing_where_nothing_tells_what_was_asked_for(tmp_path: Path) -> None:
    found = summary(tmp_path, row(0, 0, 1.0), "garbage")
    assert (found.tasks.asked, found.tasks.missing) == (0, 0)
    assert "asked for" not in view(found)


def test_pass_rates_of_groups(tmp_path: Path) -> None:
    rates = {0: [0.0] * 4, 1: [1.0, 0.0, 0.0, 0.0], 2: [1.0, 1.0, 0.0], 3: [1.0], 4: [0.9, 0.8]}
    found = summary(tmp_path, *(row(task, i, r) for task, rewards in rates.items() for i, r in enumerate(rewards)))
    assert found.good_for.threshold == 0.8
    assert [b.count for b in found.tasks.pass_rates] == [1, 0, 1, 0, 0, 0, 1, 0, 0, 2]
    assert (found.tasks.pass_rates[0].low, found.tasks.pass_rates[9].high) == (0.0, 1.0)
    shown = view(found, 80)
    assert "1 never" in shown and "2 sometimes" in shown and "2 always" in shown and "60% … 70%" in shown


def test_no_pass_rates_without_a_threshold_and_no_histogram_for_pairs(tmp_path: Path) -> None:
    assert summary(tmp_path, row(0, 0, -3.0), row(0, 1, 5.0), row(0, 2, 9.0)).tasks.pass_rates == []
    assert "60% … 70%" not in view(summary(tmp_path, row(0, 0, 1.0), row(0, 1, 0.0)))


def test_parts_of_the_reward(tmp_path: Path) -> None:
    found = summary(
        tmp_path,
        row(0, 0, 1.0, reward_components={"format": 1.0, "[b]right": 0.5}),
        row(0, 1, 0.0, reward_components={"format": 0.0, "never": float("nan")}),
        row(0, 2, 0.0),
    )
    assert found.rewards.components == {"[b]right": Component(1, 0.5, 0.5, 0.5), "format": Component(2, 0.0, 0.5, 1.0)}
    assert "[b]right" in view(found, 80)


def test_rewards_whose_sum_is_no_float(tmp_path: Path) -> None:
    assert summary(tmp_path, row(0, 0, 1.5e308), row(0, 1, 1.7e308)).rewards.mean == pytest.approx(1.6e308)


def test_histograms_of_the_shape(tmp_path: Path) -> None:
    usage = [{"output": [said("x" * n)], "usage": {"output_tokens": n}} for n in range(1, 15)]
    found = summary(tmp_path, *(row(n, 0, 1.0, response=response) for n, response in enumerate(usage)), row(99, 0, 1.0))
    assert found.histograms["turns"] == [Bin(1.0, 1.0, 15)]
    assert found.histograms["tool_calls"] == [Bin(0.0, 0.0, 15)]
    assert [b.count for b in found.histograms["completion_chars"]] == [2, 1, 1, 2, 1, 2, 2, 1, 1, 2]
    assert (found.histograms["output_tokens"][0].low, found.histograms["output_tokens"][-1].high) == (1.0, 14.0)
    assert sum(b.count for b in found.histograms["output_tokens"]) == found.output_tokens.n == 14
    assert summary(tmp_path, "garbage").histograms["turns"] == []


def test_tools_count_the_rollouts_that_call_them(tmp_path: Path) -> None:
    def calls(*names: str) -> dict[str, Any]:
        items = [
            {"type": "function_call", "call_id": str(i), "name": n, "arguments": "{}"} for i, n in enumerate(names)
        ]
        return {"output": items}

    request = {"input": "q", "tools": [{"type": "function", "name": name} for name in "fg"]}
    rows = [row(0, i, 1.0, response=calls(*n), responses_create_params=request) for i, n in enumerate(["gg", "fg"])]
    assert summary(tmp_path, *rows).tools == {"g": 2, "f": 1}


def test_one_completion_with_two_rewards(tmp_path: Path) -> None:
    same = [row(0, 0, 1.0, "a"), row(0, 1, 1.0 + 1e-10, "a"), row(1, 0, 0.0, "a"), row(0, 2, 0.0, "b")]
    unsure = [row(0, 3, 0.0, "a", mask_sample=True), row(0, 4, None, "a")]
    assert not doubts(tmp_path, *same, *unsure)
    found = doubts(tmp_path, *same, *unsure, row(0, 5, 0.75, "a"), row(0, 6, 0.0, "b"))
    doubt = found["same_completion_different_rewards"]
    assert doubt.count == 1
    assert doubt.detail.startswith("1 of 2 completions") and "up to 0.25 apart" in doubt.detail
    assert [example.rpartition(":")[2] for example in doubt.examples] == ["7", "2"]


def lengths(tasks: range, *, sign: int = 1, order: str = "01234", **more: Any) -> list[dict[str, Any]]:
    """Rollouts of each task from the shortest to the longest; `order` has the places of their rewards."""
    return [
        row(task, i, sign * int(place) / 5, "x" * (10 + i + 100 * task), **more)
        for task in tasks
        for i, place in enumerate(order)
    ]


@pytest.mark.parametrize(("sign", "word"), [(1, "longer"), (-1, "shorter")])
def test_reward_that_follows_length(tmp_path: Path, sign: int, word: str) -> None:
    doubt = doubts(tmp_path, *lengths(range(10), sign=sign))["reward_follows_length"]
    assert doubt.count == 50 and word in doubt.detail and f"{sign:+.2f}" in doubt.detail
    assert len(doubt.examples) == 5


def test_reward_that_does_not_follow_length_within_tasks(tmp_path: Path) -> None:
    kind = "reward_follows_length"
    # One rollout or one task too few, though each shows it plainly.
    assert kind not in doubts(tmp_path, *lengths(range(10))[:-1])
    six = lengths(range(9), order="012345") + [row(20, i, 0.5, "x" * i) for i in range(1, 9)]
    assert kind not in doubts(tmp_path, *six)
    assert doubts(tmp_path, *six, *lengths(range(30, 31)))[kind].count == 59
    # Ranks that correlate by 0.5 in nine tasks and in a tenth by 0.5 or by 0.4.
    half = lengths(range(9), order="21043")
    assert "+0.50" in doubts(tmp_path, *half, *lengths(range(9, 10), order="21043"))[kind].detail
    assert kind not in doubts(tmp_path, *half, *lengths(range(9, 10), order="12304"))
    # Not measured, or cut off.
    cut = {"output": [said("x" * 999)], "status": "incomplete"}
    assert kind not in doubts(tmp_path, *lengths(range(10), mask_sample=True))
    odd = [row(t, i, i % 2, "x" * (10 + i // 2)) for t in range(20) for i in range(4)]
    assert kind not in doubts(tmp_path, *odd, *(row(t, 9, -1.0, response=cut) for t in range(20)))
    # Long tasks get more, their long rollouts do not.
    hard = [row(t, i, t / 100 + (i % 2) / 200, "x" * (1000 * t + 10 + i)) for t in range(20) for i in range(4)]
    assert kind not in doubts(tmp_path, *hard)


def test_one_sided_tasks(tmp_path: Path) -> None:
    def tasks(first: int, count: int, *rewards: float) -> list[dict[str, Any]]:
        return [row(t, i, reward) for t in range(first, first + count) for i, reward in enumerate(rewards)]

    # Half of the groups that are large enough; small ones do not count.
    mixed = tasks(100, 3, 0.0, 0.0, 0.0, 1.0)
    small = tasks(200, 9, 0.0, 0.0, 0.0)
    assert "always_lowest" not in doubts(tmp_path, *mixed, *small, *tasks(0, 2, 0.0, 0.0, 0.0, 0.0))
    found = doubts(tmp_path, *mixed, *small, *tasks(0, 3, 0.0, 0.0, 0.0, 0.0))
    assert found.keys() == {"always_lowest"}
    assert found["always_lowest"].detail.startswith("3 of 6 tasks") and found["always_lowest"].detail.endswith(
        "got 0, the lowest reward"
    )
    assert len(found["always_lowest"].examples) == found["always_lowest"].count == 3
    # Twenty, however many others there are.
    many = tasks(300, 30, 0.0, 1.0, 1.0, 1.0)
    assert "always_highest" not in doubts(tmp_path, *many, *tasks(0, 19, 1.0, 1.0, 1.0, 1.0))
    assert doubts(tmp_path, *many, *tasks(0, 20, 1.0, 1.0, 1.0, 1.0))["always_highest"].count == 20


@pytest.mark.parametrize(
    ("rewards", "kinds"),
    [
        ([1.0] * 4, {"always_highest"}),
        ([0.5] * 4, set()),
        ([5.0] * 4, set()),
        ([-1.0, 1.0, 1.0, 1.0], set()),
    ],
)
def test_the_ends_of_the_scale(tmp_path: Path, rewards: list[float], kinds: set[str]) -> None:
    assert doubts(tmp_path, *(row(0, i, reward) for i, reward in enumerate(rewards))).keys() == kinds


def test_a_scale_beyond_zero_and_one_ends_where_its_rewards_do(tmp_path: Path) -> None:
    rewards = [[-1.0] * 4, [3.0] * 4]
    found = doubts(tmp_path, *(row(t, i, r) for t, group in enumerate(rewards) for i, r in enumerate(group)))
    assert found["always_lowest"].detail.endswith("got -1, the lowest reward")
    assert found["always_highest"].detail.endswith("got 3, the highest reward")


def test_suspicions_have_a_panel_of_their_own(tmp_path: Path) -> None:
    shown = view(summary(tmp_path, *(row(0, i, 0.0) for i in range(4))), 200)
    assert "Look twice" in shown and "1 × always lowest" in shown and f"at {tmp_path}/rollouts.jsonl:1" in shown
    assert "Look twice" not in view(summary(tmp_path, row(0, 0, 0.0)))


def test_long_paths_keep_both_ends(tmp_path: Path) -> None:
    for name in ("begin" + "x" * 90, "other"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "end-rollouts.jsonl").write_text(json.dumps(row(0, 0, 1.0)) + "\n")
    shown = view(inspect_rollouts(list(tmp_path.iterdir())), 80)
    assert "beginx" in shown and "…" in shown and "other/end-rollouts.jsonl (1)" in shown
    assert max(map(len, shown.splitlines())) == 80
