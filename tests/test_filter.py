from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import polars as pl
import pytest

from gymtrl.errors import UserError
from gymtrl.rollouts.keys import input_key
from gymtrl.rollouts.reader import read_lines
from gymtrl.rollouts.table import SCHEMA
from gymtrl.selection.filter import FilterResult, filter_rollouts
from gymtrl.selection.settings import FilterSettings
from gymtrl.selection.split import Keys, held_out_clusters, tied_clusters


def row(task: int, repeat: int, reward: float | None, text: str | None = None, **more: Any) -> dict[str, Any]:
    said = {"type": "message", "role": "assistant", "content": f"answer {repeat}" if text is None else text}
    return (
        {
            "responses_create_params": {"input": f"question {task}"},
            "response": {"output": [said], "model": "m"},
            "_ng_task_index": task,
            "_ng_rollout_index": repeat,
            "agent_ref": {"name": "a"},
        }
        | ({} if reward is None else {"reward": reward})
        | more
    )


def write(path: Path, *rows: Any) -> Path:
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


def run(path: Path, **settings: Any) -> FilterResult:
    return filter_rollouts([path], path.parent / "out", FilterSettings(**settings))


def reasons(result: FilterResult) -> list[str]:
    return [reason or split for split, reason in _table(result).select("split", "drop_reason").iter_rows()]


def _table(result: FilterResult) -> pl.DataFrame:
    return pl.read_parquet(result.path / "table.parquet")


def many(tasks: int = 40, repeats: int = 4) -> list[dict[str, Any]]:
    return [row(task, repeat, float((task + repeat) % 2)) for task in range(tasks) for repeat in range(repeats)]


def test_each_drop_reason(tmp_path: Path) -> None:
    reasoning = {"type": "reasoning", "summary": [{"type": "summary_text", "text": "hm"}]}
    undeclared = {"type": "function_call", "call_id": "1", "name": "f", "arguments": "{}"}
    path = write(
        tmp_path / "r.jsonl",
        row(0, 0, 1.0),
        "garbage",
        row(1, 0, 1.0, response={"output": [undeclared]}),
        row(1, 1, None),
        row(1, 2, float("inf")),
        row(1, 3, 1.0, mask_sample=True),
        row(1, 4, 1.0, response={"output": row(1, 4, 1.0)["response"]["output"], "status": "incomplete"}),
        row(1, 5, 1.0, response={"output": [reasoning]}),
        row(1, 6, 1.0, "<think>hm</think> "),
        row(1, 7, 1.0, "<think>hm 42"),
        row(1, 8, 1.0, "hm</think> 42"),
        row(1, 9, 0.0),
        row(0, 1, 1.0, "answer 0"),
        {"question": "?"},
    )
    expected = [
        "train",
        "reject:malformed_json",
        "context:tools_undeclared",
        "reward_missing",
        "reward_not_finite",
        "masked",
        "truncated",
        "ends_in_reasoning",
        "ends_in_reasoning",
        "unbalanced_think",
        "unbalanced_think",
        "below_threshold",
        "duplicate_completion",
        "reject:custom_record",
    ]
    found = reasons(run(path, validation=0))
    # Which of the two equal completions is kept is drawn.
    assert sorted((found[0], found[12])) == ["duplicate_completion", "train"]
    assert found[1:12] + found[13:] == expected[1:12] + expected[13:]


def test_switches_let_pass(tmp_path: Path) -> None:
    undeclared = {"type": "function_call", "call_id": "1", "name": "f", "arguments": "{}"}
    path = write(
        tmp_path / "r.jsonl",
        row(0, 0, 1.0, response={"output": [undeclared]}),
        row(1, 0, 1.0, response=row(1, 0, 1.0)["response"] | {"status": "incomplete"}),
        row(2, 0, 0.2),
    )
    settings = {"keep_context": True, "keep_truncated": True, "reward_threshold": 0.1, "validation": 0.0}
    assert reasons(run(path, **settings)) == ["train"] * 3


def test_in_is_out_plus_dropped_and_bytes_are_kept(tmp_path: Path) -> None:
    path = write(tmp_path / "r.jsonl", *many(), "garbage", '{"odd" :  "spacing"}')
    path.write_bytes(path.read_bytes().replace(b"garbage\n", b"garbage\r\n\n  \n"))
    result = run(path)
    written = [(result.path / f"{name}.jsonl").read_bytes() for name in ("train", "validation", "dropped")]
    source = [line.rstrip(b"\r") for line in path.read_bytes().split(b"\n") if line.strip()]
    assert sorted(b"".join(written).splitlines()) == sorted(source)
    assert [data.count(b"\n") for data in written] == [result.train, result.validation, sum(result.dropped.values())]
    manifest = json.loads((result.path / "manifest.json").read_text())
    assert manifest["counts"]["read"] == len(source) == 162
    assert manifest["counts"]["dropped"] == result.dropped
    assert manifest["extra"]["reward_threshold"] == result.threshold == 1.0
    table = _table(result)
    assert table.columns == [*SCHEMA, "split", "drop_reason"]
    assert table["split"].value_counts(sort=True).to_dict(as_series=False)["count"] == [
        82,
        80 - result.validation,
        result.validation,
    ]


