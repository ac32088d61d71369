"""The page: what it says, and that nothing in a rollout can act in it."""

from __future__ import annotations

import base64
import hashlib
import io
import json
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import msgspec
import polars as pl
import pytest
from rich.console import Console

from gymtrl.errors import UserError
from gymtrl.reports.inspection_page import inspection_page, write_page
from gymtrl.reports.reading import watch_reading
from gymtrl.rollouts.examples import choose_examples
from gymtrl.rollouts.inspection import inspect_rollouts
from gymtrl.rollouts.reader import read_lines
from gymtrl.rollouts.record import Origin
from gymtrl.rollouts.summary import Bin, Component, Suspicion
from gymtrl.rollouts.table import SCHEMA, rollout_table
from pages import HOSTILE, Page
from rows import row, write_rows

SECTIONS = ["lines", "problems", "suspicions", "rewards", "tasks", "shape", "good-for", "rollouts"]
PIXEL = "data:image/png;base64,iVBORw0KGgo="


def page(path: Path, examples: int = 60) -> Page:
    return Page(html(path, examples))


def html(path: Path, examples: int = 60) -> str:
    table, out = path.with_suffix(".parquet"), path.with_suffix(".html")
    write_page(inspect_rollouts([path], table=table), table, out, examples=examples)
    return out.read_text()


def steps(reward: float, **more: Any) -> dict[str, Any]:
    """A rollout with a call."""
    made = row("What is the capital of France?", "", reward, **more)
    made["responses_create_params"] |= {
        "tools": [{"type": "function", "name": "look_up", "description": "Looks up.", "parameters": {"a": 1}}]
    }
    made["response"]["output"] = [
        {"type": "reasoning", "summary": [{"type": "summary_text", "text": "let me think"}]},
        {"type": "function_call", "call_id": "c1", "name": "look_up", "arguments": '{"query":"France"}'},
        {"type": "function_call_output", "call_id": "c1", "output": "it is Paris"},
        {"type": "message", "role": "assistant", "content": "Paris."},
    ]
    return made


@pytest.fixture
def mixed(tmp_path: Path) -> Path:
    """Four tasks of three: never, sometimes (twice), always; one masked, one context, two rejected."""
    rewards = [(0, 0, 0), (0, 1, 1), (1, 0, 0), (1, 1, 1)]
    rows = [
        row(f"question {i}", f"answer {i} {j}", float(reward), index=i, repeat=j)
        for i, of_task in enumerate(rewards)
        for j, reward in enumerate(of_task)
    ]
    undeclared = steps(1.0, index=8)
    del undeclared["responses_create_params"]["tools"]
    rows += [steps(1.0, index=7), undeclared, row("q", "a", 1.0, index=9, mask_sample=True), {"no": "rollout"}]
    path = write_rows(tmp_path / "rollouts.jsonl", rows)
    with path.open("a") as stream:
        stream.write('{"cut here')
    return path


def test_every_section_has_its_figures(mixed: Path) -> None:
    shown = page(mixed)
    assert list(shown.sections) == SECTIONS
    lines = shown.text("lines")
    assert "17 lines in 1 file" in lines
    assert all(words in lines for words in ("14 ok", "1 context", "2 reject", "0 skip"))
    problems = shown.text("problems")
    assert "1 × context: tools_undeclared" in problems and "1 × reject: malformed_json" in problems
    assert f"{mixed}:17" in problems and "run it again with --resume" in problems and "look_up" in problems
    assert "Mean 0.571 over 14 valid rewards, from 0 to 1, 2 distinct." in shown.text("rewards")
    assert "masked 1" in shown.text("rewards")
    tasks = shown.text("tasks")
    assert "tasks 7 clusters 7 groups 7" in tasks
    assert all(words in tasks for words in ("1 never", "2 sometimes", "3 always"))
    shape = shown.text("shape")
    assert "turns 15 1 1 2 2" in shape and "look_up 2" in shape and "input tokens 0 not recorded" in shape
    good = shown.text("good-for")
    assert all(words in good for words in ("7 rows for SFT", "2 pairs for DPO", "2 groups for GRPO"))
    assert "A reward of 1 or more is good: rewards are binary" in good
    assert "17 of 17 lines" in shown.text("rollouts")
    assert len(shown.rollouts()) == 17


