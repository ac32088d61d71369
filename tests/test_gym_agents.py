"""Asking agents for rollouts: failures are asked again, kept apart with their reasons, and never count as rollouts."""

from __future__ import annotations

import json
import resource
import signal
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from gymtrl.errors import RunError, UserError
from gymtrl.gym.agents import ask_agents
from gymtrl.gym.collect import collect, finished, materialize
from gymtrl.gym.servers import GymDied, RunningGym, ServerInstance, free_port
from gymtrl.gym.settings import CollectSettings

SETTINGS = CollectSettings(repeats=1, attempts=2, timeout=1.5, concurrency=8)


class Agent(BaseHTTPRequestHandler):
    """An agent whose tasks say how often it fails, and how."""

    asked: Counter[str]

    def do_POST(self) -> None:
        """Answers `/run`."""
        row = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        name, fails, how = row["name"], row["fails"], row["how"]
        self.asked[name] += 1
        if self.asked[name] > fails:
            self.answer(200, json.dumps({"response": {}, "reward": 1.0, "_ng_failure_class": None}))
        elif how == "hangs":
            time.sleep(3)
        elif how == "is to be forgotten":
            self.answer(200, json.dumps({"_ng_no_persist": True, "_ng_failure_class": None, "reward": 0.0}))
        elif how == "says so":
            self.answer(200, json.dumps({"_ng_failure_class": "sandbox_died", "reward": 0.0}))
        elif how == "nonsense":
            self.answer(200, "[1, 2]")
        else:
            self.answer(500, "the sandbox is gone")

    def answer(self, status: int, body: str) -> None:
        """Sends an answer."""
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body.encode())

    def log_message(self, format: str, *arguments: Any) -> None:
        """Says nothing."""


@contextmanager
def agent() -> Iterator[tuple[RunningGym, Counter[str]]]:
    asked: Counter[str] = Counter()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Counted", (Agent,), {"asked": asked}))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield gym_at(server.server_address[1]), asked
    finally:
        server.shutdown()
        server.server_close()


def gym_at(port: int) -> RunningGym:
    return RunningGym("head", (ServerInstance("mine", "responses_api_agents", f"http://127.0.0.1:{port}"),))


def task(name: str, fails: int = 0, how: str = "500") -> dict[str, Any]:
    asked = {"input": name}
    return {"responses_create_params": asked, "agent_ref": {"name": "mine"}, "name": name, "fails": fails, "how": how}


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_failures_are_asked_again_and_never_scored(tmp_path: Path) -> None:
    out = tmp_path / "rollouts.jsonl"
    kinds = ("500", "hangs", "says so", "nonsense", "is to be forgotten")
    tasks = [task("well"), *(task(f"once {k}", 1, k) for k in kinds), *(task(f"always {k}", 3, k) for k in kinds)]
    with agent() as (gym, asked):
        first = collect(lambda: gym, tasks, out, SETTINGS)
        assert (first.wanted, first.collected, first.failed) == (11, 6, 5)
        assert sorted(row["_ng_task_index"] for row in read(out)) == [0, 1, 2, 3, 4, 5]
        assert all(row["reward"] == 1.0 for row in read(out))
        assert asked == {"well": 1} | {f"{often} {k}": 2 for often in ("once", "always") for k in kinds}
        failed = Counter(row["_ng_task_index"] for row in read(tmp_path / "rollouts_failures.jsonl"))
        assert failed == dict.fromkeys(range(1, 6), 1) | dict.fromkeys(range(6, 11), 2)
        reasons = {row["_ng_failure_class"] for row in read(tmp_path / "rollouts_failures.jsonl")}
        assert reasons == {"http_500", "ReadTimeout", "sandbox_died", "not_an_object", None}

        # The next run asks for what is missing alone: by now the world is mended.
        assert finished(tasks, out, SETTINGS) is None
        again = collect(lambda: gym, tasks, out, SETTINGS)
        assert (again.collected, again.failed) == (11, 0)
        assert sorted(row["_ng_task_index"] for row in read(out)) == list(range(11))
        assert asked["well"] == 1 and asked["always 500"] == 4


def test_what_fails_because_gym_died_is_asked_of_the_next_one(tmp_path: Path) -> None:
    out = tmp_path / "rollouts.jsonl"
    (tmp_path / "server.log").write_text("killed\n")
    with agent() as (gym, asked):

        def died() -> None:
            if asked["well"]:
                raise GymDied("my_server of Gym ended", tmp_path / "server.log")

        gyms = iter([RunningGym(gym.head, gym.servers, died), gym])
        collection = collect(lambda: next(gyms), [task("well"), task("twice", 2)], out, SETTINGS)
    # The attempt that was lost with the first Gym does not count against the rollout.
    assert asked == {"well": 1, "twice": 3}
    assert (collection.collected, collection.failed) == (2, 0)


def test_an_agent_that_is_gone_ends_the_collection(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="agent 'mine' does not answer"):
        collect(lambda: gym_at(free_port()), [task("well")], tmp_path / "rollouts.jsonl", SETTINGS)


@contextmanager
def files_up_to(size: int) -> Iterator[None]:
    """No file grows beyond `size` bytes, as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, handler)


def test_a_full_disk_loses_what_it_had_no_place_for_and_no_more(tmp_path: Path) -> None:
    out, tasks = tmp_path / "rollouts.jsonl", [task("first"), task("second"), task("third")]
    rows = materialize(tasks, SETTINGS)
    with agent() as (gym, asked):
        assert collect(lambda: gym, tasks, out, SETTINGS).collected == 3
        lines = out.read_bytes().splitlines(keepends=True)
        out.write_bytes(lines[0])
        with files_up_to(len(lines[0]) + 10):
            # Not in silence, although the first ten bytes of the next one fit.
            with pytest.raises(OSError, match="too large"):
                urls = {"mine": gym.agent_url("mine")}
                failures = tmp_path / "rollouts_failures.jsonl"
                ask_agents(urls, rows[1:2], out, failures, SETTINGS, watch=lambda: None, report=lambda done: None)
            assert out.stat().st_size == len(lines[0]) + 10
        with files_up_to(0):
            # Neither the inputs nor the rollouts are written anew to find out what is there.
            assert finished(tasks, out, SETTINGS) is None
            assert out.read_bytes() == lines[0]
        assert collect(lambda: gym, tasks, out, SETTINGS).collected == 3
        assert asked["first"] == 1


def test_a_damaged_line_is_named(tmp_path: Path) -> None:
    out, tasks = tmp_path / "rollouts.jsonl", [task("first"), task("second")]
    with agent() as (gym, _):
        collect(lambda: gym, tasks, out, SETTINGS)
    first, second = out.read_bytes().splitlines(keepends=True)
    for damaged in (b"\0" * 20 + b"\n", first[:20] + second, b"{}\n", b"[]\n"):
        out.write_bytes(first + damaged)
        with pytest.raises(UserError, match=r"rollouts\.jsonl:2: not a rollout") as caught:
            finished(tasks, out, SETTINGS)
        assert "remove the line" in str(caught.value.remedy)
