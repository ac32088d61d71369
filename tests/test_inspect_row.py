"""One rollout on a terminal."""

from __future__ import annotations

import gzip
import io
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import msgspec
import pytest
from rich.console import Console

from gymtrl.cli.main import app
from gymtrl.errors import UserError
from gymtrl.reports.rollout import image_text, line_json, pretty_json, render_rollout
from gymtrl.rollouts.inspection import read_row
from gymtrl.rollouts.reader import read_lines
from gymtrl.rollouts.record import Line, Origin
from rows import row, write_rows


def agentic() -> dict[str, Any]:
    """Two turns with reasoning, a call, its result, and a user in between."""
    request = {
        "instructions": "Be brief.",
        "input": [
            {
                "role": "user",
                "content": [
                    {"type": "input_text", "text": "before"},
                    {"type": "input_image", "image_url": "https://example.com/cat.png"},
                    {"type": "input_text", "text": "after"},
                ],
            }
        ],
        "tools": [{"type": "function", "name": "look_up", "parameters": {"type": "object"}}],
        "temperature": 0.7,
    }
    output = [
        {"type": "reasoning", "summary": [{"type": "summary_text", "text": "think hard"}]},
        {"type": "function_call", "call_id": "c1", "name": "look_up", "arguments": '{"q":{"deep":1}}'},
        {"type": "function_call_output", "call_id": "c1", "output": "found [bold]it[/bold]"},
        {"type": "message", "role": "assistant", "content": "the answer"},
        {"type": "message", "role": "user", "content": "really?"},
        {"type": "message", "role": "assistant", "content": "yes"},
    ]
    made = row("", "", 0.25, index=3, repeat=1, reward_components={"format": 0.5})
    return made | {"responses_create_params": request, "response": {"output": output, "model": "m-8b"}}


def view(line: Line, width: int = 100) -> str:
    out = io.StringIO()
    render_rollout(line, Console(file=out, width=width, color_system=None))
    return out.getvalue()


def positions(text: str, *needles: str) -> list[int]:
    found = [text.index(needle) for needle in needles]
    assert found == sorted(found)
    return found


def test_a_conversation_in_order_with_the_policys_part_marked(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "rollouts.jsonl", [row("q", "a", 1.0), agentic()])
    shown = view(read_row(f"{path}:2"))
    positions(
        shown,
        f"{path}:2",
        "── system",
        "Be brief.",
        "── user",
        "before",
        "[image: https://example.com/cat.png]",
        "after",
        "── policy · turn 1 of 3",
        "▌ think hard",
        "▌ [call] look_up  c1",
        '▌     "deep": 1',
        "── tool result · look_up · c1",
        "\nfound [bold]it[/bold]",
        "── policy · turn 2 of 3",
        "▌ the answer",
        "── user · in the course of the rollout",
        "\nreally?",
        "── policy · turn 3 of 3",
        "▌ yes",
    )
    for name, value in {
        "verdict": "ok",
        "reward": "0.25",
        "components": "format 0.5",
        "agent": "agent",
        "model": "m-8b",
        "task": "index 3, repeat 1",
        "turns": "3",
        "tool calls": "1",
        "sampling": "temperature 0.7",
    }.items():
        assert re.search(rf"^{name}\s+{re.escape(value)}\s*$", shown, re.M), name
    assert all(text not in shown for text in ("truncated", "environment", "token ids"))


def test_long_lines_of_the_policy_stay_behind_the_bar(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "rollouts.jsonl", [row("q", "word " * 60, 1.0)])
    lines = [line for line in view(read_row(f"{path}:1"), width=40).splitlines() if "word" in line]
    assert len(lines) > 5
    assert all(line.startswith("▌ ") and len(line) <= 40 for line in lines)


def test_a_line_that_is_no_rollout_shows_what_to_do_and_the_raw_text(tmp_path: Path) -> None:
    path = tmp_path / "rollouts.jsonl"
    path.write_text('{"cut": "[red]\x1b[31m' + "x" * 5000)
    shown = view(read_row(f"{path}:1"))
    assert re.search(r"verdict\s+reject: malformed_json", shown)
    assert "run it again with --resume" in shown
    assert "[red]" in shown and "\x1b" not in shown
    assert 1900 < shown.count("x") < 2100 and "bytes in all" in shown


def test_context_has_its_remedy_and_the_conversation(tmp_path: Path) -> None:
    undeclared = agentic()
    del undeclared["responses_create_params"]["tools"]
    path = write_rows(tmp_path / "rollouts.jsonl", [undeclared])
    shown = view(read_row(f"{path}:1"))
    assert re.search(r"verdict\s+context: tools_undeclared", shown)
    assert "--keep-context" in shown.replace("\n", "") and "▌ the answer" in shown


def test_every_shipped_line_can_be_shown_and_is_what_reading_all_gives(gym_site_packages: Path) -> None:
    for line in read_lines(sorted(gym_site_packages.rglob("*rollout*.jsonl"))):
        assert read_row(str(line.origin)) == line
        shown = view(line)
        assert all(character.isprintable() or character == "\n" for character in shown)


