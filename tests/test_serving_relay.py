"""Endpoints that run already, reached through the relay: names, keys, token ids, and what they refuse."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from gymtrl.errors import RunError, UserError
from gymtrl.gym.servers import free_port
from gymtrl.processes import KEY_VARIABLE
from gymtrl.serving import relay
from gymtrl.serving.hosted import TOKEN_FIELDS, Hosted
from gymtrl.serving.relay import relaying
from test_serving_http import make_model, running

KEY = "sk-secret-0123"
TOO_MANY = "max_tokens is too large: {}. This model supports at most 16384 completion tokens"
REFUSALS = {
    "slow down": (429, "too many"),
    "be away": (503, "overloaded"),
    "be empty": (402, "no credit"),
    "overfill": (400, "This model's maximum context length is 8192 tokens; reduce messages or max_tokens"),
}
THOUGHT = {
    "think": {"reasoning_content": "Hm.", "reasoning": "Hm."},
    "think alone": {"reasoning": "Hm.", "content": None},
    "think nothing": {"reasoning_content": None},
}


@contextmanager
def provider(seen: list[Any]) -> Iterator[str]:
    """A host that wants a key and refuses fields that it does not know, as providers do."""

    async def chat(request: Request) -> Response:
        if request.headers.get("authorization") != f"Bearer {KEY}":
            return JSONResponse({"error": {"message": "bad key"}}, 401)
        body = await request.json()
        seen.append(body)
        if body["model"] != "big":
            return JSONResponse({"error": {"message": "no such model"}}, 404)
        if body.keys() - {"model", "messages", "max_tokens", "temperature"} or any(
            message.keys() - {"role", "content"} for message in body["messages"]
        ):
            return JSONResponse({"error": {"message": "unknown field"}}, 400)
        said = body["messages"][-1]["content"]
        if said in REFUSALS:
            status, why = REFUSALS[said]
            return JSONResponse({"error": {"message": why}}, status)
        if body.get("max_tokens", 0) > 16384:
            return JSONResponse({"error": {"message": TOO_MANY.format(body["max_tokens"])}}, 400)
        message = {"role": "assistant", "content": "Hello."} | THOUGHT.get(said, {})
        return JSONResponse({"choices": [{"index": 0, "message": message, "logprobs": None, "finish_reason": "stop"}]})

    port = free_port()
    app = Starlette(routes=[Route("/api/v1/chat/completions", chat, methods=["POST"])])
    server = uvicorn.Server(uvicorn.Config(app, port=port, log_level="error"))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.02)
    try:
        yield f"http://127.0.0.1:{port}/api/v1"
    finally:
        server.should_exit = True
        thread.join(10)


def ours() -> dict[str, Any]:
    return {"name": "policy", "port": free_port(), "max_output_tokens": 8}


def ask(url: str, text: str, **fields: Any) -> httpx.Response:
    body = {"model": "policy", "messages": [{"role": "user", "content": text}], "max_tokens": 3, **fields}
    return httpx.post(f"{url}/chat/completions", json=body, timeout=60)


def test_an_endpoint_of_ours_is_passed_on_whole(tmp_path: Path) -> None:
    model = make_model(tmp_path / "chain")
    with running(model) as (_, ready):
        hosted = Hosted(f"{ready['url']}/v1", "chain")
        with relaying(hosted, **ours()) as endpoint:
            assert endpoint.server == f"chain at {ready['url']}/v1"
            message = ask(endpoint.url, "w0", temperature=0, **TOKEN_FIELDS).json()["choices"][0]["message"]
            assert message["content"] == "w1 w2 w3"
            assert message["prompt_token_ids"] == [2] and message["generation_token_ids"] == [3, 4, 5]
            chat = {"model": "policy", "messages": [{"role": "user", "content": "w7"}]}
            tokens = httpx.post(f"{endpoint.url.removesuffix('/v1')}/tokenize", json=chat).json()["tokens"]
            assert tokens == [9]
            refused = ask(endpoint.url, "w0", temperature=-1)
            assert (refused.status_code, refused.json()["error"]["param"]) == (400, "temperature")
        with (
            pytest.raises(UserError, match="has no model 'other'"),
            relaying(Hosted(f"{ready['url']}/v1", "other"), **ours()),
        ):
            pass


def test_a_provider_is_asked_for_what_it_knows(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []
    monkeypatch.setenv(KEY_VARIABLE, KEY)
    with provider(seen) as url, relaying(Hosted(url, "big"), **ours()) as endpoint:
        history = {"role": "assistant", "content": "Hi.", "generation_token_ids": [1], "generation_log_probs": [-1.0]}
        messages = [{"role": "user", "content": "Hi"}, history, {"role": "user", "content": "More"}]
        answer = ask(endpoint.url, "", messages=messages, **TOKEN_FIELDS)
        message = answer.json()["choices"][0]["message"]
        assert message["content"] == "Hello."
        assert message["prompt_token_ids"] == message["generation_token_ids"] == message["generation_log_probs"] == []
        assert seen[-1]["model"] == "big" and seen[-1]["messages"][1] == {"role": "assistant", "content": "Hi."}
        assert ask(endpoint.url, "slow down").status_code == 429
        models = httpx.get(f"{endpoint.url}/models").json()
        assert [model["id"] for model in models["data"]] == ["policy"]
        assert KEY not in endpoint.server and KEY not in answer.text


def test_who_does_not_know_the_relays_key_spends_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []
    monkeypatch.setenv(KEY_VARIABLE, KEY)
    with provider(seen) as url, relaying(Hosted(url, "big"), **ours(), key="of-this-session") as endpoint:
        probed = len(seen)
        assert ask(endpoint.url, "Hi").status_code == 401
        body = {"model": "policy", "messages": [{"role": "user", "content": "Hi"}]}
        for given, status in (("Bearer other", 401), ("Bearer of-this-session", 200), ("Bearer \xe9", 401)):
            headers = {b"Authorization": given.encode("latin-1")}
            answer = httpx.post(f"{endpoint.url}/chat/completions", json=body, headers=headers)
            assert answer.status_code == status
        assert len(seen) == probed + 1
        endpoint.check()  # that strangers are refused says nothing about the endpoint


def test_reasoning_stands_in_the_text_where_gym_looks_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(KEY_VARIABLE, KEY)
    with provider([]) as url, relaying(Hosted(url, "big"), **ours()) as endpoint:
        for said, text in (
            ("think", "<think>Hm.</think>Hello."),
            ("think alone", "<think>Hm.</think>"),
            ("think nothing", "Hello."),
        ):
            message = ask(endpoint.url, said).json()["choices"][0]["message"]
            assert message["content"] == text
            assert not message.keys() & {"reasoning", "reasoning_content"}


def test_a_refused_token_limit_is_no_full_context(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(KEY_VARIABLE, KEY)
    with provider([]) as url:
        with (
            pytest.raises(UserError, match="max_tokens is too large"),
            relaying(Hosted(url, "big"), **ours() | {"max_output_tokens": 100000}),
        ):
            pass
        with relaying(Hosted(url, "big"), **ours()) as endpoint:
            # Gym scores an empty reply where the status is 400 and the text has one of its two phrases.
            assert ask(endpoint.url, "Hi", max_tokens=100000).status_code == 422
            assert ask(endpoint.url, "overfill").status_code == 400


def test_an_endpoint_that_goes_away_ends_the_collection(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(KEY_VARIABLE, KEY)
    monkeypatch.setattr(relay, "_GONE_SECONDS", 0.5)
    with provider([]) as url, relaying(Hosted(url, "big"), **ours()) as endpoint:
        for said in ("be away", "Hi", "be away", "slow down"):
            assert ask(endpoint.url, said).status_code in (200, 429, 503)
            time.sleep(0.3)
            endpoint.check()
        ask(endpoint.url, "be away")
        time.sleep(0.6)
        endpoint.check()  # nothing was asked since
        ask(endpoint.url, "be away")
        with pytest.raises(RunError, match="has answered nothing for"):
            endpoint.check()
    with provider([]) as url, relaying(Hosted(url, "big"), **ours()) as endpoint:
        assert ask(endpoint.url, "be empty").status_code == 402
        with pytest.raises(RunError, match=r"refuses further requests \(402\)"):
            endpoint.check()


def test_what_cannot_be_reached_is_told_before_anything_runs(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv(KEY_VARIABLE, f"{KEY}-wrong")
    with provider([]) as url:
        with (
            pytest.raises(UserError, match="refuses the key") as caught,
            relaying(Hosted(url, "big"), **ours()),
        ):
            pass
        assert KEY_VARIABLE in str(caught.value.remedy) and KEY not in str(caught.value)
    with (
        pytest.raises(RunError, match="nothing answers"),
        relaying(Hosted(f"http://127.0.0.1:{free_port()}/v1", "big"), **ours()),
    ):
        pass
    assert KEY not in "".join(capfd.readouterr())


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("host/v1", "no base URL"),
        ("file:///etc/passwd", "no base URL"),
        ("https://host/v1?key=a", "no base URL"),
        ("https://me:secret@host/v1", "holds a user name"),
        ("https://[host/v1", "no base URL"),
    ],
)
def test_urls_that_are_none(url: str, message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        Hosted(url, "big")
    assert "secret" not in str(caught.value)
