"""The reading benchmark compares like with like: its baseline agrees with gymtrl, its corpus with what Gym ships."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from itertools import islice
from pathlib import Path

import polars as pl
import pytest
from corpus import build_corpus, corpus_lines, fill, source_lines, template
from read import rounded
from read_baseline import baseline_table, chat_message, read_chat
from read_sides import KEYS, SELECTED, choose

from gymtrl.formats.templates import to_chat
from gymtrl.rollouts.reader import read_bytes, read_lines
from gymtrl.rollouts.table import rollout_table
from gymtrl.selection.filter import filter_rollouts
from gymtrl.selection.settings import FilterSettings

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"


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
    path = build_corpus(gym_site_packages, tmp_path / "corpus.jsonl", 5e7)
    filter_rollouts([path], tmp_path / "out", FilterSettings(**SELECTED))
    table = pl.read_parquet(tmp_path / "out" / "table.parquet")
    kept = table.filter(pl.col("split") == "train")["line"].to_list()
    assert sorted(choose(baseline_table([path]))) == kept
    assert 0.05 < len(kept) / len(table) < 0.25


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
    ours = size["table"]["compared"]["ours_1"]
    assert ours["same_result"] is True
    assert set(ours) >= {"times_as_fast", "cpu_share", "memory_share"}
    assert size["selected"]["sides"]["baseline"]["rows"] > 0
    assert size["orientation"]["json"]["rows"] == size["table"]["sides"]["ours_1"]["rows"]


def test_figures_are_rounded_wherever_they_stand() -> None:
    assert rounded({"a": [0.12345, {"b": 2.0}], "c": 3}) == {"a": [0.123, {"b": 2.0}], "c": 3}