def test_bars_are_as_long_as_their_share(mixed: Path) -> None:
    source = html(mixed)
    verdicts = re.findall(r'<span class="(ok|context|reject|skip)" style="width:([\d.]+)%" title="\d+ \1">', source)
    assert verdicts == [("ok", "82.35"), ("context", "5.88"), ("reject", "11.76")]
    rewards = re.search(r"Rollouts by reward</caption>(.*?)</table>", source, re.S)
    assert rewards and re.findall(r"width:([\d.]+)%", rewards[1]) == ["75.00", "100.00"]


def test_what_else_a_summary_holds(mixed: Path) -> None:
    found = inspect_rollouts([mixed])
    found = msgspec.structs.replace(
        found,
        suspicions=[Suspicion("always_lowest", 3, "all of <it>", ["a.jsonl:1", "a.jsonl:2"], "mend the verifier")],
        rewards=msgspec.structs.replace(found.rewards, components={"format<": Component(5, -1.5, 0.25, 2500.0)}),
        tasks=msgspec.structs.replace(found.tasks, asked=1200, missing=34, pass_rates=[Bin(0.0, 0.1, 3)]),
        histograms={"turns": [Bin(1, 1, 11)], "tool_calls": [Bin(0, 2, 12)], "output_tokens": [Bin(0, 12345.6, 13)]},
        world_failures={"timeout": 6},
    )
    shown = Page(inspection_page(found, [], title="t"))
    assert "3 × always lowest all of <it> mend the verifier a.jsonl:1, a.jsonl:2, …" in shown.text("suspicions")
    assert "format< 5 -1.5 0.25 2,500" in shown.text("rewards")
    tasks = shown.text("tasks")
    assert "rollouts asked for 1,200 of these missing 34" in tasks
    assert "Groups by pass rate 0 … 0.1 3" in tasks and "timeout 6" in tasks
    shape = shown.text("shape")
    assert "Rollouts by turns 1 11" in shape and "Rollouts by tool calls 0 … 2 12" in shape
    assert "Rollouts by output tokens 0 … 12,346 13" in shape
    assert "There is nothing to show." in shown.text("rollouts")


def test_a_rollout_step_by_step(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "rollouts.jsonl", [steps(1.0, reward_components={"form": 0.5})])
    shown = page(path)
    text = shown.text("rollouts")
    expected = [
        "rollouts.jsonl:1 reward 1 agent · 2 turns · 1 tool call What is the capital of France?",
        "1 declared tool: look_up look_up Looks up.",
        "user What is the capital of France?",
        "policy · turn 1 reasoning let me think look_up call c1",
        '{ "query": "France" }',
        "tool result · look_up it is Paris",
        "policy · turn 2 Paris.",
        "components form 0.5",
        "task index 0, repeat 0",
        "sampling temperature 1.0",
        "row id",
    ]
    places = [text.index(words) for words in expected]
    assert places == sorted(places)
    classes = [found["class"] for tag, found in shown.elements if found.get("class", "").startswith("message")]
    assert classes == ["message given", "message policy", "message given", "message policy"]


def test_long_given_text_is_folded_and_the_policys_answer_is_not(tmp_path: Path) -> None:
    made = steps(1.0)
    made["response"]["output"][2]["output"] = "result\n" * 100
    made["response"]["output"][3]["content"] = "answer\n" * 100
    source = html(write_rows(tmp_path / "rollouts.jsonl", [made]))
    assert source.count('<details class="long') == 1
    assert re.search(r'<details class="long "><summary>result result .*?<small>700 characters</small>', source)


def test_lines_that_are_no_rollouts_show_cause_remedy_and_the_raw_text(mixed: Path) -> None:
    shown = page(mixed)
    text = shown.text("rollouts")
    assert "reject: malformed_json" in text and '{"cut here' in text and '{"no": "rollout"}' in text
    assert text.count("run it again with --resume") == 1
    assert [found["data-verdict"] for found in shown.rollouts()].count("reject") == 2


