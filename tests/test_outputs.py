"""Outputs never take the place of what they are made from."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from gymtrl.errors import UserError
from gymtrl.reports.inspection_page import write_page
from gymtrl.rollouts.inspection import inspect_rollouts
from gymtrl.rollouts.outputs import check_output
from rows import row, write_rows


@pytest.fixture
def rollouts(tmp_path: Path) -> Path:
    return write_rows(tmp_path / "my-rollouts.jsonl", [row("q", "a", 1.0)])


def test_a_new_file_and_a_regular_one_may_be_written(rollouts: Path, tmp_path: Path) -> None:
    check_output(tmp_path / "page.html", [rollouts, tmp_path, Path("-")])
    (tmp_path / "page.html").write_text("old")
    check_output(tmp_path / "page.html", [rollouts, tmp_path, Path("-"), tmp_path / "missing.jsonl"])


@pytest.mark.parametrize("name", ["my-rollouts.jsonl", "link", "hard", "folder/../my-rollouts.jsonl"])
def test_an_input_is_no_output_however_it_is_named(rollouts: Path, tmp_path: Path, name: str) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "link").symlink_to(rollouts)
    os.link(rollouts, tmp_path / "hard")
    for inputs in ([rollouts], [tmp_path]):
        with pytest.raises(UserError, match="input"):
            check_output(tmp_path / name, inputs)


@pytest.mark.parametrize(
    "name", ["x_failures.jsonl", "x_materialized_inputs.jsonl", "x_reward_profiling.jsonl", "x_failures.jsonl.gz"]
)
@pytest.mark.parametrize("given", ["x.jsonl", "x.jsonl.zst"])
def test_what_lies_beside_an_input_is_none_either(tmp_path: Path, name: str, given: str) -> None:
    (tmp_path / given).write_bytes(b"x")
    with pytest.raises(UserError, match="belongs to the input"):
        check_output(tmp_path / name, [tmp_path / given])
    (tmp_path / name).write_bytes(b"x")
    with pytest.raises(UserError, match="belongs to the input"):
        check_output(tmp_path / name, [tmp_path / given])


def test_a_table_and_what_it_was_made_from_are_kept(rollouts: Path, tmp_path: Path) -> None:
    table = tmp_path / "t.parquet"
    inspect_rollouts([rollouts], table=table)
    for output in (table, rollouts, tmp_path / "my-rollouts_failures.jsonl"):
        with pytest.raises(UserError, match="would be overwritten"):
            check_output(output, [table])


def test_what_is_no_file_cannot_be_written(rollouts: Path, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "to-pipe").symlink_to("pipe")
    for name, words in [
        (".", "is a folder"),
        ("no/page.html", "no is no folder"),
        ("my-rollouts.jsonl/page.html", "is no folder"),
        ("pipe", "no regular file"),
        ("to-pipe", "no regular file"),
    ]:
        with pytest.raises(UserError, match=words):
            check_output(tmp_path / name, [rollouts])


def test_functions_leave_their_inputs_alone(rollouts: Path, tmp_path: Path) -> None:
    before, table = rollouts.read_bytes(), tmp_path / "t.parquet"
    with pytest.raises(UserError, match="input"):
        inspect_rollouts([rollouts], table=rollouts)
    summary = inspect_rollouts([rollouts], table=table)
    for page in (rollouts, table, tmp_path):
        with pytest.raises(UserError):
            write_page(summary, table, page)
    assert rollouts.read_bytes() == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["my-rollouts.jsonl", "t.parquet"]


@pytest.mark.parametrize(
    "options",
    [
        ["--html", "my-rollouts.jsonl"],
        ["--table", "my-rollouts.jsonl"],
        ["--html", "."],
        ["--html", "no/page.html"],
        ["--table", "no/t.parquet"],
        ["--html", "same", "--table", "same"],
    ],
)
def test_the_command_refuses_before_it_reads(tmp_path: Path, options: list[str]) -> None:
    path = tmp_path / "my-rollouts.jsonl"
    path.write_text("garbage\n")
    command = [sys.executable, "-m", "gymtrl", "inspect", path.name, *options]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, cwd=tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    assert "Traceback" not in done.stderr and options[1] in done.stderr.replace("\n", "")
    assert path.read_text() == "garbage\n"
    assert [p.name for p in tmp_path.iterdir()] == [path.name]
