"""The reading benchmark compares like with like: its baseline agrees with gymtrl, its corpus with what Gym ships."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from collections.abc import Iterable, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import polars as pl
import pytest
from corpus import build_corpus, corpus_lines, fill, source_lines, template
from hypothesis import given
from read import rounded
from read_baseline import Reject, baseline_table, chat_message, check_round_trip, parse_item, read_chat
from read_sides import KEYS, SELECTED, choose

from gymtrl.formats.chats import to_chat
from gymtrl.rollouts.reader import read_bytes, read_lines
from gymtrl.rollouts.table import rollout_table
from gymtrl.selection.filter import filter_rollouts
from gymtrl.selection.settings import FilterSettings
from rows import row
from test_fuzz import LOOKS, broken_rollouts, look_row, mutated, places, repeatable, rollouts
from test_hostile_lines import LINES, hostile, nested

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"

CHAT: list[dict[str, Any]] = [
    {"role": "user", "content": [{"type": "text", "text": "q"}, {"type": "image_url", "image_url": {"url": "data:,"}}]},
    {
        "role": "assistant",
        "reasoning_content": "r",
        "tool_calls": [
            {"id": "a", "type": "function", "function": {"name": "f", "arguments": '{"a": 1}'}},
            {"function": {"name": "f", "arguments": {"b": 2}}},
        ],
    },
    {"role": "tool", "content": "1", "tool_call_id": "a"},
    {"role": "tool", "content": None},
    {"role": "assistant", "content": "done"},
]
VALUES: list[Any] = [
    *(None, True, 0, -1, 2**70, 10**400, 0.5, float("nan"), float("inf"), [], {}, [[]], [{}], {"a": 1}, ["a"]),
    *("", "a", "\ud800", "user", "tool", "message", "reasoning", "function_call", "input_image", "refusal", "<think>"),
    *("{}", "[1]", '{"a": NaN}', '{"a": "\\ud800"}', {"role": "user"}, {"role": "assistant", "content": "x"}),
    *({"type": "reasoning"}, {"type": "function_call", "call_id": "q", "name": "n", "arguments": "{}"}),
]
KEYS_TO_ADD = """
    messages mean/a _ng_failure_class _ng_result_type _ng_rollout_index _ng_task_index _ng_environment_server type role
    content text metadata audio_url instructions input reward_components mask_sample image_url arguments call_id name
    summary output tools function generation_token_ids prompt_token_ids generation_log_probs usage input_tokens status
    tool_calls tool_call_id function_call audio refusal reasoning_content id incomplete_details agent_ref model
