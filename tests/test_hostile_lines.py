"""Lines and files that nobody should have written: each gets its verdict, none stops the reading."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from gymtrl.errors import UserError
from gymtrl.rollouts import convert, tools
from gymtrl.rollouts.reader import read_at, read_bytes, read_lines
from gymtrl.rollouts.record import Line, Rollout
from rows import row

SOUND = json.dumps(row("6 x 7?", "42", 1.0)).encode()
SURROGATE = b'"\\ud800"'
PLAIN: dict[str, Any] = {
    "note": None,
    "reward": 0.5,
    "index": 0,
    "tokens": 9,
    "input": None,
    "content": "6 x 7?",
    "tools": {},
    "description": "f",
    "arguments": "{}",
    "call_id": "c",
    "agent": "a",
}


def hostile(place: str, raw: bytes) -> bytes:
    """A rollout with raw bytes in one place; its call is declared and answered."""
    here = PLAIN | {place: "HERE"}
    made = row("6 x 7?", "42", here["reward"], index=here["index"], note=here["note"])
    made["agent_ref"]["name"] = here["agent"]
    made["responses_create_params"] = {
        "input": [{"role": "user", "content": here["content"], "more": here["input"]}],
        "tools": [{"type": "function", "name": "f", "description": here["description"], "parameters": here["tools"]}],
    }
    made["response"] |= {"usage": {"input_tokens": here["tokens"]}}
    called = {"type": "function_call", "name": "f", "call_id": here["call_id"], "arguments": here["arguments"]}
    answered = {"type": "function_call_output", "call_id": here["call_id"], "output": "42"}
    made["response"]["output"][:0] = [called, answered]
    if place == "arguments":
        raw = json.dumps(raw.decode("utf-8", "surrogatepass")).encode()
    return json.dumps(made).encode().replace(b'"HERE"', raw)


def nested(depth: int) -> bytes:
    return b'{"a":' * depth + b"1" + b"}" * depth


def told(line: Line) -> str:
    return f"{line.verdict}:{line.reason}" if line.reason else line.verdict


def read(path: Path, data: bytes, **options: Any) -> list[Line]:
    path.write_bytes(data)
    return list(read_lines([path], **options))


def record(path: Path, data: bytes) -> Rollout:
    (line,) = read(path, data)
    assert line.rollout is not None, line
    return line.rollout


MALFORMED, MISMATCH = "reject:malformed_json", "reject:roundtrip_mismatch"
LONG = b"1" + b"0" * 400

LINES: dict[str, tuple[bytes, str]] = {
    "nothing hostile": (hostile("note", b"1"), "ok"),
    # What is no JSON object.
    "a cut line": (SOUND[:50], MALFORMED),
    "two objects": (SOUND + SOUND, MALFORMED),
    "one quote for two": (SOUND.replace(b'"', b"'"), MALFORMED),
    "a number": (b"1", "reject:not_object"),
    "a text": (b'"a"', "reject:not_object"),
    "null": (b"null", "reject:not_object"),
    "true": (b"true", "reject:not_object"),
    "NaN alone": (b"NaN", "reject:not_object"),
    "a list of rollouts": (b"[" + SOUND + b"]", "reject:not_object"),
    "an empty object": (b"{}", "reject:custom_record"),
    # Bytes.
    "a NUL alone": (b"\0", MALFORMED),
    "a hole of NULs, as a crash leaves it": (b"\0" * 4096, MALFORMED),
    "a NUL before the object": (b"\0" + SOUND, MALFORMED),
    "a NUL after the object": (SOUND + b"\0", MALFORMED),
    "a NUL in a text": (hostile("content", b'"a\0b"'), MALFORMED),
    "a NUL in a text, escaped": (hostile("content", b'"a\\u0000b"'), "ok"),
    "a NUL in the note, escaped": (hostile("note", b'"a\\u0000b"'), "ok"),
    "a byte order mark": (b"\xef\xbb\xbf" + SOUND, "ok"),
    "a byte order mark alone": (b"\xef\xbb\xbf", MALFORMED),
    "two byte order marks": (b"\xef\xbb\xbf" * 2 + SOUND, MALFORMED),
    "a byte order mark in a text": (hostile("content", '"\ufeffa"'.encode()), "ok"),
    "invalid UTF-8 in a text": (hostile("content", b'"\xff\xfe"'), MALFORMED),
    "invalid UTF-8 in the note": (hostile("note", b'"\xc3("'), MALFORMED),
    "an overlong slash": (hostile("note", b'"\xc0\xaf"'), MALFORMED),
    "a code point beyond Unicode": (hostile("note", b'"\xf4\x90\x80\x80"'), MALFORMED),
    "invalid UTF-8 outside any text": (SOUND + b"\xff", MALFORMED),
    "a no-break space alone": ("\u00a0".encode(), MALFORMED),
    "a tab in a text": (hostile("content", b'"a\tb"'), MALFORMED),
    "a carriage return between tokens": (SOUND.replace(b", ", b",\r "), "ok"),
    "a carriage return in a text": (hostile("content", b'"a\rb"'), MALFORMED),
    "a carriage return before and after": (b"\r" + SOUND + b"\r\r", "ok"),
    "separators of lines and paragraphs": (hostile("content", '"a\u2028b\u2029c\x85d"'.encode()), "ok"),
    # Lone surrogates: as escapes, and as the bytes that UTF-8 forbids.
    "a surrogate in the note": (hostile("note", SURROGATE), "ok"),
    "a surrogate in a key of the note": (hostile("note", b'{"\\udc00": 1}'), "ok"),
    "a surrogate in the note, as bytes": (hostile("note", b'"\xed\xa0\x80"'), "ok"),
    "a surrogate in a text": (hostile("content", SURROGATE), MISMATCH),
    "a surrogate in a text, as bytes": (hostile("content", b'"\xed\xa0\x80"'), MISMATCH),
    "a whole pair in a text": (hostile("content", b'"\\ud83d\\ude00"'), "ok"),
    "a pair the wrong way round": (hostile("content", b'"\\ude00\\ud83d"'), MISMATCH),
    "a surrogate in the arguments": (hostile("arguments", b'{"a": "\xed\xa0\x80"}'), MISMATCH),
    "a surrogate in the arguments, escaped twice": (hostile("arguments", b'{"a": "\\ud800"}'), MISMATCH),
    "a surrogate in a key of the arguments": (hostile("arguments", b'{"\\ud800": 1}'), MISMATCH),
    "a surrogate in a call's id": (hostile("call_id", SURROGATE), MISMATCH),
    "a surrogate in the tools": (hostile("tools", b'{"a": "\\ud800"}'), MISMATCH),
    "a surrogate in a key of the tools": (hostile("tools", b'{"\\ud800": 1}'), MISMATCH),
    "a surrogate in a tool's description": (hostile("description", SURROGATE), MISMATCH),
    "a surrogate in the agent's name": (hostile("agent", SURROGATE), "ok"),
    "a surrogate in an item's type": (
        SOUND.replace(b'{"role"', b'{"type": "\\ud800", "role"', 1),
        "reject:unsupported_item_type:_",
    ),
    # Numbers.
    "NaN as reward": (hostile("reward", b"NaN"), "ok"),
    "infinity as reward": (hostile("reward", b"-Infinity"), "ok"),
    "an infinite index": (hostile("index", b"Infinity"), "ok"),
    "NaN tokens": (hostile("tokens", b"NaN"), "ok"),
    "NaN in the note": (hostile("note", b"[NaN]"), "ok"),
    "NaN in the input": (hostile("input", b"NaN"), "ok"),
    "NaN in the tools": (hostile("tools", b'{"a": NaN}'), MISMATCH),
    "infinity in the tools": (hostile("tools", b'{"a": -Infinity}'), MISMATCH),
    "a double beyond range in the tools": (hostile("tools", b'{"a": 1e999}'), MISMATCH),
    "NaN in the arguments": (hostile("arguments", b'{"a": NaN}'), "reject:bad_tool_arguments"),
    "infinity in the arguments": (hostile("arguments", b'{"a": [Infinity]}'), "reject:bad_tool_arguments"),
    "a double beyond range in the arguments": (hostile("arguments", b'{"a": -1e999}'), "reject:bad_tool_arguments"),
    "nan in small letters": (hostile("reward", b"nan"), MALFORMED),
    "a long integer as reward": (hostile("reward", LONG), "ok"),
    "a long integer as index": (hostile("index", LONG), "ok"),
    "a long integer of tokens": (hostile("tokens", LONG), "ok"),
    "a long integer in the tools": (hostile("tools", b'{"a": ' + LONG + b"}"), "ok"),
    "a long integer in the arguments": (hostile("arguments", b'{"a": ' + LONG + b"}"), "ok"),
    "an integer of 5,000 digits": (hostile("reward", b"1" * 5000), MALFORMED),
    "an integer of 5,000 digits in the arguments": (
        hostile("arguments", b'{"a": ' + b"1" * 5000 + b"}"),
        "reject:bad_tool_arguments",
    ),
    "a number with a leading zero": (hostile("reward", b"01"), MALFORMED),
    "a number in hexadecimal": (hostile("reward", b"0x1"), MALFORMED),
    # Depth.
    "101 levels in the tools": (hostile("tools", nested(101)), MALFORMED),
    "101 levels in the arguments": (hostile("arguments", nested(101)), "reject:bad_tool_arguments"),
    "10,000 levels in the tools": (hostile("tools", nested(10_000)), MALFORMED),
    "10,000 levels in the arguments": (hostile("arguments", nested(10_000)), "reject:bad_tool_arguments"),
    "100,000 levels in the note": (hostile("note", nested(100_000)), MALFORMED),
    "100,000 levels in the input": (hostile("input", nested(100_000)), MALFORMED),
    "100,000 levels of lists": (b"[" * 100_000, MALFORMED),
}


@pytest.mark.parametrize("name", LINES)
def test_each_hostile_line_has_its_verdict(tmp_path: Path, name: str) -> None:
    data, expected = LINES[name]
    lines = read(tmp_path / "rollouts.jsonl", SOUND + b"\n" + data + b"\n" + SOUND)
    assert [line.origin.line for line in lines] == [1, 2, 3]
    assert [told(line) for line in (lines[0], lines[2])] == ["ok", "ok"]
    hit = lines[1]
    assert told(hit) == expected
    assert hit.detail.encode().decode() == hit.detail
    assert read_bytes(hit.origin) == data.rstrip(b"\r")
    again = read_at(hit.origin)
    assert repr(again) == repr(hit)  # as text, since NaN is not itself


@pytest.mark.parametrize("place", ["note", "input", "tools", "arguments"])
@pytest.mark.parametrize("depth", [101, 150, *range(900, 1000, 7), 5000, 10_000])
def test_no_depth_stops_the_reading(tmp_path: Path, place: str, depth: int) -> None:
    (deep, sound) = read(tmp_path / "rollouts.jsonl", hostile(place, nested(depth)) + b"\n" + SOUND)
    # How deep the rest of a row may be is the parser's to say; the record holds nothing of it.
    possible = {"tools": {MALFORMED}, "arguments": {"reject:bad_tool_arguments"}}.get(place, {"ok", MALFORMED})
    assert told(deep) in possible
    assert told(deep) != MALFORMED or deep.detail == "nested too deeply"
    assert told(sound) == "ok"


@pytest.mark.parametrize("place", ["strict", "input", "head"])
def test_no_depth_between_the_limits_of_parser_and_writer_stops_the_reading(tmp_path: Path, place: str) -> None:
    """With more tokens counted than the row shows, what nobody reads is walked through as well."""
    made = row("6 x 7?", "42", 1.0)
    user = {"role": "user", "content": "6 x 7?"}
    tool = {"type": "function", "name": "f", "parameters": {}, "strict": "HERE" if place == "strict" else True}
    made["responses_create_params"] = {"input": [user], "tools": [tool]}
    made["response"]["usage"] = {"input_tokens": 10_000_000}
    deep = user | {"more": "HERE"}
    if place == "input":
        made["responses_create_params"]["input"] = [deep]
    elif place == "head":
        made["response"]["output"].insert(0, deep)
    depths = [10, *range(850, 1011)]
    written = [json.dumps(made).encode().replace(b'"HERE"', nested(depth)) for depth in depths]
    for cluster in (None, "reward"):
        lines = read(tmp_path / "rollouts.jsonl", b"\n".join([*written, SOUND]), cluster=cluster)
        assert len(lines) == len(depths) + 1
        assert told(lines[0]) == "context:hidden_context" and told(lines[-1]) == "ok"
        deeper = {MALFORMED} if place == "strict" else {"context:hidden_context", MALFORMED}
        assert {told(line) for line in lines[1:-1]} <= deeper
        assert {line.detail for line in lines if line.reason == "malformed_json"} == {"nested too deeply"}


def test_a_cluster_that_cannot_be_looked_up_changes_no_verdict(tmp_path: Path) -> None:
    for note in (b"1" * 5000, nested(2000)):
        data = hostile("note", note)
        (plain,) = read(tmp_path / "rollouts.jsonl", data)
        named, sound = read(tmp_path / "rollouts.jsonl", data + b"\n" + SOUND, cluster="reward")
        assert (told(named), named.detail) == (told(plain), plain.detail)
        assert told(sound) == "ok"
    (long, _) = read(tmp_path / "rollouts.jsonl", hostile("note", b"1" * 5000) + b"\n" + SOUND, cluster="reward")
    assert long.rollout is not None and long.rollout.flags == ("cluster_missing",)


@pytest.mark.parametrize("depth", [99, 500, 960])
def test_a_cluster_of_any_depth_stops_nothing(tmp_path: Path, depth: int) -> None:
    lines = read(
        tmp_path / "rollouts.jsonl", hostile("note", nested(depth)) + b"\n" + hostile("note", b"1"), cluster="note"
    )
    assert told(lines[0]) in ("ok", MALFORMED) and told(lines[1]) == "ok"


def test_only_what_is_short_is_kept_for_the_next_row(tmp_path: Path) -> None:
    kept = (convert._asked, convert._asked_key, tools._kept_tools)
    long = [json.dumps(f"{number} " + "x" * 100_000).encode() for number in range(5)]
    instructed = [SOUND.replace(b'"input": ', b'"instructions": ' + text + b', "input": ') for text in long]
    told_leniently = [line.replace(b'"reward": 1.0', b'"reward": NaN') for line in (*instructed, SOUND)]
    asked = [hostile("content", text) for text in long]
    for lines, sizes in ((asked, [0, 0, 1]), (instructed, [0, 0, 1]), (told_leniently, [0, 0, 0])):
        for cache in kept:
            cache.cache_clear()
        assert {told(line) for line in read(tmp_path / "rollouts.jsonl", b"\n".join(lines))} == {"ok"}
        assert [cache.cache_info().currsize for cache in kept] == sizes
    described = [hostile("description", text) for text in long]
    assert {told(line) for line in read(tmp_path / "rollouts.jsonl", b"\n".join(described))} == {"ok"}
    assert tools._kept_tools.cache_info().currsize == 0
    read(tmp_path / "rollouts.jsonl", SOUND + b"\n" + SOUND)
    assert (convert._asked_key.cache_info().misses, convert._asked_key.cache_info().hits) == (6, 1)


@pytest.mark.parametrize(
    "data",
    [
        b'{"' + b"k" * 3_000_000 + b'": 1}',
        hostile("note", b"1").replace(b'"name": "f", "call_id"', b'"name": "' + b"n" * 3_000_000 + b'", "call_id"'),
        hostile("call_id", b'"' + b"c" * 3_000_000 + b'"').replace(b'"function_call"', b'"message"', 1),
        hostile("call_id", b'"' + b"c" * 3_000_000 + b'"').replace(b'"function_call",', b'"function_call_output",', 1),
    ],
)
def test_no_detail_is_long(tmp_path: Path, data: bytes) -> None:
    (line,) = read(tmp_path / "rollouts.jsonl", data)
    assert line.verdict != "ok" and 0 < len(line.detail) <= 300


@pytest.mark.parametrize(
    ("response", "more", "reason"),
    [
        (b"null", b"", "custom_record"),
        (b'"text"', b'"_ng_rollout_index": 0, ', "custom_record"),
        (b"[]", b"", "custom_record"),
        (None, b'"_ng_rollout_index": 0, ', "materialized_input"),
        (None, b"", "task_only"),
    ],
)
def test_a_request_with_a_response_that_is_none_was_not_only_asked(
    tmp_path: Path, response: bytes | None, more: bytes, reason: str
) -> None:
    answered = b"" if response is None else b'"response": ' + response + b", "
    data = b"{" + more + answered + b'"responses_create_params": {"input": "a"}, "reward": 1.0}'
    (line,) = read(tmp_path / "rollouts.jsonl", data)
    assert line.reason == reason


def test_only_texts_are_names_of_tools(tmp_path: Path) -> None:
    """`None` is no name that a list declares."""
    made = hostile("note", b"1").replace(b'"name": "f", "call_id"', b'"name": "None", "call_id"')
    unnamed = made.replace(b'"name": "f", "description"', b'"description"')
    assert [told(line) for line in read(tmp_path / "rollouts.jsonl", unnamed)] == ["context:tools_undeclared"]


def test_input_rows_that_differ_in_numbers_that_no_json_holds_differ_in_their_keys(tmp_path: Path) -> None:
    values = [b"null", b"NaN", b"Infinity", b"-Infinity", b"1"]
    asked = [
        hostile("note", value).replace(b'"_ng_task_index": 0', b'"_ng_task_index": %d' % index)
        for index, value in enumerate(values)
    ]
    (tmp_path / "rollouts_materialized_inputs.jsonl").write_bytes(b"\n".join(asked))
    lines = read(tmp_path / "rollouts.jsonl", b"\n".join(hostile("index", b"%d" % i) for i in range(len(values))))
    keys = {line.rollout.input_key for line in lines if line.rollout is not None}
    assert len(keys) == len(values) and None not in keys


@pytest.mark.parametrize("depth", [150, 970, 100_000])
def test_a_deep_sidecar_stops_nothing(tmp_path: Path, depth: int) -> None:
    asked = hostile("tools", nested(depth))[:-1] + b', "_ng_task_index": 0}'
    (tmp_path / "rollouts_materialized_inputs.jsonl").write_bytes(asked)
    assert [told(line) for line in read(tmp_path / "rollouts.jsonl", SOUND)] == ["ok"]


@pytest.mark.parametrize(
    ("written", "reward"),
    [(b"NaN", math.nan), (b"Infinity", math.inf), (b"-1e999", -math.inf), (LONG, math.inf), (b"-" + LONG, -math.inf)],
)
def test_rewards_that_are_no_number_are_kept_as_such(tmp_path: Path, written: bytes, reward: float) -> None:
    found = record(tmp_path / "rollouts.jsonl", hostile("reward", written))
    assert found.reward == pytest.approx(reward, nan_ok=True)


@pytest.mark.parametrize(
    ("number", "kept"),
    [(2**63 - 1, 2**63 - 1), (-(2**63), -(2**63)), (2**63, None), (-(2**63) - 1, None), (10**400, None)],
)
def test_integers_of_more_than_64_bits_are_no_index_and_no_count(tmp_path: Path, number: int, kept: int | None) -> None:
    written = str(number).encode()
    assert record(tmp_path / "rollouts.jsonl", hostile("index", written)).task_index == kept
    assert record(tmp_path / "rollouts.jsonl", hostile("tokens", written)).input_tokens == kept


@pytest.mark.parametrize("where", ["temperature", "top_p"])
def test_a_setting_beyond_any_double_is_infinite(tmp_path: Path, where: str) -> None:
    data = SOUND.replace(b'"temperature": 1.0', f'"{where}": {10**399}'.encode())
    assert getattr(record(tmp_path / "rollouts.jsonl", data).sampling, where) == math.inf


@pytest.mark.parametrize("number", [2**64, -(2**63) - 1, 10**400])
def test_integers_in_arguments_and_tools_keep_every_digit(tmp_path: Path, number: int) -> None:
    written = json.dumps({"a": number}).encode()
    called = record(tmp_path / "rollouts.jsonl", hostile("arguments", written)).completion[0].tool_calls[0]
    assert (called.arguments, called.arguments_json) == ({"a": number}, written.decode())
    declared = record(tmp_path / "rollouts.jsonl", hostile("tools", written)).tools[0]
    assert declared["function"]["parameters"] == {"a": number}


@pytest.mark.parametrize("lenient", [b"1", b"NaN"])
def test_of_a_key_that_stands_twice_the_last_counts(tmp_path: Path, lenient: bytes) -> None:
    """As with Python's own parser; the NaN sends the line to the lenient one, which must do the same."""
    head = b'{"odd": ' + lenient + b', "reward": "first", "response": null, '
    data = (
        head + hostile("note", b'{"a": 1, "a": 2}').replace(b'"role": "user"', b'"role": "critic", "role": "user"')[1:]
    )
    found = record(tmp_path / "rollouts.jsonl", data.replace(b'"content": "6', b'"content": "no", "content": "6'))
    assert (found.reward, found.prompt[0].role, found.prompt[0].content) == (0.5, "user", "6 x 7?")
    called = record(tmp_path / "rollouts.jsonl", hostile("arguments", b'{"a": 1, "a": 2}')).completion[0].tool_calls[0]
    assert (called.arguments, called.arguments_json) == ({"a": 2}, '{"a": 1, "a": 2}')


