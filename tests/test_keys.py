from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest

from gymtrl.errors import UserError
from gymtrl.rollouts.codec import canonical_json
from gymtrl.rollouts.keys import MISSING, input_key, look_up
from gymtrl.rollouts.reader import read_lines
from gymtrl.rollouts.record import Rollout
from gymtrl.rollouts.sidecars import count_failures, load_sidecar


def row(task: int = 0, repeat: int = 0, question: str = "6 x 7?", **more: Any) -> dict[str, Any]:
    said = {"type": "message", "role": "assistant", "content": [{"type": "output_text", "text": f"{repeat}"}]}
    request = {"input": [{"role": "user", "content": question}], "metadata": {"extra_body": f'{{"seed": {repeat}}}'}}
    indexes = {"_ng_task_index": task, "_ng_rollout_index": repeat, "agent_ref": {"name": "a"}}
    return {"responses_create_params": request, "response": {"output": [said]}, "reward": 1.0} | indexes | more


def asked(task: int = 0, repeat: int = 0, question: str = "6 x 7?", **more: Any) -> dict[str, Any]:
    source = row(task, repeat, question, **more)
    return {key: value for key, value in source.items() if key not in ("response", "reward")}


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def rollouts(path: Path, cluster: str | None = None) -> list[Rollout]:
    return [line.rollout for line in read_lines([path], cluster=cluster) if line.rollout is not None]


def test_canonical_json_is_sorted_dense_and_unescaped() -> None:
    assert canonical_json({"b": 1.0, "a": ["ä", None]}) == '{"a":["ä",null],"b":1.0}'.encode()


def test_repeats_and_runs_share_the_task_key(tmp_path: Path) -> None:
    first = rollouts(write(tmp_path / "one.jsonl", [row(0, 0), row(0, 1)]))
    second = rollouts(write(tmp_path / "two.jsonl", [row(7, 0)]))
    assert len({r.task_key for r in (*first, *second)}) == 1


@pytest.mark.parametrize(
    "other",
    [
        row(question="6 x 8?"),
        row(agent_ref={"name": "b"}),
        row(responses_create_params=row()["responses_create_params"] | {"tools": [{"type": "function", "name": "f"}]}),
    ],
)
def test_another_question_agent_or_tool_is_another_task(tmp_path: Path, other: dict[str, Any]) -> None:
    one, two = rollouts(write(tmp_path / "r.jsonl", [row(), other]))
    assert one.task_key != two.task_key


def test_the_task_key_is_what_it_was_when_datasets_were_written(tmp_path: Path) -> None:
    (read,) = rollouts(write(tmp_path / "r.jsonl", [row()]))
    assert read.task_key == hashlib.sha256(b'["a",[{"content":"6 x 7?","role":"user"}],[]]').hexdigest()


def test_seed_and_sampling_do_not_change_the_input_key() -> None:
    sampled = asked(3, 5)
    sampled["responses_create_params"] |= {"temperature": 0.7, "max_output_tokens": 10, "top_p": None}
    plain = {"responses_create_params": {"input": [{"role": "user", "content": "6 x 7?"}]}}
    assert input_key(asked()) == input_key(sampled) == input_key(plain)
    assert input_key(plain | {"expected_answer": "42"}) != input_key(plain)
    assert input_key(asked(question="6 x 8?")) != input_key(plain)


def test_the_sidecar_gives_input_key_and_cluster_key(tmp_path: Path) -> None:
    path = write(tmp_path / "r.jsonl", [row(0, 0), row(0, 1), row(1, 0, "other"), row(2, 0, "unknown")])
    write(tmp_path / "r_materialized_inputs.jsonl", [asked(0, 0), asked(0, 1), asked(1, 0, "other")])
    one, again, other, unknown = rollouts(path)
    assert one.input_key == again.input_key == one.cluster_key == input_key(asked())
    assert other.input_key != one.input_key
    assert (unknown.input_key, unknown.cluster_key) == (None, unknown.task_key)


def test_input_rows_come_back_without_indexes_and_seed(tmp_path: Path) -> None:
    path = write(tmp_path / "r.jsonl", [row()])
    source = asked(answer=42)
    source["responses_create_params"]["metadata"] |= {"extra_body": '{"seed": 0, "top_k": 5}', "kind": "sum"}
    write(tmp_path / "r_materialized_inputs.jsonl", [asked(1), source])
    sidecar = load_sidecar(path)
    found = sidecar.find(0, 0)
    assert found is not None
    assert sidecar.read(found) == {
        "responses_create_params": {
            "input": [{"role": "user", "content": "6 x 7?"}],
            "metadata": {"kind": "sum", "extra_body": '{"top_k": 5}'},
        },
        "agent_ref": {"name": "a"},
        "answer": 42,
    }


def test_a_named_cluster_is_looked_up_in_the_row_then_in_its_input_row(tmp_path: Path) -> None:
    rows = [row(0, 0, "a", meta={"template": "x"}), row(1, 0, "b"), row(2, 0, "c")]
    path = write(tmp_path / "r.jsonl", rows)
    write(tmp_path / "r_materialized_inputs.jsonl", [asked(1, 0, "b", meta={"template": "x"})])
    one, two, three = rollouts(path, "meta.template")
    assert one.cluster_key == two.cluster_key != three.cluster_key
    assert three.cluster_key == three.task_key
    assert [r.flags for r in (one, two, three)] == [(), (), ("cluster_missing",)]


def test_a_cluster_that_no_row_has_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"meta\.template"):
        rollouts(write(tmp_path / "r.jsonl", [row()]), "meta.template")


def test_paths_go_through_objects_and_lists() -> None:
    assert look_up({"a": [{"b": 0}]}, "a.0.b") == 0
    assert look_up({"a": [{"b": None}]}, "a.0.b") is MISSING
    assert look_up({"a": 1}, "a.b") is MISSING


def test_failed_attempts_are_counted_by_class(tmp_path: Path) -> None:
    path = write(tmp_path / "r.jsonl", [row()])
    write(tmp_path / "r_failures.jsonl", [{"_ng_failure_class": c} for c in ("timeout", "timeout", "crash")])
    assert count_failures(path) == {"timeout": 2, "crash": 1}
    assert count_failures(tmp_path / "other.jsonl") == {}
