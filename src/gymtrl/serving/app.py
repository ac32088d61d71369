"""The HTTP side: chat completions, prompt tokens, models and health, in OpenAI's shapes."""

from __future__ import annotations

import asyncio
import json
import time
import uuid
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from gymtrl.errors import GymtrlError, RunError, UserError
from gymtrl.serving.chat import call_family, prompt_ids
from gymtrl.serving.engine import Engine, decode
from gymtrl.serving.request import GenerationRequest, GenerationResult
from gymtrl.serving.sampling import Sampling
from gymtrl.serving.schema import BadRequest, ChatMessage, ChatRequest, TokenizeRequest, Tool, parse
from gymtrl.serving.tool_calls import Family, read_calls

MAX_BODY_BYTES = 16 * 2**20
"""Larger request bodies are refused: no context holds so much text."""


def create_app(engine: Engine, served_name: str) -> Starlette:
    """Makes the ASGI application around a running engine.

    Args:
        engine (`Engine`): Generates; closing it is the caller's task.
        served_name (`str`): The model's name; requests for another one get status 404.

    Returns:
        `Starlette`: `POST /v1/chat/completions`, `POST /tokenize`, `GET /v1/models`, `GET /health`. Errors are JSON
        `{"error": {"message", "type", "param", "code"}}`: 400 for a bad request, 404 for an unknown model, 413 for a
        body above `MAX_BODY_BYTES`, 500 when generation broke, 503 when the server is stopping.
    """
    created = int(time.time())
    family = call_family(engine.tokenizer)

    async def chat_completions(request: Request) -> Response:
        asked = parse(ChatRequest, await _body(request))
        _check_model(asked.model, served_name)
        prompt = _prompt(engine, asked.messages, asked.tools, asked.chat_template_kwargs)
        if asked.may_call and family is None:
            raise BadRequest(
                "the model's chat template writes tool calls in a way that this server cannot read",
                param="tools",
                remedy="serve it with vLLM and the --tool-call-parser that is made for it",
            )
        generation = _generation(engine, asked, prompt)
        result = await _result(engine, generation, request)
        if result is None:
            # Nobody is there to read it; the status is the customary one for a client that left.
            return Response(status_code=499)
        return JSONResponse(_completion(engine, served_name, family, asked, generation, result))

    async def tokenize(request: Request) -> Response:
        asked = parse(TokenizeRequest, await _body(request))
        _check_model(asked.model, served_name)
        tokens = _prompt(engine, asked.messages, asked.tools, asked.chat_template_kwargs)
        return JSONResponse({"tokens": tokens, "count": len(tokens), "max_model_len": engine.max_length})

    async def models(request: Request) -> Response:
        entry = {
            "id": served_name,
            "object": "model",
            "created": created,
            "owned_by": "gymtrl",
            "max_model_len": engine.max_length,
        }
        return JSONResponse({"object": "list", "data": [entry]})

    async def health(request: Request) -> Response:
        state: dict[str, Any] = {
            "status": "failed" if engine.failure else "ok",
            "model": served_name,
            "running": engine.running,
            "waiting": engine.waiting,
        }
        if engine.failure:
            state["message"] = engine.failure
        return JSONResponse(state, status_code=500 if engine.failure else 200)

    def run_error(request: Request, error: Exception) -> Response:
        # A failed engine stays failed; a closed one belongs to a server that is stopping.
        return _error(500 if engine.failure else 503, error, "server_error")

    return Starlette(
        routes=[
            Route("/v1/chat/completions", chat_completions, methods=["POST"]),
            Route("/tokenize", tokenize, methods=["POST"]),
            Route("/v1/models", models),
            Route("/health", health),
        ],
        exception_handlers={
            UserError: lambda _, error: _error(400, error, "invalid_request_error"),
            RunError: run_error,
            HTTPException: lambda _, error: _error(error.status_code, error, "invalid_request_error", error.detail),
            Exception: lambda _, error: _error(500, error, "server_error", f"internal error: {error!r}"),
        },
    )


def _error(status: int, error: Exception, kind: str, message: str | None = None) -> JSONResponse:
    if message is None:
        message = str(error)
        if isinstance(error, GymtrlError) and error.remedy:
            message = f"{message}; {error.remedy}"
    content = {
        # What a template says may quote a request's lone surrogates, which UTF-8 does not have.
        "message": message.encode(errors="backslashreplace").decode(),
        "type": kind,
        "param": getattr(error, "param", None),
        "code": status,
    }
    return JSONResponse({"error": content}, status_code=status)


async def _body(request: Request) -> Any:
    raw, size = bytearray(), 0
    async for chunk in request.stream():
        size += len(chunk)
        # Too much is read to its end and dropped: clients that are still sending do not see an early answer.
        if size <= MAX_BODY_BYTES:
            raw += chunk
    if size > MAX_BODY_BYTES:
        raise HTTPException(413, f"the request body has {size} bytes; {MAX_BODY_BYTES} are allowed")
    try:
        text = raw.decode()
        body = json.loads(text)
        if "\\u" in text:
            # Escapes can spell lone surrogates, which no tokenizer takes.
            json.dumps(body, ensure_ascii=False).encode()
    except RecursionError:
        raise BadRequest("the request body nests too deep") from None
    except ValueError as error:
        raise BadRequest(f"the request body is no JSON: {error}") from None
    return body


def _check_model(asked: str | None, served: str) -> None:
    if asked is not None and asked != served:
        raise HTTPException(404, f"there is no model '{asked}' here; this server has '{served}'")