def test_a_surrogate_in_a_name_is_replaced(tmp_path: Path) -> None:
    assert record(tmp_path / "rollouts.jsonl", hostile("agent", SURROGATE)).agent == "?"


def test_details_are_sound_text(tmp_path: Path) -> None:
    orphan = hostile("call_id", SURROGATE).replace(b'"function_call"', b'"message"', 1)
    for line in read(tmp_path / "rollouts.jsonl", b'{"\\ud800": 1}\n' + orphan):
        assert line.verdict == "reject" and line.detail.encode()


def test_blank_lines_are_no_lines_but_count(tmp_path: Path) -> None:
    data = b"\n\n  \n\t\r\n\x0b\x0c\n" + SOUND + b"\r\n \r\n\r\r\n" + SOUND + b"\n\n"
    lines = read(tmp_path / "rollouts.jsonl", data)
    assert [(told(line), line.origin.line) for line in lines] == [("ok", 6), ("ok", 9)]
    assert {read_bytes(line.origin) for line in lines} == {SOUND}
    assert [read_at(line.origin) for line in lines] == lines


@pytest.mark.parametrize("end", [b"\n", b"\r\n", b"\r", b""])
def test_the_last_line_needs_no_line_break(tmp_path: Path, end: bytes) -> None:
    lines = read(tmp_path / "rollouts.jsonl", SOUND + b"\r\n" + SOUND + end)
    assert [(told(line), line.origin.offset) for line in lines] == [("ok", 0), ("ok", len(SOUND) + 2)]
    assert {(line.origin.length, line.origin.row_id) for line in lines} == {(len(SOUND), lines[0].origin.row_id)}


