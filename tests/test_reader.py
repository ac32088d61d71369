from __future__ import annotations

import gzip
import hashlib
import io
import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from gymtrl.errors import UserError
from gymtrl.rollouts.inputs import expand_inputs, require_rollouts, spool
from gymtrl.rollouts.reader import read_at, read_bytes, read_lines
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


# SHA-256 over every line that NeMo Gym 0.4.0 ships: path below site-packages, line, verdict and reason.
SHIPPED_VERDICTS = "9cbb2e9731f26babd6bc962b344835306150d40af0cf59a56b4981dff4963bfe"


def test_every_line_that_gym_ships_has_the_expected_verdict(gym_site_packages: Path) -> None:
    lines = list(read_lines(sorted(gym_site_packages.rglob("*rollout*.jsonl"))))
    told = "".join(
        f"{Path(line.origin.file).relative_to(gym_site_packages)}:{line.origin.line} {line.verdict}:{line.reason}\n"
        for line in lines
    )
    assert hashlib.sha256(told.encode()).hexdigest() == SHIPPED_VERDICTS
    assert Counter(line.verdict for line in lines) == {"ok": 485, "context": 53, "reject": 57, "skip": 100}
    assert Counter(line.reason for line in lines if line.reason) == {
        "materialized_input": 80,
        "tools_undeclared": 33,
        "hidden_context": 20,
        "reward_profile": 20,
        "malformed_json": 20,
        "task_only": 10,
        "unsupported_modality_audio": 5,
        "missing_tool_output": 5,
        "empty_output": 5,
        "empty_assistant": 5,
        "no_prompt": 5,
        "ambiguous_turns": 2,
    }
    found = {(Path(line.origin.file).parts[-3], line.reason) for line in lines if line.verdict in ("context", "reject")}
    assert {
        ("aalcr", "hidden_context"),
        ("gdpval", "missing_tool_output"),
        ("math_with_autograder", "empty_assistant"),
        ("mini_swe_agent_2", "tools_undeclared"),
        ("scicode", "no_prompt"),
        ("speed_bench", "ambiguous_turns"),
    } <= found


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


def test_a_cut_last_line_is_malformed(tmp_path: Path) -> None:
    path = write(tmp_path / "rollouts.jsonl", rollout())
    path.write_bytes(path.read_bytes() + json.dumps(rollout()).encode()[:50])
    assert verdicts(path) == ["ok", "reject:malformed_json"]


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
        (b"Infinity", float("inf"), ()),
        (b"1e999", float("inf"), ()),
    ],
)
def test_rewards(tmp_path: Path, written: bytes, reward: float | None, flags: tuple[str, ...]) -> None:
    data = json.dumps(rollout(reward=0)).encode().replace(b'"reward": 0', b'"reward": ' + written)
    read = only(write(tmp_path / "rollouts.jsonl", data)).rollout
    assert read is not None
    assert (read.reward, read.flags) == (reward, flags)


def test_a_nan_reward_is_seen_and_a_surrogate_elsewhere_does_no_harm(tmp_path: Path) -> None:
    line = only(write(tmp_path / "rollouts.jsonl", rollout(reward=float("nan"), note="\ud800")))
    assert line.verdict == "ok" and line.rollout is not None
    assert line.rollout.reward != line.rollout.reward


@pytest.mark.parametrize("where", ["temperature", "top_p"])
def test_a_number_beyond_any_float_is_infinite(tmp_path: Path, where: str) -> None:
    request = rollout()["responses_create_params"] | {where: 10**399}
    read = only(write(tmp_path / "rollouts.jsonl", rollout(responses_create_params=request))).rollout
    assert read is not None and getattr(read.sampling, where) == float("inf")


def nested(depth: int) -> bytes:
    return b'{"a":' * depth + b"1" + b"}" * depth


def with_tool(parameters: bytes) -> bytes:
    tool = {"type": "function", "name": "f", "parameters": "HERE"}
    row = rollout(responses_create_params=rollout()["responses_create_params"] | {"tools": [tool]})
    return json.dumps(row).encode().replace(b'"HERE"', parameters)


@pytest.mark.parametrize("depth", [150, *range(900, 1000, 7), 5000])
def test_deep_nesting_is_refused_wherever_it_stands(tmp_path: Path, depth: int) -> None:
    place = json.dumps(rollout(note=0)).encode()
    deep_input = place.replace(b'"content": "6', b'"extra": ' + nested(depth) + b', "content": "6')
    path = write(tmp_path / "rollouts.jsonl", with_tool(nested(depth)), deep_input, rollout())
    tool, _, sound = read_lines([path])
    assert (tool.reason, tool.detail) == ("malformed_json", "nested too deeply")
    assert sound.verdict == "ok"
    write(tmp_path / "rollouts_materialized_inputs.jsonl", with_tool(nested(depth))[:-1] + b', "_ng_task_index": 0}')
    assert len(list(read_lines([path]))) == 3


