"""The command line as its user meets it: help, speed, errors, exit status."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from typer.main import get_command

from gymtrl import __version__
from gymtrl.cli.main import app
from rows import row, write_rows

VERBS = [
    "inspect",
    "filter",
    "format sft",
    "format dpo",
    "format kto",
    "format grpo",
    "format reward",
    "train sft",
    "doctor",
    "serve",
    "validate",
    "compare",
    "power",
    "init",
    "run",
    "schema",
    "gym setup",
    "gym status",
    "model",
    "demo",
]
GYMTRL = [sys.executable, "-m", "gymtrl"]


def run(*arguments: str | Path, **more: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*GYMTRL, *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=120,
        **more,  # type: ignore[call-overload, no-any-return]
    )


@pytest.fixture
def rollouts(tmp_path: Path) -> Path:
    rows = [
        row(f"What is {i} + {i}?", f"<answer>{i + i + (r == 2)}</answer>", float(r != 2), index=i, repeat=r)
        for i in range(30)
        for r in range(3)
    ]
    return write_rows(tmp_path / "rollouts.jsonl", rows)


@pytest.mark.parametrize("verb", ["", *VERBS])
def test_help_loads_nothing_heavy(verb: str) -> None:
    code = (
        "import sys, gymtrl.cli.main as m\n"
        "try: m.app(sys.argv[1:])\n"
        "finally: print([n for n in ('torch', 'transformers', 'datasets', 'polars', 'scipy') if n in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code, *verb.split(), "--help"], capture_output=True, text=True)
    assert "Usage:" in done.stdout
    assert done.stdout.rstrip().endswith("[]"), done.stdout[-200:]


def test_the_version_needs_no_verb() -> None:
    done = run("--version")
    assert (done.returncode, done.stdout, done.stderr) == (0, f"{__version__}\n", "")


def test_every_option_is_explained() -> None:
    for verb in VERBS:
        command = get_command(app)
        for name in verb.split():
            command = command.commands[name]  # type: ignore[attr-defined]
        assert command.help
        for parameter in command.params:
            assert parameter.help, f"{verb}: {parameter.name}"  # type: ignore[attr-defined]


def test_dry_run_prints_value_and_origin(rollouts: Path, tmp_path: Path) -> None:
    recipe = tmp_path / "r.yaml"
    recipe.write_text("filter:\n  cap_per_task: 2\n")
    done = run("filter", rollouts, "--recipe", recipe, "--validation", "0.2", "--dry-run", "--json", cwd=tmp_path)
    shown = json.loads(done.stdout)["settings"]
    assert shown["cap_per_task"] == {"value": 2, "origin": f"recipe {recipe}:2"}
    assert shown["validation"] == {"value": 0.2, "origin": "flag --validation"}
    assert (
        "RFT" in json.loads(run("filter", rollouts, "--dry-run", "--json").stdout)["settings"]["cap_per_task"]["origin"]
    )
    assert not (tmp_path / "runs").exists()


def test_filter_default_folder_and_second_run(rollouts: Path, tmp_path: Path) -> None:
    first = run("filter", rollouts, cwd=tmp_path)
    assert first.returncode == 0, first.stderr
    (folder,) = (tmp_path / "runs").glob("*/filter")
    assert (folder / "train.jsonl").exists()
    second = run("filter", rollouts, cwd=tmp_path)
    assert "up to date" in second.stderr


def test_standard_input(rollouts: Path, tmp_path: Path) -> None:
    with rollouts.open() as stream:
        done = run("inspect", "-", "--json", stdin=stream, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert '"ok"' in done.stdout
    with rollouts.open() as stream:
        assert run("filter", "-", "-o", tmp_path / "f" / "filter", stdin=stream).returncode == 0


@pytest.mark.parametrize(
    ("content", "status", "message"),
    [
        (None, 2, "does not exist"),
        ("", 2, "no rows"),
        ("\x00garbage\nmore garbage\n", 2, "not JSONL"),
        ("rewards missing", 2, "reward_missing"),
        ("one task", 2, "--validation 0"),
    ],
)
def test_bad_rollouts(tmp_path: Path, content: str | None, status: int, message: str) -> None:
    path = tmp_path / "rollouts.jsonl"
    if content == "rewards missing":
        write_rows(path, [row(f"q{i}", "a", None, index=i) for i in range(3)])
    elif content == "one task":
        write_rows(path, [row("q", f"a{i}", 1.0, repeat=i) for i in range(3)])
    elif content is not None:
        path.write_text(content)
    done = run("filter", path, "-o", tmp_path / "out")
    assert done.returncode == status
    assert message in done.stderr
    assert "remedy: " in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        (["compare", "a.jsonl", "b.jsonl"], 2, "does not exist"),
        (["format", "sft", "nowhere", "--model", "m"], 2, "does not exist"),
        (["train", "sft", "nowhere"], 2, "nowhere"),
        (["serve", "nowhere"], 2, "is no folder"),
        (["validate", "nowhere", "--baseline", "x", "--tasks", "t"], 2, "does not exist"),
        (["filter", "x", "--cap-per-task", "0"], 2, "cap_per_task"),
        (["filter", "x", "--recipe", "none.yaml"], 2, "none.yaml"),
        (["filter", "x", "--set", "sed=1"], 2, "did you mean 'seed'"),
        (["gym", "setup", "--python", "/bin/false"], 2, "not a Python interpreter"),
        (["compare", "a", "b", "--fail-on", "better"], 2, "regression"),
        (["filter", "x", "--recipe", "."], 2, "directory"),
        (["inspect", "here.jsonl", "--table", "/nonexistent/t.parquet"], 2, "/nonexistent"),
    ],
)
def test_mistakes_get_a_message_and_a_remedy(tmp_path: Path, arguments: list[str], status: int, message: str) -> None:
    write_rows(tmp_path / "here.jsonl", [row("q", "a", 1.0)])
    done = run(*arguments, cwd=tmp_path, env=os.environ | {"GYMTRL_HOME": str(tmp_path / "home")})
    assert (done.returncode, "Traceback" in done.stderr) == (status, False), done.stderr
    assert message in done.stderr + done.stdout


def test_no_fitting_python_for_gym(tmp_path: Path) -> None:
    env = {"PATH": str(tmp_path), "HOME": str(tmp_path), "GYMTRL_HOME": str(tmp_path), "PYENV_ROOT": str(tmp_path)}
    done = run("gym", "setup", env=env | {"UV_PYTHON_INSTALL_DIR": str(tmp_path / "uv")})
    if "is ready" in done.stderr:
        pytest.skip("this machine has a fitting Python where uv always looks")
    assert done.returncode == 3
    assert "no Python that NeMo Gym runs on" in done.stderr
    assert "uv python install 3.12" in done.stderr


def test_interrupted_is_130_and_leaves_no_folder(tmp_path: Path) -> None:
    command = [*GYMTRL, "filter", "-", "-o", str(tmp_path / "out")]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    time.sleep(2.0)  # it now reads what nobody writes
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=20)
    assert process.returncode == 130
    assert "interrupted" in errors
    assert "Traceback" not in errors
    assert not (tmp_path / "out").exists()


def test_fail_on_sets_the_exit_status(tmp_path: Path) -> None:
    good = write_rows(tmp_path / "g.jsonl", [row(f"q{i}", "a", 1.0, index=i) for i in range(20)])
    bad = write_rows(tmp_path / "b.jsonl", [row(f"q{i}", "a", float(i == 3), index=i) for i in range(20)])
    assert run("compare", bad, good, "--fail-on", "regression").returncode == 0
    assert run("compare", good, bad, "--fail-on", "regression").returncode == 1
    assert run("compare", good, bad).returncode == 0
    shown = json.loads(run("compare", bad, good, "--json").stdout)
    assert shown["outcome"] == "improved"


def test_format_dpo_from_rollouts_to_a_page(tmp_path: Path, smollm2_dir: Path) -> None:
    rows = [
        row(f"{i} + 1 =", f"{i + 1 + wrong}", float(not wrong), index=i, repeat=wrong)
        for i in range(3)
        for wrong in (0, 1)
    ]
    source = write_rows(tmp_path / "rollouts.jsonl", [*rows, row("9 + 1 =", "10", 1.0, index=9)])
    out, page = tmp_path / "pairs", tmp_path / "pairs.html"
    command = ["format", "dpo", source, "--model", smollm2_dir, "-o", out, "--show", "1", "--html", page]
    done = run(*command, "--json")
    assert done.returncode == 0, done.stderr
    manifest = json.loads(done.stdout)
    assert manifest["verb"] == "format dpo" and manifest["extra"]["rows"] == {"train": 3, "validation": 0}
    assert manifest["counts"] == {"read": 7, "written": 6, "dropped": {"no_bad_rollout": 1}}
    assert "0 + 1 =" in done.stderr  # the row that is shown does not get into the JSON
    assert "0 + 1 =" in re.sub("<[^>]+>", "", page.read_text())
    again = run(*command[:-4])
    assert again.returncode == 0 and "is up to date" in again.stderr
    assert "All rollouts of the task are good" in again.stdout and "DPOTrainer(" in again.stdout


def test_a_reader_that_goes_away_is_no_failed_check(tmp_path: Path) -> None:
    chat = {"messages": [{"role": "user", "content": "1 + 1?"}, {"role": "assistant", "content": "2"}], "reward": 1.0}
    (tmp_path / "chats.jsonl").write_text(json.dumps(chat) + "\n")
    command = [sys.executable, "-m", "gymtrl", "inspect", str(tmp_path / "chats.jsonl")]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout is not None and process.stderr is not None
    process.stdout.close()
    assert (process.stderr.read(), process.wait(60)) == (b"", 0)
    process.stderr.close()