def test_a_line_separator_breaks_no_line_and_survives(tmp_path: Path) -> None:
    text = "a\u2028b\u2029c\x85d"
    written = json.dumps(text, ensure_ascii=False).encode()
    assert record(tmp_path / "rollouts.jsonl", hostile("content", written)).prompt[0].content == text


@pytest.mark.parametrize("mark", [0, 1])
def test_a_byte_order_mark_belongs_to_its_line(tmp_path: Path, mark: int) -> None:
    written = [SOUND, SOUND]
    written[mark] = b"\xef\xbb\xbf" + SOUND
    lines = read(tmp_path / "rollouts.jsonl", b"\n".join(written))
    assert [told(line) for line in lines] == ["ok", "ok"]
    assert [read_bytes(line.origin) for line in lines] == written


@pytest.mark.parametrize("end", [b"\n", b"\r\n", b""])
@pytest.mark.parametrize("length", [999, 1000, 1001, 1002, 1003, 3_000_000, (1 << 20) + 1002])
def test_a_line_above_the_limit_is_passed_over(tmp_path: Path, length: int, end: bytes) -> None:
    long = json.dumps(row("6 x 7?", "42", 1.0, note="")).encode()
    long = long.replace(b'"note": "', b'"note": "' + b"x" * (length - len(long)))
    data = SOUND + b"\n" + long + end
    lines = read(tmp_path / "rollouts.jsonl", data + (SOUND if end else b""), max_line_bytes=1000)
    expected = ["ok", "ok" if length <= 1000 else "reject:line_too_long", "ok"]
    assert [told(line) for line in lines] == (expected if end else expected[:2])
    assert read_bytes(lines[1].origin) == long
    assert not end or read_bytes(lines[2].origin) == SOUND