def test_good_and_bad_are_told_apart(mixed: Path) -> None:
    found = [(rollout["data-verdict"], rollout["data-outcome"]) for rollout in page(mixed).rollouts()]
    assert found.count(("ok", "good")) == 7
    assert found.count(("ok", "bad")) == 6
    assert found.count(("ok", "")) == 1  # masked
    assert found.count(("context", "good")) == 1


def test_places_are_whole_and_nothing_unknown_is_zero(tmp_path: Path) -> None:
    agents = {"plain": [0.0, 1.0], "wide": [-5.0, 2.0, 7.0]}
    rows = [
        row(name, f"{i}", r, index=len(name), repeat=i, agent_ref={"name": name})
        for name, rewards in agents.items()
        for i, r in enumerate(rewards)
    ]
    path = write_rows(tmp_path / "wide-rollouts.jsonl", rows[2:])
    shown = page(path)
    assert f"{path}:1 " in shown.text("rollouts")
    good = shown.text("good-for")
    assert good.count("not known: pass --reward-threshold") == 2 and "1 groups for GRPO" in good
    shown = page(write_rows(path, rows))
    assert sorted(rollout["data-outcome"] for rollout in shown.rollouts()) == ["", "", "", "bad", "good"]
    assert "no rule for: wide (from -5 to 7)" in shown.text("good-for")
    assert "1 rows for SFT" in shown.text("good-for") and "Groups that reach the threshold" in shown.text("tasks")


@pytest.mark.parametrize("text", HOSTILE)
def test_hostile_text_stays_text_wherever_it_stands(tmp_path: Path, text: str) -> None:
    made = steps(1.0, agent_ref={"name": text}, reward_components={text: 1.0})
    function = {"type": "function", "name": text, "description": text, "parameters": {text: text}}
    made["responses_create_params"] |= {
        "instructions": text,
        "tools": [function],
        "input": [
            {
                "role": "user",
                "content": [
                    {"type": "input_text", "text": text},
                    {"type": "input_image", "image_url": text},
                    {"type": "input_image", "image_url": f"data:image/svg+xml,{text}"},
                    {"type": "input_image", "image_url": f"data:image/png;base64,AAAA{text}"},
                ],
            }
        ],
    }
    output = made["response"]["output"]
    made["response"]["model"] = text
    output[0]["summary"][0]["text"] = text
    output[1] |= {"name": text, "call_id": text, "arguments": json.dumps({text: [text]})}
    output[2] |= {"call_id": text, "output": text}
    output[3]["content"] = text
    folder = tmp_path / "".join(c for c in text if c not in "/\x00")
    path = write_rows(folder / "rollouts.jsonl", [made, {text: 1}])
    with path.open("a") as stream:
        stream.write("{" + text.replace("\x00", ""))
    (path.parent / "rollouts_failures.jsonl").write_text(json.dumps({"_ng_failure_class": text}))
    harmless = page(write_rows(tmp_path / "rollouts.jsonl", [steps(1.0), {"a": 1}, "x"]))
    source = html(path)
    shown = Page(source)
    assert shown.scripts == harmless.scripts
    known = {tag for tag, _ in harmless.elements} | {"article"}
    assert {tag for tag, _ in shown.elements} <= known
    for tag, found in shown.elements:
        assert not any(name.startswith("on") for name in found), (tag, found)
        assert found.get("src", "data:image/").startswith("data:image/")
        assert found.get("href", "#").startswith("#")
        assert set(found) <= {name for _, attributes in harmless.elements for name in attributes} | {"src", "alt"}
    assert not [character for character in source if not character.isprintable() and character != "\n"]
    if text.isprintable():
        assert text in shown.text("rollouts")
        assert shown.text("rollouts").count(text) >= 12
    assert "49" not in shown.text("shape")


