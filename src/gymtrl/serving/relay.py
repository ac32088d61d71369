"""A hosted endpoint as one on loopback: under our port and model name, with its key added on the way out.

Gym is told one address and one model name when it starts, and stays up while the policy behind them changes. It never
sees the key, and so cannot write it into its files.
"""

from __future__ import annotations

import json
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
from gymtrl.serving.hosted import TOKEN_FIELDS, Hosted, gives_token_ids
from gymtrl.serving.launch import Endpoint, require_free

_TIMEOUT = httpx.Timeout(600.0, connect=20.0)
_RECORDED: dict[str, list[Any]] = {"prompt_token_ids": [], "generation_token_ids": [], "generation_log_probs": []}
_START_SECONDS = 30.0


@contextmanager
def relaying(hosted: Hosted, *, name: str, port: int) -> Iterator[Endpoint]:
    """Answers on loopback what a hosted endpoint answers, for as long as the block lasts.

    Where that endpoint knows no token ids, it is not asked for them, and they are empty in the answers.

    Args:
        hosted (`Hosted`): The endpoint.
        name (`str`): Model name that requests carry here.
        port (`int`): TCP port.

    Raises:
        UserError: The endpoint refuses key, model or request.
        RunError: It does not answer, or the port is in use.
    """
    require_free(port)
    app = _app(hosted, name, token_ids=gives_token_ids(hosted))
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

    try:
        yield Endpoint(f"http://127.0.0.1:{port}/v1", f"{hosted.model} at {hosted.url}", check)
    finally:
        server.should_exit = True
        thread.join(10)


def _app(hosted: Hosted, name: str, *, token_ids: bool) -> Starlette:
    limits = httpx.Limits(max_connections=None)
    client = httpx.AsyncClient(timeout=_TIMEOUT, limits=limits, headers=hosted.headers)

    async def forward(request: Request, path: str) -> tuple[int, bytes]:
        body = await request.json() | {"model": hosted.model}
        if not token_ids:
            body = _without_token_fields(body)
        try:
            answer = await client.post(hosted.at(path), json=body)
        except httpx.HTTPError as error:
            failure = {"message": f"the hosted endpoint does not answer: {type(error).__name__}", "code": 502}
            return 502, json.dumps({"error": failure}).encode()
        return answer.status_code, answer.content

    async def chat_completions(request: Request) -> Response:
        status, content = await forward(request, "/chat/completions")
        if status == 200 and not token_ids:
            content = _with_empty_ids(content)
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


def _with_empty_ids(content: bytes) -> bytes:
    """An answer in which the ids that Gym wants to record are there, and empty."""
    try:
        answer = json.loads(content)
        for choice in answer["choices"]:
            choice["message"] |= _RECORDED
    except (ValueError, LookupError, TypeError):
        return content
    return json.dumps(answer).encode()