def test_a_long_line_with_carriage_returns_at_the_limit_is_one_line(tmp_path: Path) -> None:
    long = b"x" + b"\r" * 20 + b"y"
    lines = read(tmp_path / "rollouts.jsonl", long + b"\n" + SOUND, max_line_bytes=10)
    assert [(line.reason, line.origin.line) for line in lines] == [("line_too_long", 1), ("line_too_long", 2)]
    assert read_bytes(lines[0].origin) == long


@pytest.mark.parametrize("data", [b"", b"\n", b" \r\n\t\n", b"\r"])
def test_a_file_of_nothing_has_no_line(tmp_path: Path, data: bytes) -> None:
    assert read(tmp_path / "rollouts.jsonl", data) == []


def test_devices_and_folders_in_place_of_files(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="read twice"):
        list(read_lines([Path(os.devnull)]))
    (tmp_path / "a_rollouts.jsonl").mkdir()
    for given in (tmp_path, tmp_path / "a_rollouts.jsonl"):
        with pytest.raises(UserError, match="holds no"):
            list(read_lines([given]))
    (tmp_path / "b_rollouts.jsonl").write_bytes(SOUND)
    assert [told(line) for line in read_lines([tmp_path])] == ["ok"]


def test_a_file_that_grows_while_it_is_read(tmp_path: Path) -> None:
    path = tmp_path / "rollouts.jsonl"
    path.write_bytes((SOUND + b"\n") * 500)
    reading = read_lines([path])
    lines = [next(reading)]
    with path.open("ab") as stream:
        stream.write((SOUND + b"\n") * 500)
    lines += reading
    assert [line.origin.line for line in lines] == list(range(1, 1001))
    assert {told(line) for line in lines} == {"ok"}


