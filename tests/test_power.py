"""`power`: the formula, the variances it is given, and the verb."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
from statsmodels.stats.power import TTestPower, normal_sample_size_one_tail
from typer.testing import CliRunner

from gymtrl.cli.main import app
from gymtrl.comparison.compare import compare_files
from gymtrl.comparison.power import Variance, detectable, normal_tasks, repeats_needed, tasks_needed
from gymtrl.comparison.power_plan import PowerPlan, plan_power
from gymtrl.comparison.power_settings import PowerSettings
from gymtrl.errors import UserError
from gymtrl.reports.power import power_sentence
from rows import row, write_rows

BINARY = Variance(between=1 / 9, within=2 / 6)  # what evenly spread solve rates come to


def test_many_tasks_follow_the_published_formula() -> None:
    for effect, repeats in ((0.03, 1), (0.05, 4), (0.1, 8)):
        deviation = math.sqrt(1 / 9 + 2 / 6 / repeats)
        expected = normal_sample_size_one_tail(effect, 0.8, 0.025, std_null=deviation)
        assert normal_tasks(BINARY, effect, repeats) == pytest.approx(expected, rel=1e-9)


def test_the_table_in_print_holds() -> None:
    for tasks, effect in ((100, 0.124), (200, 0.087), (340, 0.067), (1000, 0.039)):
        assert normal_tasks(BINARY, effect, 4) == pytest.approx(tasks, rel=0.02)
        assert detectable(BINARY, tasks, 4) == pytest.approx(effect, abs=0.0015)


def test_the_tasks_have_the_power_that_is_promised() -> None:
    for effect, repeats in ((0.5, 1), (0.2, 1), (0.1, 4)):
        tasks = tasks_needed(BINARY, effect, repeats)
        size = effect / math.sqrt(BINARY.of_task(repeats))
        assert TTestPower().power(size, nobs=tasks, alpha=0.05) == pytest.approx(0.8, abs=0.015)
        assert detectable(BINARY, tasks, repeats) <= effect < detectable(BINARY, tasks - 1, repeats)


def test_repeats_help_down_to_what_tasks_differ_by() -> None:
    repeats = repeats_needed(BINARY, 0.06, 340)
    assert repeats is not None
    assert detectable(BINARY, 340, repeats) <= 0.06 < detectable(BINARY, 340, repeats - 1)
    assert repeats_needed(BINARY, 0.04, 340) is None
    assert detectable(BINARY, 340, math.inf) > 0.04
    assert repeats_needed(Variance(0.1, 0.2, freedom=0.1), 0.5, 10) is None


def rollouts(
    path: Path, *, tasks: int = 400, repeats: int = 4, spread: float = 0.0, seed: int = 0, twins: int = 1
) -> Path:
    """Solve rates evenly spread, moved by something of the given spread for each set of twins."""
    rates = np.random.default_rng(0).uniform(0.2, 0.8, size=tasks)
    random = np.random.default_rng(seed)
    moved = np.repeat(random.uniform(-spread, spread, size=tasks // twins), twins)
    solved = random.random((tasks, repeats)) < (rates + moved)[:, None]
    return write_rows(
        path,
        [
            row(f"question {t}", f"answer {r}", float(one), index=t, repeat=r, family=f"family {t // twins}")
            for t, group in enumerate(solved)
            for r, one in enumerate(group)
        ],
    )


def planned(*paths: Path, **settings: object) -> PowerPlan:
    return plan_power([paths[0]], paths[1:], settings=PowerSettings.model_validate(settings))


def test_two_collections_measure_the_variances(tmp_path: Path) -> None:
    before = rollouts(tmp_path / "b.jsonl", tasks=2000)
    after = rollouts(tmp_path / "a.jsonl", tasks=2000, spread=0.2, seed=1)
    plan = planned(before, after)
    within = 0.25 - 0.6**2 / 12
    assert plan.taken.variance.between == pytest.approx(0.4**2 / 12, rel=0.35)
    assert plan.taken.variance.within == pytest.approx(2 * within - 0.4**2 / 12, rel=0.03)
    assert plan.notes == ()


def test_what_compare_could_have_shown_is_what_power_says(tmp_path: Path) -> None:
    before = rollouts(tmp_path / "b.jsonl", tasks=60, twins=3)
    after = rollouts(tmp_path / "a.jsonl", tasks=60, twins=3, spread=0.3, seed=1)
    for cluster in (None, "family"):
        shown = compare_files([before], [after], cluster=cluster).candidates[0].overall.difference.detectable
        (found,), *_ = planned(before, after, tasks=60, repeats=4, cluster=cluster).detectable
        assert found == pytest.approx(shown, rel=1e-9)


def test_twins_ask_for_more_tasks(tmp_path: Path) -> None:
    before = rollouts(tmp_path / "b.jsonl", twins=4)
    after = rollouts(tmp_path / "a.jsonl", twins=4, spread=0.2, seed=1)
    alone, together = planned(before, after), planned(before, after, cluster="family")
    assert together.taken.variance.between > 2 * alone.taken.variance.between
    assert together.taken.tasks[-1] > 2 * alone.taken.tasks[-1]
    assert together.taken.variance.freedom == pytest.approx(1 / 4, rel=0.01)


def test_one_collection_needs_an_assumption_and_says_so(tmp_path: Path) -> None:
    plan = planned(rollouts(tmp_path / "b.jsonl", tasks=2000))
    between = {one.correlation: one.variance.between for one in plan.needed}
    assert between[0.5] == pytest.approx(0.6**2 / 12, rel=0.15)
    assert between[0.9] == pytest.approx(between[0.5] / 5)
    assert between[0.0] == pytest.approx(between[0.5] * 2)
    assert plan.taken.correlation == 0.5
    assert [one.tasks[2] for one in plan.needed] == sorted(one.tasks[2] for one in plan.needed)
    assert "correlation of 0.5" in plan.notes[0]


def test_answers_follow_what_there_is(tmp_path: Path) -> None:
    before = rollouts(tmp_path / "b.jsonl")
    after = rollouts(tmp_path / "a.jsonl", spread=0.2, seed=1)
    free = planned(before, after)
    assert f"{free.taken.tasks[0]:,} tasks × 1 ({2 * free.taken.tasks[0]:,} rollouts)" in power_sentence(free)
    needed = planned(before, after, tasks=340).repeats_needed
    assert needed is not None
    assert f"340 tasks show 0.05 four times in five with {needed} repeats" in power_sentence(
        planned(before, after, tasks=340)
    )
    assert "not show 0.001 with any number" in power_sentence(planned(before, after, tasks=340, effect=0.001))
    both = planned(before, after, tasks=340, repeats=4)
    assert power_sentence(both).startswith(f"340 tasks × 4 show {both.detectable[0][0]:.3f}")
    twins = [rollouts(tmp_path / f"t{s}.jsonl", tasks=80, twins=8, spread=0.2, seed=s) for s in (0, 1)]
    assert "too few" in power_sentence(planned(*twins, tasks=4, cluster="family"))


def test_one_rollout_a_task(tmp_path: Path) -> None:
    before, after = (rollouts(tmp_path / f"{s}.jsonl", repeats=1, seed=s) for s in (0, 1))
    with pytest.raises(UserError, match="every task has one rollout"):
        planned(before)
    plan = planned(before, after)
    assert plan.taken.variance.within == 0
    assert "repeats are taken to be of no help" in plan.notes[0]
    more = planned(before, rollouts(tmp_path / "more.jsonl", repeats=4, seed=1))
    assert "the other side's variance" in more.notes[0]
    assert more.taken.variance.within > 0.3


def six(*rewards: float) -> list[dict[str, object]]:
    """Three tasks with these rewards each."""
    return [row(f"q{t}", "a", x, index=t, repeat=r) for t in range(3) for r, x in enumerate(rewards)]


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([row("q", "a", 1.0), row("q", "b", 0.0, repeat=1)], "1 tasks with valid rewards"),
        ([row("q", "a", None)], "no rollout with a valid reward: value_missing 1"),
        (six(1.0, 1.0), "nothing scatters"),
        (six(0.1, 0.1, 0.1), "nothing scatters"),
        (six(0.0, 1e300), "more than a billion tasks"),
        (six(1.7e308, 1.7e308), "more than a billion tasks"),
    ],
)
def test_what_has_no_variance_is_refused(tmp_path: Path, rows: list[dict[str, object]], message: str) -> None:
    path = write_rows(tmp_path / "r.jsonl", rows)
    with pytest.raises(UserError, match=message):
        planned(path)


def test_other_tasks_are_refused_and_missing_ones_told(tmp_path: Path) -> None:
    before = rollouts(tmp_path / "b.jsonl", tasks=40)
    fewer = rollouts(tmp_path / "a.jsonl", tasks=20, seed=1)
    notes = planned(before, fewer).notes
    assert notes[0] == "20 tasks have no partner and were left out"
    assert "from 20 tasks only" in notes[1]
    other = write_rows(tmp_path / "o.jsonl", [row(f"other {t}", "a", 1.0, index=t) for t in range(3)])
    with pytest.raises(UserError, match="no task in common"):
        planned(before, other)


def test_invalid_rewards_do_not_count(tmp_path: Path) -> None:
    path = rollouts(tmp_path / "b.jsonl", tasks=40)
    plan = planned(path)
    with path.open("a") as stream:
        for t in range(40):
            stream.write(json.dumps(row(f"question {t}", "x", 100.0, index=t, repeat=9, mask_sample=True)) + "\n")
        stream.write("not json\n")
    assert planned(path) == plan


def test_what_the_model_failed_counts_as_in_compare(tmp_path: Path) -> None:
    paths = [rollouts(tmp_path / f"{s}.jsonl", tasks=40, seed=s, spread=0.2 * s) for s in (0, 1)]
    well_formed = planned(*paths)
    for path in paths:
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        for one in rows:
            if not one["reward"]:
                one["response"]["output"] = []
        write_rows(path, rows)
    assert planned(*paths) == well_formed


def test_rollouts_that_are_there_twice_count_once(tmp_path: Path) -> None:
    path = rollouts(tmp_path / "b.jsonl", tasks=40)
    plan = planned(path)
    path.write_text(path.read_text() * 2)
    assert planned(path) == plan
    once = rollouts(tmp_path / "once.jsonl", tasks=40, repeats=1)
    once.write_text(once.read_text() * 2)
    with pytest.raises(UserError, match="every task has one rollout"):
        planned(once)


def test_one_input_row_in_two_environments_is_two_tasks_of_one_cluster(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    paths = []
    for side in "ba":
        rows, asked = [], []
        for index in range(60):
            agent = {"name": "xy"[index % 2]}
            easy = index % 2 == 0 and not (side == "a" and index // 2 % 3 == 0)
            for repeat in range(4):
                reward = float(random.random() < (0.9 if easy else 0.1))
                numbers = {"_ng_task_index": index, "_ng_rollout_index": repeat}
                question = f"q{index // 2}"
                rows.append(row(question, f"{side}{repeat}", reward, index=index, repeat=repeat, agent_ref=agent))
                asked.append({"responses_create_params": {"input": question}, "agent_ref": agent} | numbers)
        write_rows(tmp_path / f"{side}_materialized_inputs.jsonl", asked)
        paths.append(write_rows(tmp_path / f"{side}.jsonl", rows))
    difference = compare_files(paths[:1], paths[1:]).candidates[0].overall.difference
    plan = planned(*paths, tasks=60, repeats=4)
    assert plan.measured_tasks == difference.n == 60
    assert difference.clusters == 30
    assert plan.taken.variance.within < 0.4  # of one task's rollouts, not of those of both agents
    assert plan.detectable[0][0] == pytest.approx(difference.detectable, rel=1e-9)


def test_the_verb_prints_tables_and_json(tmp_path: Path) -> None:
    before, after = rollouts(tmp_path / "b.jsonl"), rollouts(tmp_path / "a.jsonl", spread=0.2, seed=1)
    shown = CliRunner().invoke(app, ["power", str(before), str(after), "--effect", "0.1"])
    assert shown.exit_code == 0, shown.output
    assert "measured" in shown.output
    assert "To show 0.1 four times in five" in shown.output
    done = CliRunner().invoke(app, ["power", str(before), "--tasks", "200", "--json"])
    plan = json.loads(done.output)
    assert plan["tasks"] == [200]
    assert [one["correlation"] for one in plan["needed"]] == [0.9, 0.5, 0.0]
    assert "× 16" in CliRunner().invoke(app, ["power", str(before)]).output