def test_nothing_is_fetched(tmp_path: Path) -> None:
    made = row("", "a", 1.0)
    urls = [PIXEL, "https://example.com/a.png", "data:image/svg+xml;base64,AAAA", "file:///etc/passwd"]
    made["responses_create_params"]["input"] = [
        {"role": "user", "content": [{"type": "input_image", "image_url": url} for url in urls]}
    ]
    source = html(write_rows(tmp_path / "rollouts.jsonl", [made]))
    shown = Page(source)
    assert [found["src"] for tag, found in shown.elements if "src" in found] == [PIXEL]
    assert all(f"[image: {url}" in shown.text("rollouts") for url in (urls[1], urls[3], "data:image/svg+xml;base64"))
    assert (
        "url(" not in source
        and "@import" not in source
        and not {"link", "base", "iframe"} & {t for t, _ in shown.elements}
    )
    (policy,) = [found["content"] for tag, found in shown.elements if found.get("http-equiv")]
    (script,) = shown.scripts
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert "default-src 'none'" in policy and f"script-src 'sha256-{digest}'" in policy


def test_a_file_without_a_single_rollout_has_a_page_as_well(tmp_path: Path) -> None:
    path = tmp_path / "rollouts.jsonl"
    path.write_text("garbage\n")
    shown = page(path)
    assert list(shown.sections) == SECTIONS
    assert "No rollout has a valid reward." in shown.text("rewards")
    assert "No line could be read as a rollout." in shown.text("shape")
    path.write_text("")
    assert "0 lines" in page(path).text("lines")


def test_all_shipped_rollouts(gym_site_packages: Path, tmp_path: Path) -> None:
    files = sorted(gym_site_packages.rglob("*rollout*.jsonl"))
    table, out = tmp_path / "t.parquet", tmp_path / "page.html"
    summary = inspect_rollouts(files, table=table)
    write_page(summary, table, out, examples=10_000)
    assert 1_000_000 < out.stat().st_size < 10_000_000
    write_page(summary, table, out, examples=60)
    shown = Page(out.read_text())
    assert "695 lines in 139 files" in shown.text("lines")
    assert len(shown.rollouts()) == 60


def test_the_page_replaces_an_older_one_and_leaves_no_draft(mixed: Path, tmp_path: Path) -> None:
    assert html(mixed) == html(mixed)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["rollouts.html", "rollouts.jsonl", "rollouts.parquet"]


def test_a_file_that_has_changed_since_is_refused(mixed: Path, tmp_path: Path) -> None:
    summary = inspect_rollouts([mixed], table=tmp_path / "t.parquet")
    mixed.write_text(mixed.read_text().replace("answer", "ANSWER"))
    with pytest.raises(UserError, match="changed"):
        write_page(summary, tmp_path / "t.parquet", tmp_path / "page.html")
    assert not (tmp_path / "page.html").exists()


def chosen(path: Path, limit: int) -> list[Origin]:
    return choose_examples(rollout_table(read_lines([path])).lazy(), limit)


