"""Nothing that we start outlives us."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
import uuid
from pathlib import Path

import psutil
import pytest

from gymtrl.processes import KEY_VARIABLE, Supervised

# A child, a grandchild in a session of its own whose parent has gone, and one that ignores the polite signal.
TREE = "(setsid sleep 300 &); (sleep 301 &); trap '' INT; sleep 302"


def tagged(tag: str) -> list[psutil.Process]:
    found = []
    for process in psutil.process_iter():
        try:
            if process.environ().get("TEST_TAG") == tag and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
        except psutil.Error:
            continue
    return found


def wait_for(count: int, tag: str, seconds: float = 10) -> int:
    end = time.monotonic() + seconds
    while len(tagged(tag)) != count and time.monotonic() < end:
        time.sleep(0.1)
    return len(tagged(tag))


def test_stop_ends_the_whole_tree(tmp_path: Path) -> None:
    tag = uuid.uuid4().hex
    env = os.environ | {"TEST_TAG": tag}
    with Supervised(["bash", "-c", TREE], log=tmp_path / "log", env=env, grace=1):
        assert wait_for(5, tag) >= 4
    assert tagged(tag) == []


@pytest.mark.parametrize("victim", ["us", "supervisor"])
def test_kill_9_leaves_nothing(tmp_path: Path, victim: str) -> None:
    tag = uuid.uuid4().hex
    code = (
        "import sys, time; from pathlib import Path; from gymtrl.processes import KEY_VARIABLE, Supervised\n"
        "with Supervised(['sleep', '300'], log=Path(sys.argv[1]), grace=1): time.sleep(300)"
    )
    parent = subprocess.Popen([sys.executable, "-c", code, str(tmp_path / "log")], env=os.environ | {"TEST_TAG": tag})
    assert wait_for(3, tag) == 3
    if victim == "us":
        parent.kill()
    else:
        next(p for p in tagged(tag) if "processes.py" in " ".join(p.cmdline())).kill()
        parent.send_signal(signal.SIGINT)
    parent.wait()
    assert wait_for(0, tag) == 0


def test_exit_status_and_log(tmp_path: Path) -> None:
    with Supervised(["bash", "-c", "echo hello; exit 7"], log=tmp_path / "log") as process:
        while process.exit_code() is None:
            time.sleep(0.05)
        assert process.exit_code() == 7
    assert process.tail() == "hello"


def test_what_we_start_never_gets_the_key_of_an_endpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(KEY_VARIABLE, "sk-secret")
    monkeypatch.setenv("TEST_TAG", "passed on")
    for name, env in (("ours", None), ("given", dict(os.environ))):
        log = tmp_path / name
        with Supervised(["env"], log=log, env=env) as process:
            while process.exit_code() is None:
                time.sleep(0.05)
        assert "TEST_TAG=passed on" in log.read_text() and "sk-secret" not in log.read_text()
