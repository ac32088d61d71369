"""A validation from outside: an agent and an endpoint that answer over HTTP, interrupted and gone on with."""

from __future__ import annotations

import json
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from gymtrl.errors import UserError
from gymtrl.gym.servers import free_port
from gymtrl.serving.hosted import Hosted
from gymtrl.validation.session import gym_session, served_by
from gymtrl.validation.settings import ValidateSettings
from gymtrl.validation.validate import validate
from gymtrl.workspace.artefact import read_manifest
from rows import row, write_rows

TASKS = [
    {"responses_create_params": {"input": [{"role": "user", "content": f"Task {n}"}]}, "agent_ref": {"name": "mine"}}
    for n in range(6)
]


class World(BaseHTTPRequestHandler):
    """A head server, an agent that scores without asking its policy, and an endpoint, all at one address."""

    asked: Counter[str]
    url: str

    def do_GET(self) -> None:
        """Lists the servers."""
        listed = [{"process_name": "mine", "server_type": "responses_api_agents", "url": self.url}]
        self.answer(listed if self.path == "/server_instances" else {})

    def do_POST(self) -> None:
        """Answers `/run`, and everything else as an endpoint does."""
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if self.path != "/run":
            message = {"role": "assistant", "content": "Hello."}
            return self.answer({"choices": [{"index": 0, "message": message, "finish_reason": "stop"}]})
        question = body["responses_create_params"]["input"][0]["content"]
        self.asked[question] += 1
        time.sleep(0.4)  # the collection is looked at twice a second
        return self.answer(row(question, "Well.", 1.0) | {"responses_create_params": body["responses_create_params"]})

    def answer(self, body: Any) -> None:
        """Sends an answer."""
        content = json.dumps(body).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, format: str, *arguments: Any) -> None:
        """Says nothing."""


@contextmanager
def world() -> Iterator[tuple[str, Counter[str]]]:
    asked: Counter[str] = Counter()
    handler = type("Counted", (World,), {"asked": asked})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    handler.url = f"http://127.0.0.1:{server.server_address[1]}"
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield handler.url, asked
    finally:
        server.shutdown()
        server.server_close()


def baseline(path: Path) -> Path:
    asked = {"temperature": 1.0, "top_p": 1.0, "max_output_tokens": 512}
    rows = []
    for index, task in enumerate(TASKS):
        (message,) = task["responses_create_params"]["input"]
        made = row(message["content"], "Badly.", 0.0, index=index, agent_ref=task["agent_ref"])
        made["responses_create_params"] |= asked
        rows.append(made)
    return write_rows(path, rows)


def interrupting(stage: str, done: int, total: int) -> None:
    """Ctrl-C with half of the rollouts there."""
    if done >= 3:
        raise KeyboardInterrupt


def test_a_validation_goes_on_where_only_ports_and_the_comparison_changed(tmp_path: Path) -> None:
    with world() as (url, asked):
        chosen = ValidateSettings(
            baseline=str(baseline(tmp_path / "before.jsonl")),
            tasks=write_rows(tmp_path / "tasks.jsonl", TASKS),
            endpoint=f"{url}/v1",
            endpoint_model="big",
            head=url,
            endpoint_port=free_port(),
            repeats=1,
            concurrency=1,
            leak_check=False,
        )
        out = tmp_path / "validation"
        with pytest.raises(KeyboardInterrupt):
            validate(None, out, chosen, progress=interrupting)
        before = sum(asked.values())
        assert 3 <= before < 6
        changed = {"endpoint_port": free_port(), "min_effect": 0.5, "concurrency": 2}
        comparison = validate(None, out, chosen.model_copy(update=changed))
        # At most the one that was under way is asked for twice.
        assert sum(asked.values()) <= 7 and max(asked.values()) <= 2 and len(asked) == 6
        assert comparison.outcome == "improved"
        manifest = read_manifest(out)
        assert manifest.settings["min_effect"] == 0.5
        assert manifest.extra["served_before"] == "" and manifest.extra["served_after"] == f"big at {url}/v1"


def test_one_collection_has_one_server(tmp_path: Path) -> None:
    out = tmp_path / "rollouts.jsonl"
    with world() as (url, asked):
        chosen = ValidateSettings(baseline="unused", repeats=1, concurrency=1)
        opened = gym_session("s", tmp_path, head=url, port=free_port(), progress=interrupting)
        with opened as session, pytest.raises(KeyboardInterrupt):
            session.collect(Hosted(f"{url}/v1", "big"), TASKS, out, chosen, name="r")
        assert served_by(out) == f"big at {url}/v1"
        had = asked.total()
        with gym_session("s", tmp_path, head=url, port=free_port()) as session:
            with pytest.raises(UserError, match=f"big at {url}/v1 served the rollouts.*other at {url}/v1"):
                session.collect(Hosted(f"{url}/v1", "other"), TASKS, out, chosen, name="r")
            with pytest.raises(UserError, match="would serve the others"):
                beside = tmp_path / "after" / "rollouts.jsonl"
                session.collect(Hosted(f"{url}/v1", "other"), TASKS, beside, chosen, name="r", like=out)
            assert asked.total() == had
            assert session.collect(Hosted(f"{url}/v1", "big"), TASKS, out, chosen, name="r").collected == 6