def test_a_line_that_is_being_written_harms_no_other(tmp_path: Path) -> None:
    path = tmp_path / "rollouts.jsonl"
    path.write_bytes((SOUND + b"\n") * 3 + SOUND[:40])
    reading = read_lines([path])
    first = next(reading)
    with path.open("ab") as stream:
        stream.write(SOUND[40:] + b"\n" + SOUND + b"\n")
    lines = [first, *reading]
    assert [told(line) for line in lines[:3]] == ["ok"] * 3
    assert all(read_bytes(line.origin) for line in lines)
    assert sum(line.origin.length for line in lines) == 5 * len(SOUND)


@pytest.mark.parametrize("kept", [0, 1, 3])
def test_a_file_that_shrinks_while_it_is_read(tmp_path: Path, kept: int) -> None:
    path = tmp_path / "rollouts.jsonl"
    path.write_bytes((SOUND + b"\n") * 500)
    reading = read_lines([path])
    lines = [next(reading)]
    os.truncate(path, kept * (len(SOUND) + 1) + 10)
    lines += reading
    assert len(lines) >= kept
    assert [told(line) for line in lines[:kept]] == ["ok"] * kept
    assert {told(line) for line in lines[kept:]} <= {"ok", MALFORMED}
    with pytest.raises(UserError, match="has changed"):
        read_bytes(lines[kept].origin)  # held in the buffer before the file shrank