def test_examples_take_a_good_and_a_bad_rollout_of_each_task_first(mixed: Path) -> None:
    first = chosen(mixed, 10)
    lines = [origin.line for origin in first]
    assert len(first) == len(set(lines)) == 10
    tasks = [(line - 1) // 3 for line in lines if line <= 12]
    assert {1, 2} <= set(tasks)
    for task in (1, 2):
        good = {1: {5, 6}, 2: {7}}[task]
        of_task = {line for line, of in zip((n for n in lines if n <= 12), tasks, strict=True) if of == task}
        assert len(of_task) == 2 and len(of_task & good) == 1
    assert {13, 14, 15} <= set(lines)  # other outcomes and verdicts have their turn
    assert set(lines[-2:]) == {16, 17}
    assert chosen(mixed, 60) == chosen(mixed, 60)
    assert sorted(origin.line for origin in chosen(mixed, 60)) == list(range(1, 18))
    assert chosen(mixed, 0) == []


def test_rare_outcomes_are_among_the_examples(tmp_path: Path) -> None:
    rows = [row(f"q{i}", "a", float(i == 77), index=i) for i in range(200)]
    assert 78 in [origin.line for origin in chosen(write_rows(tmp_path / "r.jsonl", rows), 5)]


def test_examples_have_a_few_rejects_of_each_reason(tmp_path: Path) -> None:
    lines = ["{cut"] * 50 + ["[]"] * 50 + ['{"a": 1}'] * 2 + [json.dumps(row("q", f"{i}", 1.0)) for i in range(50)]
    path = tmp_path / "r.jsonl"
    path.write_text("".join(line + "\n" for line in lines))
    picked = [origin.line for origin in chosen(path, 30)]
    kinds = [sum(low < line <= high for line in picked) for low, high in ((0, 50), (50, 100), (100, 102), (102, 152))]
    assert kinds == [3, 3, 2, 22]


def test_examples_stay_within_their_bytes() -> None:
    columns = {name: [None] * 100 for name in SCHEMA} | {
        "file": ["f"] * 100,
        "line": list(range(1, 101)),
        "offset": [0] * 100,
        "length": [1_000_001 if i % 2 else 900_000 for i in range(100)],
        "row_id": [f"{i:016x}" for i in range(100)],
        "verdict": ["ok"] * 50 + ["reject"] * 50,
        "reason": [""] * 50 + [f"r{i}" for i in range(50)],
        "task_key": [f"t{i}" for i in range(50)] + [None] * 50,
        "reward": [1.0] * 50 + [None] * 50,
        "masked": [False] * 50 + [None] * 50,
    }
    picked = choose_examples(pl.DataFrame(columns, schema=SCHEMA).lazy(), 60)
    assert {origin.length for origin in picked} == {900_000}
    assert 5 <= len(picked) <= 8


def test_the_table_is_written_whole_and_read_again(mixed: Path, tmp_path: Path) -> None:
    table = tmp_path / "t.parquet"
    summary = inspect_rollouts([mixed], table=table)
    assert pl.read_parquet(table).height == 17
    assert inspect_rollouts([table]) == summary
    assert inspect_rollouts([table], table=tmp_path / "copy.parquet") == summary
    assert table.exists() and pl.read_parquet(tmp_path / "copy.parquet").height == 17
    assert not list(tmp_path.glob(".*"))


def test_a_cluster_is_in_table_and_page(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "r.jsonl", [row(f"q{i}", "a", 1.0, index=i, kind="same") for i in range(3)])
    table, out = tmp_path / "t.parquet", tmp_path / "p.html"
    summary = inspect_rollouts([path], cluster="kind", table=table)
    assert summary.tasks.clusters == 1
    write_page(summary, table, out, cluster="kind")
    (key,) = pl.read_parquet(table)["cluster_key"].unique()
    assert out.read_text().count(key) == 3
    with pytest.raises(UserError, match="no_such"):
        inspect_rollouts([path], cluster="no_such")


def test_the_bar_shows_late_and_on_terminals_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    big = tmp_path / "big"
    big.write_bytes(b"x" * 2_000_000)

    def shown(seconds: float, *, terminal: bool) -> str:
        out = io.StringIO()
        monkeypatch.setattr("gymtrl.reports.reading._PATIENCE", seconds)
        with watch_reading([big], Console(file=out, force_terminal=terminal, width=80)) as on_bytes:
            on_bytes(500_000)
            time.sleep(0.15)
            on_bytes(500_000)
            time.sleep(0.15)
        return out.getvalue()

    assert "1.0/2.0 MB" in shown(0.1, terminal=True)
    assert shown(60.0, terminal=True) == ""
    assert shown(0.1, terminal=False) == ""


def test_command_line(mixed: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "gymtrl", "inspect", str(mixed), "--html", "p.html", "--examples", "4", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["lines"] == 17
    assert done.stderr == "→ p.html\n"
    assert len(Page((tmp_path / "p.html").read_text()).rollouts()) == 4
    assert sorted(path.name for path in tmp_path.iterdir()) == ["p.html", "rollouts.jsonl"]