def _prompt(
    engine: Engine,
    messages: list[ChatMessage],
    tools: list[Tool] | None,
    template_kwargs: dict[str, Any] | None,
) -> tuple[int, ...]:
    try:
        shown = [message.for_template() for message in messages]
        offered = [tool.for_template() for tool in tools or []]
    except (ValueError, RecursionError):
        # Pydantic takes what nests very deep for a circle.
        raise BadRequest("the arguments of a tool call or the parameters of a tool nest too deep") from None
    return prompt_ids(engine.tokenizer, shown, offered, template_kwargs)


def _generation(engine: Engine, asked: ChatRequest, prompt: tuple[int, ...]) -> GenerationRequest:
    room = engine.max_length - len(prompt)
    limit = asked.token_limit or room
    if limit > room or room < 1:
        # Gym knows a full context by these words, and takes it for an empty reply that was cut off.
        raise BadRequest(
            f"This model's maximum context length is {engine.max_length} tokens. However, you requested "
            f"{len(prompt) + max(limit, 1)} tokens ({len(prompt)} in the messages, {max(limit, 1)} in the "
            "completion). Please reduce the length of the messages or completion.",
            param="messages",
        )
    return GenerationRequest(
        prompt_ids=prompt,
        max_new_tokens=limit,
        sampling=Sampling(
            temperature=1.0 if asked.temperature is None else asked.temperature,
            top_p=1.0 if asked.top_p is None else asked.top_p,
            top_k=max(asked.top_k or 0, 0),
            min_p=asked.min_p or 0.0,
        ),
        seed=asked.seed,
        stop=asked.stop_texts,
    )


async def _result(engine: Engine, generation: GenerationRequest, request: Request) -> GenerationResult | None:
    """Waits for the engine; None when the client has gone, whose row is then dropped."""
    future = asyncio.wrap_future(engine.submit(generation))
    gone = asyncio.ensure_future(_disconnected(request))
    either: set[asyncio.Future[Any]] = {future, gone}
    try:
        await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
        if not future.done():
            return None
        return future.result()
    finally:
        future.cancel()
        gone.cancel()


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


def _completion(
    engine: Engine,
    served_name: str,
    family: Family | None,
    asked: ChatRequest,
    generation: GenerationRequest,
    result: GenerationResult,
) -> dict[str, Any]:
    ids = result.token_ids[:-1] if result.ended else result.token_ids
    text = decode(engine.tokenizer, ids)
    finish_reason: str = result.finish_reason
    if result.finish_reason == "stop" and not result.ended:
        text = text[: min((place for stop in generation.stop if (place := text.find(stop)) >= 0), default=None)]
    message: dict[str, Any] = {"role": "assistant", "content": text}
    if asked.may_call and family is not None:
        # With special tokens, as some tokenizers count the marks of a call among them.
        offered = [tool.for_template() for tool in asked.tools or []]
        before, calls = read_calls(_with_special(engine, ids, text), family, offered)
        if asked.parallel_tool_calls is False:
            calls = calls[:1]
        if calls:
            message["content"] = _without_special(engine, before).strip() or None
            message["tool_calls"] = [
                {
                    "id": family.call_id(),
                    "type": "function",
                    "function": {"name": call.name, "arguments": call.arguments},
                }
                for call in calls
            ]
            # Also where the reply was cut off after a whole call, as with vLLM: Gym executes it, and goes on.
            finish_reason = "tool_calls"
    if asked.wants_token_ids:
        message["prompt_token_ids"] = generation.prompt_ids
        message["generation_token_ids"] = result.token_ids
        message["generation_log_probs"] = result.log_probs
    choice = {
        "index": 0,
        "message": message,
        "logprobs": {"content": _log_probs(engine, asked, result)} if asked.logprobs else None,
        "finish_reason": finish_reason,
    }
    prompt, completion = len(generation.prompt_ids), len(result.token_ids)
    return {
        "id": f"chatcmpl-{uuid.uuid4().hex}",
        "object": "chat.completion",
        "created": int(time.time()),
        "model": served_name,
        "choices": [choice],
        "usage": {
            "prompt_tokens": prompt,
            "completion_tokens": completion,
            "total_tokens": prompt + completion,
            "prompt_tokens_details": {"cached_tokens": result.cached_tokens},
        },
    }


def _with_special(engine: Engine, ids: tuple[int, ...], text: str) -> str:
    """A reply's text, which a stop text may have cut within a token, with the special tokens that stand in it."""
    whole = len(ids)
    while not text.startswith(plain := decode(engine.tokenizer, ids[:whole])):
        whole -= 1
    return decode(engine.tokenizer, ids[:whole], special=True) + text[len(plain) :]


def _without_special(engine: Engine, text: str) -> str:
    for token in engine.tokenizer.added_tokens_decoder.values():
        if token.special:
            text = text.replace(token.content, "")
    return text


def _log_probs(engine: Engine, asked: ChatRequest, result: GenerationResult) -> list[dict[str, Any]]:
    entries = []
    for token, log_prob in zip(result.token_ids, result.log_probs, strict=True):
        piece = decode(engine.tokenizer, (token,), special=True)
        entries.append(
            {
                "token": f"token_id:{token}" if asked.return_tokens_as_token_ids else piece,
                "logprob": log_prob,
                "bytes": list(piece.encode()),
                "top_logprobs": [],
            }
        )
    return entries