def test_a_file_that_vanishes_while_it_is_read(tmp_path: Path) -> None:
    path = tmp_path / "rollouts.jsonl"
    path.write_bytes((SOUND + b"\n") * 500)
    reading = read_lines([path])
    lines = [next(reading)]
    path.unlink()
    lines += reading
    assert [told(line) for line in lines] == ["ok"] * 500
    with pytest.raises(UserError, match="is gone"):
        read_at(lines[0].origin)


def test_a_later_file_that_vanishes_is_named(tmp_path: Path) -> None:
    first, second = tmp_path / "a.jsonl", tmp_path / "b.jsonl"
    first.write_bytes(SOUND)
    second.write_bytes(SOUND)
    reading = read_lines([first, second])
    next(reading)
    second.unlink()
    with pytest.raises(UserError, match=r"b\.jsonl"):
        list(reading)


READ_A_PIPE = """
import sys
from pathlib import Path
from gymtrl.errors import UserError
from gymtrl.rollouts import convert, tools
from gymtrl.rollouts.reader import read_lines
try:
    list(read_lines([Path(sys.argv[1])]))
except UserError:
    sys.exit(2)
"""


def test_a_named_pipe_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "rollouts.jsonl"
    os.mkfifo(path)
    run = subprocess.run([sys.executable, "-c", READ_A_PIPE, str(path)], timeout=3)
    assert run.returncode == 2