def test_shipped_files_lose_no_line(gym_site_packages: Path, tmp_path: Path) -> None:
    files = sorted(gym_site_packages.rglob("*rollout*.jsonl"))
    result = filter_rollouts(files, tmp_path / "out", FilterSettings(reward_threshold=0.9))
    out = [line for name in ("train", "validation", "dropped") for line in (result.path / f"{name}.jsonl").open("rb")]
    source = [line for file in files for line in file.read_bytes().split(b"\n") if line.strip()]
    assert sorted(line.rstrip(b"\r\n") for line in out) == sorted(line.rstrip(b"\r") for line in source)


def test_the_cap_keeps_the_best_and_is_a_matter_of_the_seed(tmp_path: Path) -> None:
    rows = [row(0, i, 0.8 + i / 100) for i in range(10)] + [row(1, i, 1.0) for i in range(10)]
    path = write(tmp_path / "r.jsonl", *rows)
    first = reasons(run(path, validation=0, cap_per_task=3))
    assert first[:10] == ["over_cap"] * 7 + ["train"] * 3
    assert first[10:].count("train") == 3
    assert first == reasons(run(path, validation=0, cap_per_task=3))
    assert any(first != reasons(run(path, validation=0, cap_per_task=3, seed=seed)) for seed in (1, 2))


def test_no_task_is_on_both_sides_and_later_rounds_agree(tmp_path: Path) -> None:
    result = run(write(tmp_path / "r.jsonl", *many(60)), validation=0.3)
    table = _table(result).filter(pl.col("split") != "dropped")
    sides = dict(table.group_by("cluster_key").agg(pl.col("split").unique()).iter_rows())
    assert all(len(side) == 1 for side in sides.values())
    assert 8 <= result.clusters["validation"] <= 30
    assert result.clusters["train"] + result.clusters["validation"] == 60
    (tmp_path / "later").mkdir()
    later = run(write(tmp_path / "later" / "r.jsonl", *[row(i, 0, 1.0, "another") for i in range(200)]), validation=0.3)
    again = dict(_table(later).select("cluster_key", "split").iter_rows())
    assert all(again[key] == side[0] for key, side in sides.items())


def test_held_out_inputs_hold_every_held_out_task(tmp_path: Path) -> None:
    path = write(tmp_path / "r.jsonl", *many(30, 2), row(30, 0, 0.0), row(30, 1, 0.0))
    asked = [
        {k: v for k, v in row(task, repeat, None, answer=task).items() if k != "response"}
        for task in range(40)
        for repeat in range(2)
    ]
    write(tmp_path / "r_materialized_inputs.jsonl", *asked)
    result = run(path, validation=0.4)
    held = [json.loads(line) for line in (result.path / "heldout_inputs.jsonl").open()]
    assert result.heldout_inputs == len(held)
    assert all(item["agent_ref"] == {"name": "a"} and not any(k.startswith("_ng_") for k in item) for item in held)
    keys = [input_key(item) for item in held]
    assert len(set(keys)) == len(keys)
    table = _table(result)
    assert not set(keys) & set(table.filter(split="train")["input_key"])
    assert set(table.filter(split="validation")["input_key"]) <= set(keys)
    # Tasks without any rollout are held out by the same rule.
    assert any(item["answer"] > 30 for item in held)


def test_without_a_sidecar_there_are_no_held_out_inputs(tmp_path: Path) -> None:
    result = run(write(tmp_path / "r.jsonl", *many()))
    assert result.heldout_inputs == 0
    assert not (result.path / "heldout_inputs.jsonl").exists()


def test_clusters_named_by_the_user_stay_together(tmp_path: Path) -> None:
    rows = [row(task, 0, 1.0, meta={"template": f"t{task % 6}"}) for task in range(60)]
    table = _table(run(write(tmp_path / "r.jsonl", *rows), cluster="meta.template", validation=0.4))
    templates: dict[int, set[str]] = {}
    for index, split in enumerate(table["split"]):
        templates.setdefault(index % 6, set()).add(split)
    assert all(len(sides) == 1 for sides in templates.values())
    assert {"train", "validation"} == set.union(*templates.values())


@pytest.mark.parametrize("share", [0.01, 0.5, 0.99])
@pytest.mark.parametrize("n", [2, 3, 50])
def test_both_sides_of_a_split_are_never_empty(share: float, n: int) -> None:
    tied = {f"{i}": f"{i}" for i in range(n)}
    held = held_out_clusters(tied, share, "salt")
    assert 0 < len(held) < n
    assert held == held_out_clusters(dict(reversed(tied.items())), share, "salt")