def test_blank_lines_count(tmp_path: Path) -> None:
    path = tmp_path / "rollouts.jsonl"
    path.write_bytes(b"\n  \r\n" + json.dumps(row("q", "a", 1.0)).encode() + b"\r\n")
    (line,) = read_lines([path])
    assert line.origin.line == 3
    assert read_row(f"{path}:3") == line


@pytest.mark.parametrize(
    ("number", "message"),
    [
        ("3", "ends before"),
        ("99", "ends before"),
        ("2", "blank"),
        ("0", "not FILE:LINE"),
        ("x", "not FILE:LINE"),
        ("", "not FILE:LINE"),
    ],
)
def test_lines_that_cannot_be_shown(tmp_path: Path, number: str, message: str) -> None:
    path = tmp_path / "rollouts.jsonl"
    path.write_text(json.dumps(row("q", "a", 1.0)) + "\n \n")
    with pytest.raises(UserError, match=message) as caught:
        read_row(f"{path}:{number}")
    assert caught.value.remedy
    if message == "ends before":
        assert "2 lines" in caught.value.remedy


def test_files_that_cannot_be_shown(tmp_path: Path) -> None:
    (tmp_path / "empty.jsonl").touch()
    for place, message in (("empty.jsonl:1", "ends before"), ("none.jsonl:1", "does not exist"), (".:1", "folder")):
        with pytest.raises(UserError, match=message) as caught:
            read_row(str(tmp_path / place))
        assert caught.value.remedy


def test_a_line_beyond_all_bounds_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gymtrl.rollouts.inspection.MAX_LINE_BYTES", 100)
    path = tmp_path / "rollouts.jsonl"
    path.write_text("x" * 5000 + "\n" + "y" * 101 + "\n{}\n")
    for number in (1, 2):
        with pytest.raises(UserError, match="more than 100 bytes"):
            read_row(f"{path}:{number}")
    assert read_row(f"{path}:3").reason == "custom_record"


def test_json_holds_the_whole_record(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "rollouts.jsonl", [agentic()])
    line = read_row(f"{path}:1")
    assert msgspec.json.decode(line_json(line), type=Line) == line


def test_pretty_json_does_not_explode() -> None:
    deep: Any = list(range(1000))
    for _ in range(90):
        deep = [deep]
    assert pretty_json(deep).count("\n") == 0
    assert pretty_json({"a": [1]}) == '{\n  "a": [\n    1\n  ]\n}'


def test_images_stand_as_short_text() -> None:
    assert image_text("data:image/png;base64," + "A" * 5000) == "[image: data:image/png;base64, 5,000 characters]"
    assert len(image_text("https://example.com/" + "a" * 5000)) < 100


def test_command_line(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "rollouts.jsonl", [agentic()])

    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "gymtrl", "inspect", *arguments]
        return subprocess.run(command, capture_output=True, text=True, timeout=60)

    assert "▌ the answer" in run("--row", f"{path}:1").stdout
    assert json.loads(run("--row", f"{path}:1", "--json").stdout)["rollout"]["reward"] == 0.25
    for arguments in (["--row", f"{path}:2"], [str(path), "--row", f"{path}:1"], []):
        done = run(*arguments)
        assert done.returncode == 2
        assert "remedy: " in done.stderr and "Traceback" not in done.stderr


def test_a_line_of_a_packed_file_is_shown_under_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    packed = Path("rollouts.jsonl.gz")
    packed.write_bytes(gzip.compress(json.dumps(agentic()).encode() + b"\n[1, 2]\n"))
    shown = {number: _shown(f"{packed}:{number}", capsys) for number in (1, 2)}
    assert "▌ the answer" in shown[1] and "not_object" in shown[2] and "\n[1, 2]\n" in shown[2]
    assert all(f"── {packed}:{number} ──" in text for number, text in shown.items())
    assert json.loads(_shown(f"{packed}:1", capsys, "--json"))["origin"]["file"] == str(packed)
    with pytest.raises(UserError, match=rf"^{packed}:3 does not exist"):
        _shown(f"{packed}:3", capsys)
    assert list(tmp_path.iterdir()) == [tmp_path / packed]


def _shown(place: str, capsys: pytest.CaptureFixture[str], *more: str) -> str:
    app(["inspect", "--row", place, *more], standalone_mode=False)
    return capsys.readouterr().out


def test_a_pattern_for_several_files_names_no_line(tmp_path: Path) -> None:
    for name in "ab":
        write_rows(tmp_path / f"{name}.jsonl", [agentic()])
    assert read_row(f"{tmp_path}/a*.jsonl:1").origin.file == str(tmp_path / "a.jsonl")
    with pytest.raises(UserError, match="stands for 2 files"):
        read_row(f"{tmp_path}/*.jsonl:1")


def test_the_place_is_shown_as_given() -> None:
    line = Line(Origin("no/such", 7, 0, 0, "0"), "reject", "line_too_long", "long")
    with pytest.raises(UserError, match="gone"):
        view(line)
