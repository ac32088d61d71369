"""Two collections of the same tasks: what is paired, what is counted, what is shown."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from gymtrl.comparison.collection import read_collection
from gymtrl.comparison.compare import compare_candidates, compare_files
from gymtrl.comparison.metric import Metric, parse_metric
from gymtrl.comparison.multiple import holm
from gymtrl.comparison.record import Candidate, Comparison
from gymtrl.comparison.tool_errors import is_tool_error
from gymtrl.comparison.verdict import exit_status
from gymtrl.errors import UserError
from gymtrl.reports.comparison import render_comparison
from gymtrl.rollouts.reader import read_at, read_lines
from rows import row, write_rows

OTHER = {"agent_ref": {"name": "other"}}


def made(rewards: list[list[float | None]], *, start: int = 0, side: str = "", **more: Any) -> list[dict[str, Any]]:
    """Rows of some tasks, one list of rewards a task; the text tells the sides apart."""
    return [
        row(f"question {t}", f"answer {r}{side}", reward, index=t, repeat=r, **more)
        for t, group in enumerate(rewards, start=start)
        for r, reward in enumerate(group)
    ]


def compared(folder: Path, before: list[dict[str, Any]], after: list[dict[str, Any]], **more: Any) -> Comparison:
    paths = [write_rows(folder / f"{name}.jsonl", rows) for name, rows in (("b", before), ("a", after))]
    return compare_files(paths[:1], paths[1:], **more)


def only(comparison: Comparison) -> Candidate:
    assert len(comparison.candidates) == 1
    return comparison.candidates[0]


def counted(comparison: Comparison) -> None:
    """Every line of both sides is counted, left out or skipped."""
    for side in (comparison.before, *(candidate.after for candidate in comparison.candidates)):
        assert side.lines == side.rollouts + sum(side.left_out.values()) + side.skipped


def test_improvement_is_paired_by_task(tmp_path: Path) -> None:
    before = made([[0, 0], [0, 1], [1, 1], [0, 0], [1, 0], [0, 0]] * 3)
    after = made([[1, 1], [1, 1], [1, 1], [1, 0], [1, 1], [1, 1]] * 3)
    result = compared(tmp_path, before, after)
    assert result.outcome == "improved"
    overall = only(result).overall
    assert overall.difference.mean == pytest.approx((1 + 0.5 + 0 + 0.5 + 0.5 + 1) / 6)
    assert (overall.better, overall.worse, overall.equal) == (15, 0, 3)
    assert (overall.fixed, overall.broken, overall.pass_threshold) == (12, 0, 1.0)
    assert overall.difference.low > 0
    assert overall.bootstrap[0] > 0
    assert overall.p < 0.001
    assert result.verdict == (
        f"Improved by 58.3 points [+{overall.difference.low * 100:.1f}, +{overall.difference.high * 100:.1f}]; "
        f"12 tasks fixed, 0 broken; 18 tasks × 2 could have shown {overall.difference.detectable * 100:.1f}."
    )
    assert exit_status(result, "no-improvement") == exit_status(result, "regression") == 0
    back = compared(tmp_path, after, before)
    assert back.outcome == "regressed"
    assert back.verdict.startswith("Regressed by 58.3 points [-")
    assert exit_status(back, "regression") == exit_status(back, "no-improvement") == 1
    assert exit_status(back, None) == 0


def test_nothing_shown_says_what_could_have_been(tmp_path: Path) -> None:
    result = compared(tmp_path, made([[0, 1], [1, 0], [1, 1], [0, 0]]), made([[1, 0], [0, 0], [1, 1], [0, 1]]))
    assert result.outcome == "not shown"
    assert f"could have shown {only(result).overall.difference.detectable * 100:.1f}." in result.verdict
    assert any("only 4 independent clusters" in warning for warning in only(result).warnings)
    assert exit_status(result, "no-improvement") == 1
    assert exit_status(result, "regression") == 0


def test_two_tasks_prove_nothing(tmp_path: Path) -> None:
    result = compared(tmp_path, made([[0], [0]]), made([[1], [1]]))
    assert (result.outcome, only(result).overall.sign_flip_p) == ("not shown", 0.5)
    assert "so few clusters" in result.verdict


def test_all_rewards_equal_is_no_change(tmp_path: Path) -> None:
    result = compared(tmp_path, made([[1.0]] * 20), made([[1.0]] * 20, side="!"))
    overall = only(result).overall
    assert (result.outcome, overall.difference.mean, overall.p, overall.equal) == ("not shown", 0.0, 1.0, 20)
    assert result.verdict == "Not shown: +0.0 points [+0.0, +0.0]; 0 tasks fixed, 0 broken."
    assert any("no width" in warning for warning in only(result).warnings)


def test_all_tasks_changing_alike_is_shown_by_sign_flips(tmp_path: Path) -> None:
    result = compared(tmp_path, made([[0.0]] * 20), made([[1.0]] * 20))
    assert result.outcome == "improved"
    assert only(result).overall.p == only(result).overall.sign_flip_p < 0.01


@pytest.mark.parametrize(
    ("after", "message"),
    [
        (made([[1]]), "share one task only"),
        ([], "no rollout with a valid reward"),
        (made([[None], [None]]), "no rollout with a valid reward: value_missing 2"),
        (made([[1], [0]], **OTHER), "collected by differently: agent against other"),
        (
            made([[1], [0]], responses_create_params={"input": "question 0", "temperature": 0.2}),
            "sampled differently: .*temperature 1.0.* against .*temperature 0.2",
        ),
        (made([[1], [0]], start=7), "no task in common: 2 only before .*b.jsonl:1.*; 2 only after"),
    ],
)
def test_what_cannot_be_compared_is_refused(tmp_path: Path, after: list[dict[str, Any]], message: str) -> None:
    with pytest.raises(UserError, match=message):
        compared(tmp_path, made([[0], [1]]), after)


def test_one_cluster_is_refused(tmp_path: Path) -> None:
    rows = made([[0], [1]], template="t")
    with pytest.raises(UserError, match="tasks of one cluster only"):
        compared(tmp_path, rows, rows, cluster="template")


def test_clusters_widen_the_interval_and_what_has_none_is_told(tmp_path: Path) -> None:
    def clustered(rewards: list[float]) -> list[dict[str, Any]]:
        return [
            row(f"question {t}", "a", reward, index=t, **({"template": t // 4} if t else {}))
            for t, reward in enumerate(rewards)
        ]

    before, after = clustered([0.0] * 40), clustered([float(t % 8 < 4) for t in range(40)])
    alone = only(compared(tmp_path, before, after)).overall.difference
    together = only(compared(tmp_path, before, after, cluster="template"))
    assert together.overall.difference.clusters == 11
    assert together.overall.difference.standard_error > 1.5 * alone.standard_error
    assert any(warning.startswith("1 tasks have no value at the path") for warning in together.warnings)


def test_tasks_of_one_side_are_told(tmp_path: Path) -> None:
    result = compared(tmp_path, made([[0], [1], [0]]), made([[1], [1], [1]], start=1))
    assert only(result).overall.difference.n == 2
    found = {unpaired.reason: unpaired for unpaired in only(result).unpaired}
    assert found.keys() == {"only_before", "only_after"}
    assert found["only_before"].examples == (f"{tmp_path}/b.jsonl:1",)
    assert found["only_after"].examples == (f"{tmp_path}/a.jsonl:3",)


def prompted(system: str, question: str, reward: float, **more: Any) -> dict[str, Any]:
    made = row(question, "a", reward, **more)
    made["responses_create_params"]["input"].insert(0, {"role": "system", "content": system})
    return made


def test_another_prompt_version_is_no_partner(tmp_path: Path) -> None:
    before = [prompted("old", f"q{t}", 0.0, index=t) for t in range(3)]
    after = [prompted("new" if t == 2 else "old", f"q{t}", 1.0, index=t) for t in range(3)]
    (unpaired,) = only(compared(tmp_path, before, after)).unpaired
    assert (unpaired.reason, unpaired.tasks, unpaired.detail) == ("other_prompt", 1, "with another system prompt")
    assert unpaired.examples == (f"{tmp_path}/b.jsonl:3 and {tmp_path}/a.jsonl:3",)
    after = [prompted("new", f"q{t}", 1.0, index=t) for t in range(3)]
    with pytest.raises(UserError, match="no task in common: 3 with another system prompt"):
        compared(tmp_path, before, after)


def test_another_harness_is_found_behind_the_same_input_rows(tmp_path: Path) -> None:
    for folder, system in (("b", "old"), ("a", "new")):
        rows = [prompted(system, f"q{t}", 1.0, index=t) for t in range(3)]
        write_rows(tmp_path / folder / "rollouts.jsonl", rows)
        asked = [
            {"responses_create_params": {"input": f"q{t}"}, "_ng_task_index": t, "_ng_rollout_index": 0}
            for t in range(3)
        ]
        write_rows(tmp_path / folder / "rollouts_materialized_inputs.jsonl", asked)
    with pytest.raises(UserError, match="3 with another system prompt"):
        compare_files([tmp_path / "b"], [tmp_path / "a"])


def collected(folder: Path, prompts: list[str], **more: Any) -> Path:
    """Twenty tasks in a folder, each asked once with every one of these system prompts."""
    rows, asked = [], []
    for task in range(20):
        for repeat, system in enumerate(prompts):
            rows.append(prompted(system.format(task), f"q{task}", 1.0, index=task, repeat=repeat))
            numbers = {"_ng_task_index": task, "_ng_rollout_index": repeat}
            asked.append({"responses_create_params": {"input": f"q{task}"}} | numbers | more)
    write_rows(folder / "rollouts.jsonl", rows)
    write_rows(folder / "rollouts_materialized_inputs.jsonl", asked)
    return folder


def test_two_new_prompts_are_told_from_a_harness_that_tells_the_time(tmp_path: Path) -> None:
    old = collected(tmp_path / "b", ["old", "old"])
    with pytest.raises(UserError, match="20 with another system prompt"):
        compare_files([old], [collected(tmp_path / "a", ["new 0", "new 1"])])
    once = collected(tmp_path / "c", ["12:00, task {}"])
    timed = collected(tmp_path / "d", ["13:00, task {}", "13:01, task {}"])
    assert only(compare_files([once], [timed])).unpaired == ()
    with pytest.raises(UserError, match="20 with another system prompt") as refused:
        compare_files([once], [collected(tmp_path / "e", ["13:00, task {}"])])
    assert "two rollouts of each task" in str(refused.value.remedy)


def test_another_input_row_is_no_other_environment(tmp_path: Path) -> None:
    before, after = (collected(tmp_path / answer, ["same"], expected=answer) for answer in "xy")
    with pytest.raises(UserError, match="no task in common: 20 with another input row"):
        compare_files([before], [after])


def test_a_harness_that_tells_the_time_is_paired_by_input_rows(tmp_path: Path) -> None:
    for folder in ("b", "a"):
        rows = [prompted(f"{folder} {t} {r}", f"q{t}", 1.0, index=t, repeat=r) for t in range(3) for r in range(2)]
        write_rows(tmp_path / folder / "rollouts.jsonl", rows)
        asked = [
            {"responses_create_params": {"input": f"q{t}"}, "_ng_task_index": t, "_ng_rollout_index": r}
            for t in range(3)
            for r in range(2)
        ]
        write_rows(tmp_path / folder / "rollouts_materialized_inputs.jsonl", asked)
    result = compare_files([tmp_path / "b"], [tmp_path / "a"])
    assert only(result).overall.difference.n == 3
    assert only(result).unpaired == ()


def test_what_the_world_failed_is_not_counted(tmp_path: Path) -> None:
    before = [*made([[0], [1], [0]]), row("question 3", "a", 1.0, index=3)]
    after = [
        *made([[1], [1], [1]]),
        row("question 0", "z", 0.0, index=0, repeat=1, mask_sample=True),
        row("question 1", "z", float("nan"), index=1, repeat=1),
        row("question 2", "z", None, index=2, repeat=1),
        row("question 3", "z", 0.0, index=3, mask_sample=True),
        {"_ng_failure_class": "timeout", "_ng_task_index": 0},
    ]
    write_rows(tmp_path / "a_failures.jsonl", [{"_ng_failure_class": "timeout"}, {"_ng_failure_class": "crash"}] * 2)
    result = compared(tmp_path, before, after)
    candidate = only(result)
    assert candidate.overall.after.mean == 1
    assert candidate.after.left_out == {"masked": 2, "value_not_finite": 1, "value_missing": 1, "failure_row": 1}
    assert candidate.after.failed_attempts == {"timeout": 2, "crash": 2}
    (unpaired,) = candidate.unpaired
    assert (unpaired.reason, unpaired.detail, unpaired.tasks) == ("no_value", "without a valid value after", 1)
    counted(result)


def test_what_the_model_failed_counts_with_its_reward(tmp_path: Path) -> None:
    after = made([[1], [1], [1], [1]])
    after[0]["response"]["output"] = []
    after[0]["reward"] = 0.0
    calls = [{"type": "function_call", "name": "f", "call_id": "c", "arguments": "{not JSON"}]
    after[1]["response"]["output"] = calls
    after[1]["reward"] = 0.0
    result = compared(tmp_path, made([[1], [1], [1], [1]], side="!"), after)
    assert only(result).overall.after.mean == 0.5
    assert only(result).overall.difference.n == 4
    assert (only(result).after.refused, only(result).after.left_out) == (2, {})
    counted(result)


def test_duplicated_rows_count_once(tmp_path: Path) -> None:
    before = made([[0], [0], [0]])
    after = made([[1], [0], [0]])
    twice = [*after, after[0], after[0], row("question 1", "another", 1.0, index=1)]
    result = compared(tmp_path, before, twice)
    assert only(result).after.left_out == {"duplicate": 3}
    assert [task.n_after for task in only(result).tasks] == [1, 1, 1]
    assert only(result).overall.after.mean == pytest.approx(1 / 3)
    assert any("3 rollouts after are there twice" in warning for warning in only(result).warnings)
    counted(result)


def test_one_task_listed_twice_is_no_duplicate(tmp_path: Path) -> None:
    rows = [row("same", "a", 1.0, index=0), row("same", "b", 0.0, index=1), row("other", "a", 1.0, index=2)]
    result = compared(tmp_path, rows, rows)
    assert {task.question: task.n_before for task in only(result).tasks} == {"same": 2, "other": 1}
    assert any(warning.startswith("3 rollouts are the same, byte for byte") for warning in only(result).warnings)


def test_repeats_may_differ_between_runs_and_tasks(tmp_path: Path) -> None:
    result = compared(tmp_path, made([[0], [1, 0, 1], [0, 0]]), made([[1, 1, 1], [1, 0], [0, 1]]))
    overall = only(result).overall
    assert overall.difference.mean == pytest.approx((1 + (1 / 2 - 2 / 3) + 1 / 2) / 3)
    assert overall.repeats == (1, 3)
    assert "3 tasks × 1 to 3" in result.verdict
    assert any("2 tasks have unequal numbers" in warning for warning in only(result).warnings)


def test_a_run_cut_short_is_told(tmp_path: Path) -> None:
    rewards: list[list[float | None]] = [[0, 1], [1, 1], [0, 0]]
    for folder, rows in (("b", made(rewards)), ("a", made(rewards, side="!")[:3])):
        path = write_rows(tmp_path / folder / "rollouts.jsonl", rows)
        asked = [
            {
                "responses_create_params": {"input": f"question {t}"},
                "_ng_task_index": t,
                "_ng_rollout_index": r,
            }
            for t in range(3)
            for r in range(2)
        ]
        write_rows(tmp_path / folder / "rollouts_materialized_inputs.jsonl", asked)
        if folder == "a":
            with path.open("a") as stream:
                stream.write('{"responses_create_params": {"input": "ques')
    result = compare_files([tmp_path / "b"], [tmp_path / "a"])
    assert (result.before.missing, only(result).after.missing) == (0, 3)
    assert only(result).after.left_out == {"malformed_json": 1}
    assert [unpaired.reason for unpaired in only(result).unpaired] == ["only_before"]
    told = "3 rollouts after were asked for and stand in no line that can be read: the run was cut short"
    assert told in only(result).warnings
    counted(result)


def test_a_line_that_cannot_be_read_is_no_run_cut_short(tmp_path: Path) -> None:
    for folder, lines in (("b", 4), ("a", 3)):
        path = write_rows(tmp_path / folder / "rollouts.jsonl", made([[1.0]] * lines, side=folder))
        asked = [
            {"responses_create_params": {"input": f"question {t}"}, "_ng_task_index": t, "_ng_rollout_index": 0}
            for t in range(4)
        ]
        write_rows(tmp_path / folder / "rollouts_materialized_inputs.jsonl", asked)
        if folder == "a":
            path.write_text(path.read_text() + '{"broken": \n')
    candidate = only(compare_files([tmp_path / "b"], [tmp_path / "a"]))
    assert (candidate.after.missing, candidate.after.unread) == (1, 1)
    assert "1 rollouts after were asked for and stand in no line that can be read" in candidate.warnings
    assert not any("cut short" in warning for warning in candidate.warnings)


def test_the_same_rewards_in_another_order_are_no_change(tmp_path: Path) -> None:
    rng = np.random.default_rng(5)
    drawn = [rng.choice([0, 0.1, 0.2, 0.3, 0.7, 0.9], size=4).tolist() for _ in range(60)]
    cases = [
        ([[0.1, 0.2, 0.3]] * 20, [[0.3, 0.2, 0.1]] * 20),
        (drawn, [rng.permutation(group).tolist() for group in drawn]),
        ([[1e6, -1e6, 0.1]] * 20, [[0.1, 1e6, -1e6]] * 20),
        ([[0.1]] * 20, [[0.1, 0.1, 0.1]] * 20),
    ]
    for before, after in cases:
        result = compared(tmp_path, made(before), made(after, side="a"))
        overall = only(result).overall
        assert (result.outcome, overall.p, overall.equal) == ("not shown", 1.0, len(before))
        assert (overall.difference.mean, overall.difference.standard_error, overall.sign_flip_p) == (0, 0, 1)
        assert all(task.before == task.after for task in only(result).tasks)
        assert exit_status(result, "regression") == 0


def test_what_is_large_elsewhere_makes_no_tie(tmp_path: Path) -> None:
    result = compared(tmp_path, made([[1e15], *[[0.0]] * 20]), made([[1e15], *[[0.001]] * 20]))
    assert (only(result).overall.better, only(result).overall.equal) == (20, 1)


def test_a_shift_of_every_task_has_no_width_whatever_rounding_makes_of_it(tmp_path: Path) -> None:
    tenths = [t / 10 for t in range(1, 9)] * 3
    result = compared(tmp_path, made([[x] for x in tenths]), made([[x + 0.1] for x in tenths]))
    assert result.outcome == "improved"
    assert any("no width" in warning for warning in only(result).warnings)
    assert "could have shown" not in result.verdict
    assert compared(tmp_path, made([[0.7]] * 20), made([[0.8]] * 20), min_effect=0.1).outcome == "not shown"


def test_values_too_large_for_an_interval_are_refused(tmp_path: Path) -> None:
    lowest, highest, growing = made([[-1e308]] * 20), made([[1e308]] * 20), made([[1e200 * t] for t in range(20)])
    for before, after in ((lowest, highest), (made([[0.0]] * 20), growing), (growing, growing)):
        with pytest.raises(UserError, match="too large for an interval"):
            compared(tmp_path, before, after)
    bounded = compared(tmp_path, lowest, highest, metric="reward>=0")
    assert bounded.outcome == "improved"


@pytest.mark.parametrize("size", [float("nan"), float("inf"), -0.1])
def test_a_smallest_effect_that_is_none_is_refused(tmp_path: Path, size: float) -> None:
    from pydantic import ValidationError

    from gymtrl.comparison.settings import CompareSettings

    with pytest.raises(UserError, match="min_effect is"):
        compared(tmp_path, made([[0], [1]]), made([[1], [1]]), min_effect=size)
    with pytest.raises(ValidationError):
        CompareSettings(min_effect=size)


def test_environments_are_told_apart_and_adjusted(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)

    def rows(gains: dict[str, float], side: str) -> list[dict[str, Any]]:
        return [
            row(f"q{t}", f"{side}", float(rng.random() < 0.5 + gain), index=t, agent_ref={"name": agent})
            for agent, gain in gains.items()
            for t in range(80)
        ]

    before = rows({"x": 0.0, "y": 0.0, "z": 0.0}, "b")
    result = compared(tmp_path, before, rows({"x": 0.45, "y": -0.45, "z": 0.0}, "a"))
    x, y, z = only(result).environments
    assert [e.environment for e in (x, y, z)] == ["x", "y", "z"]
    assert [e.outcome for e in (x, y, z)] == ["improved", "regressed", "not shown"]
    assert only(result).overall.difference.n == 240
    assert x.p_adjusted == pytest.approx(3 * x.p) or y.p_adjusted == pytest.approx(3 * y.p)
    assert z.p_adjusted == z.p
    assert result.outcome == "not shown"
    assert "x improved by" in result.verdict
    assert "y regressed by" in result.verdict
    assert exit_status(result, "regression") == 1
    assert "y  " in rendered(result)


def test_the_same_row_in_two_environments_is_two_tasks_of_one_cluster(tmp_path: Path) -> None:
    rows = [
        row(f"q{t}", agent, 1.0, index=2 * t + i, agent_ref={"name": agent})
        for t in range(3)
        for i, agent in enumerate("xy")
    ]
    asked = [
        {"responses_create_params": {"input": f"q{t // 2}"}, "_ng_task_index": t, "_ng_rollout_index": 0}
        for t in range(6)
    ]
    write_rows(tmp_path / "r_materialized_inputs.jsonl", asked)
    path = write_rows(tmp_path / "r.jsonl", rows)
    difference = only(compare_files([path], [path])).overall.difference
    assert (difference.n, difference.clusters) == (6, 3)


def test_an_environment_of_one_side_is_left_out(tmp_path: Path) -> None:
    result = compared(tmp_path, [*made([[0], [1]]), *made([[0], [1]], **OTHER)], made([[1], [1]]))
    assert [e.environment for e in only(result).environments] == ["agent"]
    assert only(result).unpaired[0].tasks == 2


def test_several_candidates_are_adjusted_together(tmp_path: Path) -> None:
    rng = np.random.default_rng(3)
    before = write_rows(tmp_path / "b.jsonl", made([[0.0]] * 60))
    gains = (1.0, 0.0, 0.1)
    paths = [
        write_rows(tmp_path / f"{i}.jsonl", made([[float(rng.random() < gain)] for _ in range(60)], side=str(i)))
        for i, gain in enumerate(gains)
    ]
    result = compare_candidates([before], [[path] for path in paths])
    p = [candidate.overall.p for candidate in result.candidates]
    assert [c.overall.p_adjusted for c in result.candidates] == pytest.approx([3 * p[0], p[1], 2 * p[2]])
    assert [c.after.name for c in result.candidates] == list(map(str, paths))
    assert result.candidates[0].outcome == "improved"
    assert result.outcome == "not shown"
    assert result.verdict.count("\n") == 2
    assert exit_status(result, "no-improvement") == 1


def test_a_gain_that_one_of_many_candidates_may_have_by_chance(tmp_path: Path) -> None:
    before = write_rows(tmp_path / "b.jsonl", made([[0.0]] * 40))
    same = write_rows(tmp_path / "s.jsonl", made([[float(t == 0)] for t in range(40)], side="s"))
    lucky = write_rows(tmp_path / "l.jsonl", made([[float(t < 5)] for t in range(40)], side="l"))
    assert compare_files([before], [lucky]).outcome == "improved"
    result = compare_candidates([before], [[lucky], [same], [same], [same]])
    assert result.candidates[0].overall.p < 0.05 < result.candidates[0].overall.p_adjusted
    assert "chance may give one of so many candidates" in result.candidates[0].verdict
    (environment,) = result.candidates[0].environments
    assert (environment.outcome, environment.p_adjusted) == ("not shown", result.candidates[0].overall.p_adjusted)


def test_a_loss_that_one_of_many_candidates_may_have_by_chance_fails_no_check(tmp_path: Path) -> None:
    before = write_rows(tmp_path / "b.jsonl", made([[1.0]] * 40))
    same = write_rows(tmp_path / "s.jsonl", made([[float(t > 0)] for t in range(40)], side="s"))
    unlucky = write_rows(tmp_path / "l.jsonl", made([[float(t > 4)] for t in range(40)], side="l"))
    alone = compare_files([before], [unlucky])
    assert (alone.outcome, exit_status(alone, "regression")) == ("regressed", 1)
    result = compare_candidates([before], [[unlucky], [same], [same], [same]])
    assert exit_status(result, "regression") == 0
    assert "regressed" not in result.verdict


def test_environments_of_all_candidates_are_adjusted_together(tmp_path: Path) -> None:
    def rows(lost: int, side: str) -> list[dict[str, Any]]:
        x = [row(f"q{t}", side, float(t >= lost), index=t, agent_ref={"name": "x"}) for t in range(40)]
        return x + [row(f"q{t}", side, float(t != 0), index=t, agent_ref={"name": "y"}) for t in range(40)]

    before = write_rows(tmp_path / "b.jsonl", rows(0, "b"))
    paths = [write_rows(tmp_path / f"{i}.jsonl", rows(lost, str(i))) for i, lost in enumerate((5, 1, 1))]
    alone = compare_files([before], [paths[0]])
    assert (alone.outcome, exit_status(alone, "regression")) == ("regressed", 1)
    result = compare_candidates([before], [[path] for path in paths])
    p = [effect.p for candidate in result.candidates for effect in candidate.environments]
    assert len(p) == 6
    assert [e.p_adjusted for c in result.candidates for e in c.environments] == pytest.approx(holm(p))


def test_the_smallest_effect_that_counts(tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    before = made([[float(rng.random() < 0.3)] for _ in range(200)])
    after = made([[float(rng.random() < 0.5)] for _ in range(200)], side="a")
    plain = only(compared(tmp_path, before, after)).overall
    assert plain.outcome == "improved"
    low = plain.difference.low
    assert compared(tmp_path, before, after, min_effect=low - 0.001).outcome == "improved"
    held = compared(tmp_path, before, after, min_effect=low + 0.001)
    assert held.outcome == "not shown"
    assert "may be less than the" in held.verdict
    assert compared(tmp_path, after, before, min_effect=low - 0.001).outcome == "regressed"


def test_mcnemar_where_each_task_was_tried_once(tmp_path: Path) -> None:
    before, after = made([[0]] * 6 + [[1]] * 4), made([[1]] * 6 + [[1]] * 3 + [[0]])
    overall = only(compared(tmp_path, before, after)).overall
    assert (overall.fixed, overall.broken) == (6, 1)
    assert overall.mcnemar_p == pytest.approx(2 * (1 + 7) / 2**7)
    assert "McNemar p = 0.12" in rendered(compared(tmp_path, before, after))
    tenths = only(compared(tmp_path, made([[0.0]] * 30), made([[0.1]] * 20 + [[0.0]] * 10))).overall
    assert (tenths.fixed, tenths.better) == (0, 20)
    assert tenths.mcnemar_p == pytest.approx(2 / 2**20)
    assert only(compared(tmp_path, made([[0, 0], [1, 1]]), made([[1, 1], [1, 0]]))).overall.mcnemar_p is None
    assert only(compared(tmp_path, made([[0.5], [0.2]]), made([[0.7], [1.0]]))).overall.mcnemar_p is None


def test_pass_at_k_with_pass_at_one(tmp_path: Path) -> None:
    before = made([[0, 0, 1, 0], [0, 0, 0, 0], [1, 1, 1, 1]])
    after = made([[1, 1, 0, 0], [1, 0, 0, 0], [1, 1, 1, 1]])
    one, two, four = only(compared(tmp_path, before, after)).overall.pass_at
    assert (one.k, two.k, four.k) == (1, 2, 4)
    assert one.before == pytest.approx((1 / 4 + 0 + 1) / 3)
    assert two.before == pytest.approx((1 / 2 + 0 + 1) / 3)
    assert two.after == pytest.approx((5 / 6 + 1 / 2 + 1) / 3)
    assert (four.before, four.after) == pytest.approx((2 / 3, 1.0))
    assert four.one_after == pytest.approx(one.after)
    assert four.difference is not None


def test_flips_lead_to_the_rollouts_that_show_them(tmp_path: Path) -> None:
    before = made([[0, 0, 1], [1, 1, 1], [1, 1, 1]])
    after = made([[0, 1, 1], [1, 1, 0], [0, 0, 1]])
    result = compared(tmp_path, before, after)
    fixed, broken = sorted(only(result).flips, key=lambda flip: flip.kind, reverse=True)
    assert (fixed.kind, broken.kind) == ("fixed", "broken")
    shown = [read_at(origin).rollout for origin in (fixed.before[0], fixed.after[0], broken.before[0], broken.after[0])]
    assert [(r.prompt[0].content, r.reward) for r in shown if r] == [
        ("question 0", 0.0),
        ("question 0", 1.0),
        ("question 2", 1.0),
        ("question 2", 0.0),
    ]
    assert len(fixed.before) == len(fixed.after) == 3
    assert f"{tmp_path}/b.jsonl:7 → {tmp_path}/a.jsonl:7" in rendered(result)


def test_costs_before_and_after(tmp_path: Path) -> None:
    def rows(tokens: int, error: str, status: str) -> list[dict[str, Any]]:
        made = []
        for t in range(4):
            one = row(f"q{t}", "done", 1.0, index=t)
            one["responses_create_params"]["tools"] = [
                {"type": "function", "name": "f", "description": "", "parameters": {}}
            ]
            call = {"type": "function_call", "name": "f", "call_id": "c", "arguments": "{}"}
            answer = {"type": "function_call_output", "call_id": "c", "output": error}
            one["response"]["output"] = [call, answer, *one["response"]["output"]]
            one["response"] |= {"usage": {"input_tokens": 5, "output_tokens": tokens + t}, "status": status}
            made.append(one)
        return made

    result = compared(tmp_path, rows(10, "fine", "completed"), rows(20, "Error: no", "incomplete"))
    costs = {cost.name: (cost.before, cost.after) for cost in only(result).costs}
    assert costs["output tokens"] == (11.5, 21.5)
    assert costs["turns"] == (2, 2)
    assert costs["tool calls"] == (1, 1)
    assert costs["tool errors"] == (0, 1)
    assert costs["truncated"] == (0, 1)
    assert costs["characters"] == (4 + 2 + 4, 4 + 2 + 9)
    assert "tool errors" in rendered(result)
    plain = compared(tmp_path, made([[0], [1]]), made([[1], [1]]))
    assert {cost.name for cost in only(plain).costs} == {"turns", "characters"}


@pytest.mark.parametrize(
    ("text", "error"),
    [
        ("Error: no such file", True),
        ("Traceback (most recent call last):\n  File", True),
        ("Exit code 1\n  File", True),
        ("Exit code 0\nfine", False),
        ("<returncode>2</returncode>", True),
        ("<returncode>0</returncode>", False),
        ('{"output": "", "exit_code": 0, "error": null}', False),
        ('{"output": "", "exit_code": 127, "error": null}', True),
        ('{"error": "not found"}', True),
        ('{"status": "error", "output": ""}', True),
        ('{"status": "ok", "errors": []}', False),
        ('{"isError": true}', True),
        ('{"error": ', False),
        ("{" * 5000 + '"error"', False),
        ("The error rate is 3 %", False),
        ("", False),
    ],
)
def test_tool_errors(text: str, error: bool) -> None:
    assert is_tool_error(text) is error


@pytest.mark.parametrize(
    ("text", "metric"),
    [
        ("reward", Metric("reward")),
        ("reward >= 0.5", Metric("reward", ">=", 0.5)),
        ("a.b.0<-1e3", Metric("a.b.0", "<", -1000.0)),
        ("passed==1", Metric("passed", "==", 1.0)),
    ],
)
def test_metrics_are_read(text: str, metric: Metric) -> None:
    assert parse_metric(text) == metric


@pytest.mark.parametrize(
    "text", ["", ">=1", "reward>=", "reward>=high", "reward>=nan", "reward<inf", "a..b", "my metric", "a=1", "a>1>2"]
)
def test_what_is_no_metric_is_refused(text: str) -> None:
    with pytest.raises(UserError, match="is no metric"):
        parse_metric(text)


def test_a_component_a_path_and_a_predicate_are_compared(tmp_path: Path) -> None:
    def rows(part: float, deep: Any, side: str) -> list[dict[str, Any]]:
        return [
            row(f"q{t}", side, 0.5, index=t, reward_components={"format.tag": part + t}, verifier={"score": deep})
            for t in range(20)
        ]

    before, after = rows(0.0, False, "b"), rows(1.0, True, "a")
    component = compared(tmp_path, before, after, metric="reward_components.format.tag")
    assert only(component).overall.difference.mean == 1
    assert not component.points
    assert component.verdict.startswith("Improved by 1 [+1, +1]")
    assert only(compared(tmp_path, before, after, metric="verifier.score")).overall.after.mean == 1
    bounded = compared(tmp_path, before, after, metric="reward_components.format.tag>=10")
    assert (bounded.metric, bounded.points) == ("reward_components.format.tag>=10", True)
    assert only(bounded).overall.difference.mean == pytest.approx(1 / 20)
    with pytest.raises(UserError, match=r"no rollout with a valid 'verifier\.nothing': value_missing 20"):
        compared(tmp_path, before, after, metric="verifier.nothing")


def test_rewards_beyond_one_are_told_in_their_own_units(tmp_path: Path) -> None:
    result = compared(tmp_path, made([[-100], [0], [19.4]] * 6), made([[0], [1], [20]] * 6))
    assert not result.points
    assert result.verdict.startswith("Improved by 33.9 [+")
    assert "points" not in result.verdict


def test_the_record_comes_back_from_its_file(tmp_path: Path) -> None:
    from gymtrl.comparison.settings import CompareSettings
    from gymtrl.validation.validate import compare_rollouts, read_comparison

    before = write_rows(tmp_path / "b.jsonl", made([[0, 1], [1, 0], [0, 0]]))
    after = write_rows(tmp_path / "a.jsonl", made([[1, 1], [1, 0], [0, 0]]))
    result = compare_rollouts(before, [after, before], CompareSettings(), out=tmp_path / "out")
    assert read_comparison(tmp_path / "out") == result
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert manifest["extra"]["outcome"] == "not shown"


def test_every_shipped_line_is_accounted_for(gym_site_packages: Path) -> None:
    files = sorted(gym_site_packages.rglob("*rollout*.jsonl"))
    reward = parse_metric("reward")
    total = rollouts = 0
    for file in files:
        lines = [line for line in read_lines([file]) if line.verdict != "skip"]
        valid = [line.rollout for line in lines if line.rollout is not None and line.rollout.reward is not None]
        if not valid:
            continue
        collection = read_collection([file], reward)
        side = collection.side
        assert side.lines == side.rollouts + sum(side.left_out.values()) + side.skipped
        keys = {collection.asked[code].task_key for code in collection.codes.tolist()}
        assert keys >= {rollout.task_key for rollout in valid}
        assert side.rollouts + side.left_out.get("duplicate", 0) >= len(valid)
        total += side.lines
        rollouts += side.rollouts
    assert (total > 500, rollouts > 450) == (True, True)


def test_refused_lines_have_the_keys_of_their_task(gym_site_packages: Path) -> None:
    from gymtrl.rollouts.reader import read_asked

    fields = ("prompt", "tools", "task_key", "input_key", "agent", "environment", "reward", "masked", "sampling")
    compared = 0
    for file in sorted(gym_site_packages.rglob("*rollout*.jsonl")):
        for line in read_lines([file]):
            asked = read_asked(line.origin)
            if line.rollout is not None:
                assert asked is not None
                assert [getattr(asked, f) for f in fields] == [getattr(line.rollout, f) for f in fields]
                assert asked.completion == ()
                compared += 1
            elif line.verdict == "skip" or line.reason in ("malformed_json", "task_only"):
                assert asked is None
    assert compared > 500


def test_foreign_text_is_shown_as_text(tmp_path: Path) -> None:
    name = "\x1b[2Jagent [bold]"
    before = [row(f"[red]q{t}\x1b]0;x\x07", "a", 0.0, index=t, agent_ref={"name": name}) for t in range(3)]
    after = [row(f"[red]q{t}\x1b]0;x\x07", "b", 1.0, index=t, agent_ref={"name": name}) for t in range(3)]
    shown = rendered(compared(tmp_path, before, after))
    assert "[red]q0" in shown
    assert "\x1b" not in shown


def rendered(comparison: Comparison) -> str:
    stream = io.StringIO()
    render_comparison(comparison, Console(file=stream, width=200))
    return stream.getvalue()