def test_a_share_of_nothing_and_of_one_cluster() -> None:
    assert held_out_clusters({"a": "a", "b": "b"}, 0.0, "salt") == set()
    assert held_out_clusters({"a": "a"}, 0.0, "salt") == set()
    with pytest.raises(UserError) as caught:
        held_out_clusters({"a": "a"}, 0.1, "salt")
    assert "--validation 0" in str(caught.value.remedy)


def test_clusters_that_share_a_task_or_an_input_row_are_tied() -> None:
    tied = tied_clusters(
        [Keys("c1", "t1", "i1"), Keys("c2", "t1", None), Keys("c3", "t3", "i1"), Keys("c4", "t4", None)]
    )
    assert tied["c1"] == tied["c2"] == tied["c3"] != tied["c4"]
    for salt in map(str, range(50)):
        assert len({"c1", "c2", "c3"} & held_out_clusters(tied, 0.5, salt)) in (0, 3)


def test_a_task_collected_with_and_without_its_sidecar_stays_on_one_side(tmp_path: Path) -> None:
    write(tmp_path / "a.jsonl", *[row(i, 0, 1.0) for i in range(30)])
    asked = [{k: v for k, v in row(i, 0, None, answer=i).items() if k != "response"} for i in range(30)]
    write(tmp_path / "a_materialized_inputs.jsonl", *asked)
    write(tmp_path / "b.jsonl", *[row(i, 0, 1.0, "other") for i in range(30)])
    settings = FilterSettings(validation=0.4)
    result = filter_rollouts([tmp_path / "a.jsonl", tmp_path / "b.jsonl"], tmp_path / "out", settings)
    table = _table(result)
    assert table["split"][:30].to_list() == table["split"][30:].to_list()


def test_cap_and_duplicates_count_a_task_once_whether_or_not_its_input_row_is_known(tmp_path: Path) -> None:
    write(tmp_path / "a.jsonl", *[row(0, i, 1.0) for i in range(3)])
    asked = [{k: v for k, v in row(0, i, None, answer=0).items() if k != "response"} for i in range(3)]
    write(tmp_path / "a_materialized_inputs.jsonl", *asked)
    write(tmp_path / "b.jsonl", *[row(0, i, 1.0) for i in range(1, 6)])
    settings = FilterSettings(validation=0)
    result = filter_rollouts([tmp_path / "a.jsonl", tmp_path / "b.jsonl"], tmp_path / "out", settings)
    assert (result.train, result.dropped) == (4, {"duplicate_completion": 2, "over_cap": 2})


def test_one_task_only_is_refused_with_a_remedy(tmp_path: Path) -> None:
    path = write(tmp_path / "r.jsonl", row(0, 0, 1.0), row(0, 1, 0.0))
    with pytest.raises(UserError, match="one task") as caught:
        run(path)
    assert "--validation 0" in str(caught.value.remedy)
    assert run(path, validation=0).train == 1


@pytest.mark.parametrize(
    ("rows", "settings", "message", "remedy"),
    [
        ([row(i, 0, None) for i in range(3)], {}, "3  reward_missing", "no reward"),
        ([row(i, 0, 0.1 * i) for i in range(3)], {}, "3  below_threshold", "highest reward 0.2"),
        ([row(i, 0, 3.0 * i) for i in range(3)], {}, "from 0 to 6", "--reward-threshold"),
        ([{"question": i} for i in range(3)], {}, "reject:custom_record 3", "did not write it"),
        (["garbage"], {}, "reject:malformed_json 1", "not JSONL"),
        ([], {}, "has no rows", "collection"),
    ],
)
def test_nothing_to_keep_is_explained_and_leaves_no_folder(
    tmp_path: Path, rows: list[Any], settings: dict[str, Any], message: str, remedy: str
) -> None:
    with pytest.raises(UserError) as caught:
        run(write(tmp_path / "r.jsonl", *rows), **settings)
    assert message in caught.value.message and remedy in str(caught.value.remedy)
    assert [path.name for path in tmp_path.iterdir()] == ["r.jsonl"]


def test_train_rows_read_back_as_rollouts(tmp_path: Path) -> None:
    result = run(write(tmp_path / "r.jsonl", *many()))
    assert {line.verdict for line in read_lines([result.path / "train.jsonl"])} == {"ok"}


def test_every_setting_says_what_it_does_and_where_its_default_comes_from() -> None:
    for field in FilterSettings.model_fields.values():
        assert field.description
        assert isinstance(field.json_schema_extra, dict) and field.json_schema_extra["source"]


def test_settings_and_selection_import_no_torch() -> None:
    code = (
        "import sys, gymtrl.selection.settings; assert 'polars' not in sys.modules;"
        "import gymtrl.selection.filter; assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
