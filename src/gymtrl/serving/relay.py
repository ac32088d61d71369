"""A hosted endpoint as one on loopback: under our port and model name, with its key added on the way out.

Gym is told one address and one model name when it starts, and stays up while the policy behind them changes. It never
sees the key, and so cannot write it into its files; it asks with one of our own, without which anybody on the machine
could spend the other.
"""

from __future__ import annotations

import json
import secrets
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import httpx
import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from gymtrl.errors import RunError
from gymtrl.processes import KEY_VARIABLE
from gymtrl.serving.hosted import TOKEN_FIELDS, Hosted, gives_token_ids
from gymtrl.serving.launch import Endpoint, require_free

_TIMEOUT = httpx.Timeout(600.0, connect=20.0)
_GONE = (502, 503, 504, 520)  # what Gym takes for an overload, and repeats without end
_GONE_SECONDS = 180.0  # longer than an overload lasts
_REFUSED = (401, 402)  # the key, or its account, is no good any more
_RECORDED: dict[str, list[Any]] = {"prompt_token_ids": [], "generation_token_ids": [], "generation_log_probs": []}
_START_SECONDS = 30.0


@contextmanager
def relaying(
    hosted: Hosted, *, name: str, port: int, max_output_tokens: int, key: str | None = None
) -> Iterator[Endpoint]:
    """Answers on loopback what a hosted endpoint answers, for as long as the block lasts.

    Where that endpoint knows no token ids, it is not asked for them, and they are empty in the answers.

    Args:
        hosted (`Hosted`): The endpoint.
        name (`str`): Model name that requests carry here.
        port (`int`): TCP port.
        max_output_tokens (`int`): Tokens that requests will ask for at most, which the endpoint must allow.
        key (`str`, *optional*): What requests must carry as their bearer token; nothing by default.

    Raises:
        UserError: The endpoint refuses key, model or request.
        RunError: It does not answer, or the port is in use.
    """
    require_free(port)
    state = _State(hosted.url)
    app = _app(hosted, name, state, key, token_ids=gives_token_ids(hosted, max_output_tokens))
    server = uvicorn.Server(
        uvicorn.Config(
            app, host="127.0.0.1", port=port, log_level="error", access_log=False, timeout_graceful_shutdown=1
        )
    )
    thread = threading.Thread(target=server.run, name="gymtrl-relay", daemon=True)
    thread.start()
    end = time.monotonic() + _START_SECONDS
    while not server.started:
        if not thread.is_alive() or time.monotonic() > end:
            raise RunError(f"cannot listen on 127.0.0.1:{port}", remedy="give another port")
        time.sleep(0.05)

    def check() -> None:
        if not thread.is_alive():
            raise RunError(f"the relay to {hosted.url} ended")
        state.check()

    try:
        yield Endpoint(f"http://127.0.0.1:{port}/v1", f"{hosted.model} at {hosted.url}", check)
    finally:
        server.should_exit = True
        thread.join(10)


class _State:
    """What the hosted endpoint's last answers say about the next ones."""

    def __init__(self, url: str) -> None:
        self._url = url
        self._gone_since: float | None = None
        self._asked = 0.0
        self._refused: int | None = None

    def note(self, status: int) -> None:
        """Takes the status of an answer; 502 where there was none."""
        self._asked = time.monotonic()
        if status not in _GONE:
            self._gone_since = None
        elif self._gone_since is None:
            self._gone_since = self._asked
        if status in _REFUSED:
            self._refused = status

    def check(self) -> None:
        if self._refused is not None:
            told = f"{self._url} refuses further requests ({self._refused})"
            raise RunError(told, remedy=f"look after the key in ${KEY_VARIABLE} and its account, and run it again")
        # From answer to answer: with nothing asked meanwhile, nothing is known.
        if self._gone_since is not None and (passed := self._asked - self._gone_since) > _GONE_SECONDS:
            told = f"{self._url} has answered nothing for {passed:.0f} s"
            raise RunError(told, remedy="run it again when it does; it goes on from here")


def _app(hosted: Hosted, name: str, state: _State, key: str | None, *, token_ids: bool) -> Starlette:
    limits = httpx.Limits(max_connections=None)
    client = httpx.AsyncClient(timeout=_TIMEOUT, limits=limits, headers=hosted.headers)

    async def forward(request: Request, path: str) -> tuple[int, bytes]:
        given = request.headers.get("authorization", "").encode()
        if key is not None and not secrets.compare_digest(given, f"Bearer {key}".encode()):
            failure = {"message": "this endpoint is for one Gym alone, which knows its key", "code": 401}
            return 401, json.dumps({"error": failure}).encode()
        body = await request.json() | {"model": hosted.model}
        if not token_ids:
            body = _without_token_fields(body)
        try:
            answer = await client.post(hosted.at(path), json=body)
        except httpx.HTTPError as error:
            state.note(502)
            failure = {"message": f"the hosted endpoint does not answer: {type(error).__name__}", "code": 502}
            return 502, json.dumps({"error": failure}).encode()
        state.note(answer.status_code)
        return answer.status_code, answer.content

    async def chat_completions(request: Request) -> Response:
        status, content = await forward(request, "/chat/completions")
        if status == 200:
            content = _for_gym(content, token_ids=token_ids)
        elif status == 400 and _names_limit_alone(content):
            status = 422
        return Response(content, status, media_type="application/json")

    async def tokenize(request: Request) -> Response:
        status, content = await forward(request, "/tokenize")
        return Response(content, status, media_type="application/json")

    async def models(request: Request) -> Response:
        return JSONResponse({"object": "list", "data": [{"id": name, "object": "model", "owned_by": "gymtrl"}]})

    return Starlette(
        routes=[
            Route("/v1/chat/completions", chat_completions, methods=["POST"]),
            Route("/tokenize", tokenize, methods=["POST"]),
            Route("/v1/models", models),
        ]
    )


def _without_token_fields(body: dict[str, Any]) -> dict[str, Any]:
    kept = {key: value for key, value in body.items() if key not in TOKEN_FIELDS}
    messages = body.get("messages")
    if isinstance(messages, list):
        kept["messages"] = [
            {key: value for key, value in message.items() if key not in _RECORDED}
            if isinstance(message, dict)
            else message
            for message in messages
        ]
    return kept


def _for_gym(content: bytes, *, token_ids: bool) -> bytes:
    """An answer in which Gym finds what it looks for: ids to record, if need be empty, and reasoning in the text."""
    try:
        answer = json.loads(content)
        for choice in answer["choices"]:
            message = choice["message"]
            if not token_ids:
                message |= _RECORDED
            thought = [message.pop(key, None) for key in ("reasoning_content", "reasoning")]
            if said := next((text for text in thought if text), None):
                message["content"] = f"<think>{said}</think>{message.get('content') or ''}"
    except (ValueError, LookupError, TypeError, AttributeError):
        return content
    return json.dumps(answer).encode()


def _names_limit_alone(content: bytes) -> bool:
    """Whether a refusal is about the number of tokens asked for, not about a full context.

    Gym takes both for a full context where the status is 400, and goes on with an empty reply, which is scored.
    """
    said = content.lower()
    return b"max_tokens" in said and b"context" not in said