@pytest.mark.parametrize("number", [b"NaN", b"-Infinity", b"1e999"])
def test_a_tool_that_no_json_can_hold_is_refused(tmp_path: Path, number: bytes) -> None:
    path = write(tmp_path / "rollouts.jsonl", with_tool(b'{"maximum": ' + number + b"}"))
    assert verdicts(path) == ["reject:roundtrip_mismatch"]


def test_details_are_sound_text(tmp_path: Path) -> None:
    call = {"type": "function_call", "call_id": "\ud800", "name": "f", "arguments": "{}"}
    said = {"type": "message", "role": "assistant", "content": "a"}
    path = write(tmp_path / "rollouts.jsonl", {"\ud800": 1}, rollout(response={"output": [call, said]}))
    for line in read_lines([path]):
        assert line.verdict == "reject" and line.detail.encode()


def test_fields_of_the_record(tmp_path: Path) -> None:
    row = rollout(_ng_task_index=3, _ng_rollout_index=1, agent_ref={"name": "a"}, mask_sample=True)
    row["response"]["incomplete_details"] = {"reason": "max_output_tokens"}
    read = only(write(tmp_path / "rollouts.jsonl", row)).rollout
    assert read is not None
    assert (read.agent, read.model, read.task_index, read.rollout_index) == ("a", "m", 3, 1)
    assert (read.masked, read.truncated, read.turns, read.input_tokens, read.output_tokens) == (True, True, 1, 9, 2)


def test_places_hold_with_blank_lines_and_windows_line_ends(tmp_path: Path) -> None:
    first, second = json.dumps(rollout()).encode(), json.dumps(rollout(reward=0.25, note="ä")).encode()
    path = tmp_path / "rollouts.jsonl"
    path.write_bytes(b"\n" + first + b"\r\n  \n" + second)
    lines = list(read_lines([path]))
    assert [line.origin.line for line in lines] == [2, 4]
    assert [read_bytes(line.origin) for line in lines] == [first, second]
    assert lines[1].origin.row_id == hashlib.sha256(second).hexdigest()[:16]
    assert [read_at(line.origin) for line in lines] == lines


def test_reading_again_notices_a_changed_file(tmp_path: Path) -> None:
    path = write(tmp_path / "rollouts.jsonl", rollout())
    origin = only(path).origin
    write(path, rollout(reward=0.0))
    with pytest.raises(UserError, match="has changed"):
        read_at(origin)


def test_a_line_too_long_is_passed_over(tmp_path: Path) -> None:
    long = json.dumps(rollout(note="x" * 3_000_000)).encode()
    path = write(tmp_path / "rollouts.jsonl", rollout(), long, rollout())
    lines = list(read_lines([path], max_line_bytes=1000))
    assert [line.reason for line in lines] == ["", "line_too_long", ""]
    assert [read_bytes(line.origin) for line in lines][1] == long


def test_folders_give_their_rollout_files_without_sidecars(tmp_path: Path) -> None:
    for name in ("rollouts", "rollouts_failures", "rollouts_materialized_inputs", "other"):
        write(tmp_path / f"{name}.jsonl", rollout())
    assert expand_inputs([tmp_path, tmp_path / "rollouts.jsonl"]) == [tmp_path / "rollouts.jsonl"]


def test_missing_and_packed_inputs_are_named(tmp_path: Path) -> None:
    write(tmp_path / "rollouts.jsonl", rollout())
    with pytest.raises(UserError, match=r"rollout\.jsonl does not exist") as missing:
        expand_inputs([tmp_path / "rollout.jsonl"])
    assert "rollouts.jsonl" in str(missing.value.remedy)
    (tmp_path / "r.jsonl.gz").write_bytes(gzip.compress(b"{}"))
    with pytest.raises(UserError, match="is compressed"):
        expand_inputs([tmp_path / "r.jsonl.gz"])
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="holds no"):
        expand_inputs([tmp_path / "empty"])


def test_a_stream_is_spooled_to_a_plain_file(tmp_path: Path) -> None:
    path = spool(io.BytesIO(json.dumps(rollout()).encode()), tmp_path / "deep" / "stdin.jsonl")
    assert verdicts(path) == ["ok"]


def test_inputs_without_a_rollout_say_what_they_seem_to_be(tmp_path: Path) -> None:
    path = tmp_path / "rollouts.jsonl"
    with pytest.raises(UserError, match="has no rows"):
        require_rollouts([path], {})
    with pytest.raises(UserError, match="reject:task_only 3, reject:malformed_json 1") as tasks:
        require_rollouts([path], {"reject:task_only": 3, "reject:malformed_json": 1})
    assert "task file" in str(tasks.value.remedy)
    require_rollouts([path], {"context:hidden_context": 1, "reject:task_only": 3})
