"""The whole job for real: every stage on the real Gym and the real model, killed on the way, and in Python."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from gymtrl.demo.tasks import make_tasks
from gymtrl.gym.install import GymInstallation

TASKS = 40
DEMO = (
    "import sys; from pathlib import Path; from gymtrl.demo.run import run_demo\n"
    f"run_demo(Path(sys.argv[1]), limit={TASKS})"
)


def start(out: Path, tag: str, log: Path) -> subprocess.Popen[bytes]:
    with log.open("ab") as stream:
        env = os.environ | {"TEST_TAG": tag}
        return subprocess.Popen([sys.executable, "-c", DEMO, str(out)], stdout=stream, stderr=stream, env=env)


def running(tag: str) -> list[str]:
    found = []
    for process in psutil.process_iter():
        try:
            if process.environ().get("TEST_TAG") == tag and process.status() != psutil.STATUS_ZOMBIE:
                found.append(" ".join(process.cmdline())[:100])
        except psutil.Error:
            continue
    return found


def wait(until: Callable[[], bool], seconds: float, process: subprocess.Popen[bytes] | None = None) -> bool:
    end = time.monotonic() + seconds
    while not until() and time.monotonic() < end:
        if process is not None and process.poll() is not None:
            return until()
        time.sleep(0.1)
    return until()


def lines(path: Path) -> int:
    return path.read_bytes().count(b"\n") if path.exists() else 0


@pytest.mark.long
def test_killed_on_the_way_the_job_ends_with_the_same_counts(
    gym_installation: GymInstallation, smollm2_dir: Path, tmp_path: Path
) -> None:
    out, log = tmp_path / "demo", tmp_path / "log"
    moments: list[tuple[signal.Signals, Callable[[], bool]]] = [
        (signal.SIGKILL, lambda: 5 < lines(out / ".collected.partial" / "rollouts.jsonl") < 2 * TASKS),
        (signal.SIGKILL, lambda: any((out / ".trained.partial" / "checkpoints").glob("checkpoint-*"))),
        (signal.SIGKILL, lambda: lines(out / ".validation.partial" / "before" / "rollouts.jsonl") > 0),
        (signal.SIGINT, lambda: lines(out / ".validation.partial" / "after" / "rollouts.jsonl") > 0),
    ]
    for number, moment in moments:
        tag = uuid.uuid4().hex
        process = start(out, tag, log)
        assert wait(moment, 240, process), log.read_text()[-3000:]
        process.send_signal(number)
        process.wait(60)
        assert wait(lambda tag=tag: not running(tag), 60), running(tag)
    tag = uuid.uuid4().hex
    process = start(out, tag, log)
    assert process.wait(300) == 0, log.read_text()[-3000:]
    assert running(tag) == []

    rollouts = [json.loads(line) for line in (out / "collected" / "rollouts.jsonl").read_text().splitlines()]
    assert len({(r["_ng_task_index"], r["_ng_rollout_index"]) for r in rollouts}) == len(rollouts) == 2 * TASKS
    held_out = lines(out / "filtered" / "heldout_inputs.jsonl")
    for side in ("before", "after"):
        assert lines(out / "validation" / side / "rollouts.jsonl") == 2 * held_out
    assert not list(out.glob(".*"))

    # Nothing that is held out, nor its twin, was trained on.
    asked = {json.loads(line)["metadata"]["twin"] for line in (out / "filtered" / "heldout_inputs.jsonl").open()}
    inputs = out / "collected" / "rollouts_materialized_inputs.jsonl"
    twins = {
        (r["_ng_task_index"], r["_ng_rollout_index"]): r["metadata"]["twin"] for r in map(json.loads, inputs.open())
    }
    trained = [json.loads(line) for line in (out / "filtered" / "train.jsonl").open()]
    assert trained and asked
    assert not asked & {twins[(r["_ng_task_index"], r["_ng_rollout_index"])] for r in trained}

    last = tmp_path / "last"
    again = start(out, uuid.uuid4().hex, last)
    assert again.wait(60) == 0
    assert last.read_text().count("up to date") == 5


@pytest.mark.long
def test_the_job_in_python(gym_installation: GymInstallation, smollm2_dir: Path, tmp_path: Path) -> None:
    tasks = tmp_path / "tasks.jsonl"
    rows = make_tasks(Path(gym_installation.python))[40 : 40 + TASKS]
    tasks.write_text("".join(json.dumps(row) + "\n" for row in rows))
    script = Path(__file__).parent.parent / "examples" / "job.py"
    code = [line for line in script.read_text().split('"""')[2].splitlines() if line.strip()]
    assert len(code) <= 25
    done = subprocess.run(
        [sys.executable, str(script), str(smollm2_dir), str(tasks), str(tmp_path / "out")],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert re.search(r"^(Improved by|Regressed by|Not shown:) .* points \[", done.stdout, re.MULTILINE), done.stdout
    assert (tmp_path / "out" / "trained" / "model" / "config.json").exists()