""".split()  # noqa: SIM905


def assert_agree(files: Sequence[Path]) -> None:
    ours, theirs = rollout_table(read_lines(files)), baseline_table(files)
    assert ours.schema == theirs.schema
    for column in set(ours.columns) - {*KEYS, "detail"}:
        differing = ours.filter(ours[column].ne_missing(theirs[column]))
        assert differing.is_empty(), f"{column}: {differing.select('file', 'line').rows()[:5]}"
    for column in KEYS:
        pairs = pl.DataFrame({"ours": ours[column], "theirs": theirs[column]}).unique()
        assert len(pairs) == pairs["ours"].n_unique() == pairs["theirs"].n_unique(), column
        assert ours[column].is_null().equals(theirs[column].is_null()), column


def test_the_baseline_agrees_on_every_shipped_line(gym_site_packages: Path) -> None:
    assert_agree(sorted(gym_site_packages.rglob("*rollout*.jsonl")))


def test_the_baseline_agrees_on_the_corpus(gym_site_packages: Path, tmp_path: Path) -> None:
    assert_agree([build_corpus(gym_site_packages, tmp_path / "corpus.jsonl", 5e6)])


def assert_agree_on(folder: Path, lines: Iterable[bytes]) -> None:
    path = folder / "rollouts.jsonl"
    path.write_bytes(b"\n".join(lines))
    assert_agree([path])


def test_the_baseline_agrees_on_hostile_lines(tmp_path: Path) -> None:
    assert_agree_on(tmp_path, [data for data, _ in LINES.values()])


def test_the_baseline_agrees_on_odd_chats(tmp_path: Path) -> None:
    ask, say, told = CHAT[0], CHAT[-1], {"role": "tool", "content": "1", "tool_call_id": "a"}
    call = {"id": "a", "type": "function", "function": {"name": "f", "arguments": "{}"}}
    called = {"role": "assistant", "tool_calls": [call]}
    made = {"role": "assistant", "tool_calls": [call | {"id": None}]}
    zero = {"role": "assistant", "tool_calls": [call | {"id": "call_0"}]}
    chats = [
        *([ask, called, told, called, told, say], [ask, called, called, told], [ask, called, told, told, say]),
        *([ask, made, {"role": "tool"}, zero, told | {"tool_call_id": "call_0"}], [ask, called, {"role": "tool"}, say]),
        *([ask, say | more] for more in ({"tool_calls": {}}, {"function_call": {}}, {"function_call": call})),
        *(
            [ask, say | more]
            for more in ({"audio": {"id": "a"}}, {"refusal": "No."}, {"content": [], "refusal": "No."})
        ),
    ]
    usages: list[Any] = [
        None,
        {"prompt_tokens": 9000, "completion_tokens": 1},
        {"prompt_tokens": 9000, "input_tokens": 1},
    ]
    rows = [{"messages": chat, "tools": [{"name": "f"}], "usage": usage} for chat in chats for usage in usages]
    assert_agree_on(tmp_path, [json.dumps(row).encode() for row in rows])


def test_the_baseline_agrees_on_what_both_looks_must_agree_on(tmp_path: Path) -> None:
    assert_agree_on(tmp_path, [look_row(item) for item in LOOKS.values()])


@pytest.mark.parametrize("depth", [90, 96, 97, 98, 99, 100, 101, 102])
def test_the_baseline_has_the_same_limits_of_depth(tmp_path: Path, depth: int) -> None:
    assert_agree_on(tmp_path, [hostile(place, nested(depth)) for place in ("note", "input", "tools", "arguments")])


@pytest.mark.parametrize("length", [999, 1000, 1001, 1002, 1003])
def test_the_baseline_has_the_same_limit_of_lines(tmp_path: Path, length: int) -> None:
    line = json.dumps(row("6 x 7?", "42", 1.0, note="")).encode()
    path = tmp_path / "rollouts.jsonl"
    line = line.replace(b'"note": "', b'"note": "' + b"x" * (length - len(line)))
    path.write_bytes(b"\r\n".join([line, line, b" " * length, line]))
    judged = ["line", "offset", "length", "row_id", "verdict", "reason"]
    ours, theirs = rollout_table(read_lines([path], max_line_bytes=1000)), baseline_table([path], max_line_bytes=1000)
    assert theirs.select(judged).equals(ours.select(judged))
    assert ("line_too_long" in ours["reason"]) == (length > 1000)


def test_the_baseline_agrees_on_shipped_rows_with_broken_bytes(gym_site_packages: Path, tmp_path: Path) -> None:
    rows, chance = small_lines(gym_site_packages), random.Random(11)
    assert_agree_on(tmp_path, [mutated(chance.choice(rows), chance) for _ in range(1000)])


def test_the_baseline_agrees_on_shipped_rows_of_odd_shape(gym_site_packages: Path, tmp_path: Path) -> None:
    chance = random.Random(12)
    rows = [text for text in small_lines(gym_site_packages) if text.startswith(b"{") and text.endswith(b"}")]
    rows += [json.dumps({"messages": CHAT, "tools": [{"name": "f"}], "reward": 1.0}).encode()] * 20
    made = []
    for _ in range(2000):
        made.append(json.loads(chance.choice(rows)))
        for _ in range(chance.choice((1, 1, 2, 4))):
            make_odd(made[-1], chance)
    assert_agree_on(tmp_path, [json.dumps(odd).encode() for odd in made])


def small_lines(folder: Path) -> list[bytes]:
    return [line for line in source_lines(folder) if len(line) < 30_000]


def make_odd(row: Any, chance: random.Random) -> None:
    """Replaces, wraps, drops, doubles or adds one thing somewhere in a row."""
    owner, key = chance.choice(list(places(row)) or [([None], 0)])
    action = chance.choice(("replace", "replace", "wrap", "drop", "double", "add"))
    if action == "replace":
        owner[key] = json.loads(json.dumps(chance.choice(VALUES)))
    elif action == "wrap":
        owner[key] = chance.choice(([owner[key]], {"text": owner[key]}, str(owner[key])))
    elif action == "drop":
        del owner[key]
    elif action == "double" and isinstance(owner, list):
        owner.append(json.loads(json.dumps(owner[key])))
    elif action == "add" and isinstance(owner, dict):
        owner[chance.choice(KEYS_TO_ADD)] = json.loads(json.dumps(chance.choice(VALUES)))


@repeatable
@given(row=rollouts() | broken_rollouts())
def test_the_baseline_agrees_on_generated_rows(tmp_path: Path, row: dict[str, Any]) -> None:
    assert_agree_on(tmp_path, [json.dumps(row).encode()])


def test_the_baseline_agrees_on_the_keys_of_odd_input_rows(tmp_path: Path) -> None:
    requests: list[Any] = [
        *({"input": "a"}, {"input": "a", "metadata": None}, {"input": "a", "metadata": {}}, {"input": "b"}),
        *({"input": "a", "metadata": "text"}, {"input": "a", "metadata": {"extra_body": "1"}}, {"input": "\ud800"}),
        *({"input": "a", "temperature": 1.0}, {"input": "a", "user": None}, None, "text", ["a"]),
    ]
    asked = [
        json.dumps({"responses_create_params": request, "_ng_task_index": at, "_ng_rollout_index": 0})
        for at, request in enumerate(requests)
    ]
    broken = ["[", "1", '{"_ng_task_index": true}', '{"_ng_task_index": 0, "_ng_rollout_index": "0"}', "", "\0"]
    (tmp_path / "rollouts_materialized_inputs.jsonl").write_text("\n".join([*broken, *asked]))
    rows = [json.dumps(row("q", "a", 1.0, index=at)).encode() for at in range(len(asked) + 1)]
    assert_agree_on(tmp_path, rows)
    found = baseline_table([tmp_path / "rollouts.jsonl"])["input_key"]
    assert found.null_count() == 1 and found.n_unique() > 5


@pytest.mark.parametrize(
    "message",
    [
        {"role": "user", "content": "b"},
        {"role": "system", "content": "a"},
        {"role": "user", "content": "a", "images": ["data:,"], "offsets": [0]},
        {"role": "tool", "content": "a", "tool_call_id": "c"},
        {"role": "assistant", "content": "a", "thoughts": [], "calls": []},
    ],
)
def test_the_baseline_proves_that_messages_give_the_items_back(message: dict[str, Any]) -> None:
    items = [parse_item({"role": "user", "content": "a"})]
    check_round_trip(items, [{"role": "user", "content": "a"}])
    with pytest.raises(Reject, match="roundtrip_mismatch"):
        check_round_trip(items, [message])


def test_the_corpus_keeps_the_verdict_of_every_line_and_makes_tasks_of_eight(
    gym_site_packages: Path, tmp_path: Path
) -> None:
    sources = source_lines(gym_site_packages)
    templates = [template(line) for line in sources]
    tables = {}
    for name, lines in {
        "source": sources,
        "first": [fill(line, 0, 0, index=number) for number, line in enumerate(templates)],
        "later": [fill(line, 12, 3, index=number) for number, line in enumerate(templates)],
        "same_task": [fill(line, 12, 4, index=number) for number, line in enumerate(templates)],
    }.items():
        path = tmp_path / f"{name}.jsonl"
        path.write_bytes(b"".join(line + b"\n" for line in lines))
        tables[name] = rollout_table(read_lines([path]))
    source, first, later, same_task = tables.values()
    judged = ["verdict", "reason", "reward", "turns", "tool_calls", "fault", "truncated", "masked"]
    assert source.select(judged).equals(first.select(judged))
    assert source.select(judged).equals(later.select(judged))
    rollouts = source["task_key"].is_not_null()
    assert later["task_key"].equals(same_task["task_key"])
    assert (later["task_key"] != first["task_key"]).filter(rollouts).all()
    assert (later["completion_key"] != same_task["completion_key"]).filter(rollouts).mean() > 0.95


def test_a_repetition_differs_from_its_source_in_the_markers_alone() -> None:
    source = (
        b'{"_ng_task_index": 4, "x": "\\u00e9",'
        b' "responses_create_params": {"input": [{"role": "user", "content": "a"}]},'
        b' "response": {"output": [{"type": "message", "role": "assistant",'
        b' "content": [{"type": "output_text", "text": "b"}]}]}}'
    )
    made = fill(template(source), 17, 3, index=99)
    unmarked = made.replace(b'"a [17]"', b'"a"').replace(b'"[17.3] b"', b'"b"').replace(b": 99,", b": 4,")
    assert unmarked == source != made
    assert template(b'{"broken": ') == b'{"broken": '


def test_the_corpus_is_the_same_every_time_and_repeats_every_line() -> None:
    sources = [json.dumps({"line": number}).encode() for number in range(20)]
    once, again = (list(islice(corpus_lines(sources), 60)) for _ in range(2))
    assert once == again
    passes = [once[start : start + 20] for start in (0, 20, 40)]
    assert all(sorted(lines) == sorted(sources) for lines in passes)
    assert passes[0] != passes[1]


def test_both_sides_select_the_same_rows(gym_site_packages: Path, tmp_path: Path) -> None:
    path = build_corpus(gym_site_packages, tmp_path / "corpus.jsonl", 8.6e7)  # whole tasks
    filter_rollouts([path], tmp_path / "out", FilterSettings(**SELECTED))
    table = pl.read_parquet(tmp_path / "out" / "table.parquet")
    kept = table.filter(pl.col("split") == "train")["line"].to_list()
    assert sorted(choose(baseline_table([path]))) == kept
    assert 0.09 < len(kept) / len(table) < 0.13


def test_both_sides_write_the_same_messages(gym_site_packages: Path) -> None:
    compared = 0
    for line in read_lines(sorted(gym_site_packages.rglob("*rollout*.jsonl"))):
        if line.rollout is not None:
            chat = read_chat(json.loads(read_bytes(line.origin)))
            assert to_chat(line.rollout.prompt) == [chat_message(message) for message in chat["prompt"]], line.origin
            assert to_chat(line.rollout.completion) == [chat_message(m) for m in chat["completion"]], line.origin
            compared += 1
    assert compared


@pytest.mark.slow
def test_the_quick_benchmark_writes_its_figures(gym_site_packages: Path, tmp_path: Path) -> None:
    command = [sys.executable, BENCHMARKS / "read.py", gym_site_packages, "--quick"]
    run = subprocess.run(
        [*command, "--work", tmp_path / "work", "--out", tmp_path / "read.json"], capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr
    written = (tmp_path / "read.json").read_text()
    assert str(tmp_path) not in written
    size = json.loads(written)["sizes"][0]
    assert set(size["table"]["compared"]) == {"ours_1", "ours_2"}
    for group in ("table", "selected"):
        for ratio in size[group]["compared"].values():
            assert ratio["same_result"] is True
            assert set(ratio) >= {"times_as_fast", "times_as_fast_after_imports", "cpu_share", "memory_share"}
        for side in size[group]["sides"].values():
            assert side["wall_s"] > side["work_s"] > 0 and side["cpu_s"] > side["work_cpu_s"] > 0
    assert size["selected"]["sides"]["baseline"]["rows"] > 0
    assert size["orientation"]["json"]["rows"] == size["table"]["sides"]["ours_1"]["rows"]


def test_figures_are_rounded_wherever_they_stand() -> None:
    assert rounded({"a": [0.12345, {"b": 2.0}], "c": 3}) == {"a": [0.123, {"b": 2.0}], "c": 3}
