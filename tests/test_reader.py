from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest

from gymtrl.errors import UserError
from gymtrl.rollouts.inputs import expand_inputs, require_rollouts
from gymtrl.rollouts.reader import read_at, read_lines
from gymtrl.rollouts.record import Line


def rollout(**more: Any) -> dict[str, Any]:
    said = {"type": "message", "role": "assistant", "content": [{"type": "output_text", "text": "42"}]}
    return {
        "responses_create_params": {"input": [{"role": "user", "content": "6 x 7?"}]},
        "response": {"output": [said], "model": "m", "usage": {"input_tokens": 9, "output_tokens": 2}},
        "reward": 1.0,
    } | more


def write(path: Path, *rows: Any) -> Path:
    path.write_bytes(b"".join((row if isinstance(row, bytes) else json.dumps(row).encode()) + b"\n" for row in rows))
    return path


def verdicts(path: Path) -> list[str]:
    return [f"{line.verdict}:{line.reason}".rstrip(":") for line in read_lines([path])]


def only(path: Path) -> Line:
    (line,) = read_lines([path])
    return line


def test_what_a_line_is(tmp_path: Path) -> None:
    asked = {"responses_create_params": {"input": "6 x 7?"}}
    path = write(
        tmp_path / "rollouts.jsonl",
        rollout(),
        b'{"cut',
        b"[1]",
        rollout(_ng_failure_class="timeout"),
        asked,
        asked | {"_ng_rollout_index": 0},
        asked | {"mean/reward": 0.5},
        {"mean/reward": 0.5},
        asked | {"_ng_result_type": "episode"},
        {"question": "6 x 7?"},
        rollout(response={"output": []}),
        rollout(_ng_result_type="rollout"),
    )
    assert verdicts(path) == [
        "ok",
        "reject:malformed_json",
        "reject:not_object",
        "reject:failure_row",
        "reject:task_only",
        "skip:materialized_input",
        "skip:reward_profile",
        "skip:reward_profile",
        "reject:episode_result",
        "reject:custom_record",
        "reject:empty_output",
        "ok",
    ]


def test_undeclared_tools_and_hidden_context(tmp_path: Path) -> None:
    call = {"type": "function_call", "call_id": "1", "name": "f", "arguments": "{}"}
    row = rollout()
    undeclared = rollout(response={"output": [call]})
    declared = rollout(response={"output": [call], "tools": [{"type": "function", "name": "f", "strict": True}]})
    shown = len(json.dumps(row["responses_create_params"]["input"])) + len("[]")
    at_limit = rollout(response=row["response"] | {"usage": {"input_tokens": shown + 500}})
    above = rollout(response=row["response"] | {"usage": {"input_tokens": shown + 501}})
    path = write(tmp_path / "rollouts.jsonl", undeclared, declared, at_limit, above)
    assert verdicts(path) == ["context:tools_undeclared", "ok", "ok", "context:hidden_context"]
    lines = list(read_lines([path]))
    assert lines[1].rollout is not None and lines[3].rollout is not None
    assert lines[1].rollout.tools == ({"type": "function", "function": {"name": "f"}},)


@pytest.mark.parametrize(
    ("written", "reward", "flags"),
    [
        (b"1", 1.0, ()),
        (b"-0.5", -0.5, ()),
        (b"true", 1.0, ()),
        (b"null", None, ()),
        (b'"high"', None, ("reward_not_a_number",)),
    ],
)
def test_rewards(tmp_path: Path, written: bytes, reward: float | None, flags: tuple[str, ...]) -> None:
    data = json.dumps(rollout(reward=0)).encode().replace(b'"reward": 0', b'"reward": ' + written)
    read = only(write(tmp_path / "rollouts.jsonl", data)).rollout
    assert read is not None
    assert (read.reward, read.flags) == (reward, flags)


def test_fields_of_the_record(tmp_path: Path) -> None:
    row = rollout(_ng_task_index=3, _ng_rollout_index=1, agent_ref={"name": "a"}, mask_sample=True)
    row["response"]["incomplete_details"] = {"reason": "max_output_tokens"}
    read = only(write(tmp_path / "rollouts.jsonl", row)).rollout
    assert read is not None
    assert (read.agent, read.model, read.task_index, read.rollout_index) == ("a", "m", 3, 1)
    assert (read.masked, read.truncated, read.turns, read.input_tokens, read.output_tokens) == (True, True, 1, 9, 2)


def test_reading_again_notices_a_changed_file(tmp_path: Path) -> None:
    path = write(tmp_path / "rollouts.jsonl", rollout())
    origin = only(path).origin
    write(path, rollout(reward=0.0))
    with pytest.raises(UserError, match="has changed"):
        read_at(origin)


def test_folders_give_their_rollout_files_without_sidecars(tmp_path: Path) -> None:
    for name in ("rollouts", "rollouts_failures", "rollouts_materialized_inputs", "other"):
        write(tmp_path / f"{name}.jsonl", rollout())
    assert expand_inputs([tmp_path, tmp_path / "rollouts.jsonl"]) == [tmp_path / "rollouts.jsonl"]


def test_patterns_give_what_they_match_without_sidecars(tmp_path: Path) -> None:
    for name in (
        "a/rollouts",
        "a/rollouts_failures",
        "b/c/rollouts",
        "b/c/rollouts_reward_profiling",
        ".hidden/rollouts",
    ):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        write(tmp_path / f"{name}.jsonl", rollout())
    a, c = tmp_path / "a/rollouts.jsonl", tmp_path / "b/c/rollouts.jsonl"
    assert expand_inputs([tmp_path / "*/rollouts*.jsonl"]) == [a]
    assert expand_inputs([tmp_path / "*"]) == [a]
    assert expand_inputs([tmp_path / "**/rollout?*.jsonl", a]) == [a, c]
    assert expand_inputs([tmp_path / "**/*_failures.jsonl"]) == [tmp_path / "a/rollouts_failures.jsonl"]
    assert [line.origin.file for line in read_lines([tmp_path / "[ab]/**/*.jsonl"])] == [str(a), str(c)]
    with pytest.raises(UserError, match="no file matches") as caught:
        expand_inputs([a, tmp_path / "*/none*.jsonl"])
    assert caught.value.remedy
    literal = write(tmp_path / "rollouts[1]*.jsonl", rollout())
    assert expand_inputs([literal]) == [literal]


def test_missing_and_packed_inputs_are_named(tmp_path: Path) -> None:
    write(tmp_path / "rollouts.jsonl", rollout())
    with pytest.raises(UserError, match=r"rollout\.jsonl does not exist") as missing:
        expand_inputs([tmp_path / "rollout.jsonl"])
    assert "rollouts.jsonl" in str(missing.value.remedy)
    (tmp_path / "r.jsonl.gz").write_bytes(gzip.compress(b"{}"))
    with pytest.raises(UserError, match="is compressed"):
        expand_inputs([tmp_path / "r.jsonl.gz"])
    with pytest.raises(UserError, match=r"r_rollouts\.jsonl\.gz is compressed"):
        (tmp_path / "packed").mkdir()
        (tmp_path / "packed/r_rollouts.jsonl.gz").write_bytes(gzip.compress(b"{}"))
        expand_inputs([tmp_path / "packed"])
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="holds no"):
        expand_inputs([tmp_path / "empty"])


def test_inputs_without_a_rollout_say_what_they_seem_to_be(tmp_path: Path) -> None:
    path = tmp_path / "rollouts.jsonl"
    with pytest.raises(UserError, match="has no rows"):
        require_rollouts([path], {})
    with pytest.raises(UserError, match="reject:task_only 3, reject:malformed_json 1") as tasks:
        require_rollouts([path], {"reject:task_only": 3, "reject:malformed_json": 1})
    assert "task file" in str(tasks.value.remedy)
    require_rollouts([path], {"context:hidden_context": 1, "reject:task_only": 3})
