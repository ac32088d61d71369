"""The part of OpenAI's chat completion request that this server speaks, checked field by field.

A field that would change the reply and is not supported is an error, never ignored. Error texts about the token limit
say "completion token limit": Gym reads any status 400 that contains the field's usual name as "context full" and goes
on with an empty reply.
"""

from __future__ import annotations

from difflib import get_close_matches
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from gymtrl.errors import UserError

LIMIT = "completion token limit"

RequestModel = TypeVar("RequestModel", bound=BaseModel)


class BadRequest(UserError):
    """A request that is answered with status 400; `param` names the field."""

    def __init__(self, message: str, *, param: str | None = None, remedy: str | None = None) -> None:
        super().__init__(message, remedy=remedy)
        self.param = param


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


class TextPart(_Strict):
    type: Literal["text"]
    text: str


class Function(_Strict):
    name: str
    arguments: str | dict[str, Any] = "{}"


class MessageToolCall(_Strict):
    id: str | None = None
    type: Literal["function"] = "function"
    index: int | None = None
    function: Function


class ChatMessage(_Strict):
    """One message. Token ids and log-probabilities of earlier replies may come along; the text counts."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[TextPart] | None = None
    name: str | None = None
    tool_calls: list[MessageToolCall] | None = None
    tool_call_id: str | None = None
    reasoning: str | None = None
    reasoning_content: str | None = None
    refusal: str | None = None
    annotations: list[Any] | None = None
    audio: None = None
    function_call: None = None
    prompt_token_ids: list[int | str] | None = None
    generation_token_ids: list[int | str] | None = None
    generation_log_probs: list[float] | None = None
    routed_experts: Any = None

    def for_template(self) -> dict[str, Any]:
        """The message as chat templates expect it, with text parts joined."""
        content = self.content
        if isinstance(content, list):
            content = "".join(part.text for part in content)
        calls = [call.model_dump(exclude_none=True) for call in self.tool_calls or []]
        return {
            "role": self.role,
            "content": content,
            "name": self.name,
            "tool_calls": calls or None,
            "tool_call_id": self.tool_call_id,
            "reasoning_content": self.reasoning_content or self.reasoning,
        }


class ToolFunction(_Strict):
    name: str
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class Tool(_Strict):
    type: Literal["function"]
    function: ToolFunction

    def for_template(self) -> dict[str, Any]:
        """The tool without fields that nobody set."""
        return self.model_dump(exclude_none=True)


class TokenizeRequest(_Strict):
    """`POST /tokenize`: a conversation whose prompt tokens are wanted."""

    model: str | None = None
    messages: Annotated[list[ChatMessage], Field(min_length=1)]
    tools: list[Tool] | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    add_generation_prompt: Literal[True] | None = None


class ChatRequest(_Strict):
    """`POST /v1/chat/completions`. The fields of the last block are accepted at values that change nothing."""

    model: str | None = None
    messages: Annotated[list[ChatMessage], Field(min_length=1)]
    tools: list[Tool] | None = None
    tool_choice: Literal["none", "auto"] | None = None
    parallel_tool_calls: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    temperature: Annotated[float, Field(ge=0)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=-1)] | None = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    seed: int | None = None
    stop: str | Annotated[list[str], Field(max_length=16)] | None = None
    logprobs: bool | None = None
    top_logprobs: Literal[0] | None = None
    return_tokens_as_token_ids: bool | None = None
    return_token_ids: bool | None = None

    n: Literal[1] | None = None
    stream: Literal[False] | None = None
    stream_options: None = None
    user: str | None = None
    metadata: dict[str, Any] | None = None
    store: bool | None = None
    service_tier: str | None = None
    frequency_penalty: Annotated[float, Field(ge=0, le=0)] | None = None
    presence_penalty: Annotated[float, Field(ge=0, le=0)] | None = None
    repetition_penalty: Annotated[float, Field(ge=1, le=1)] | None = None
    logit_bias: Annotated[dict[str, float], Field(max_length=0)] | None = None
    response_format: dict[Literal["type"], Literal["text"]] | None = None
    modalities: list[Literal["text"]] | None = None
    audio: None = None
    prediction: None = None
    reasoning_effort: None = None
    web_search_options: None = None

    @model_validator(mode="after")
    def _stop_is_text(self) -> ChatRequest:
        if any(not text for text in self.stop_texts):
            raise ValueError("stop may not be an empty text")
        return self

    @property
    def stop_texts(self) -> tuple[str, ...]:
        """The stop texts as a tuple, whichever way they were given."""
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())

    @property
    def token_limit(self) -> int | None:
        """New tokens at most; the newer of the two field names wins."""
        return self.max_completion_tokens or self.max_tokens

    @property
    def may_call(self) -> bool:
        """Whether the reply may hold tool calls."""
        return bool(self.tools) and self.tool_choice != "none"

    @property
    def wants_token_ids(self) -> bool:
        """Whether the message is to carry token ids and log-probabilities, as Gym reads them for training."""
        return bool(self.logprobs or self.return_token_ids)


def parse(kind: type[RequestModel], body: Any) -> RequestModel:
    """Checks a request body.

    Raises:
        BadRequest: Names the first field that is wrong, and for an unknown field the nearest known one.
    """
    if not isinstance(body, dict):
        raise BadRequest("the request body must be a JSON object")
    try:
        return kind.model_validate(body)
    except ValidationError as error:
        raise _readable(kind, error) from None


_NEEDS = {
    "n": "only one reply a request is supported; send n requests",
    "stream": "streaming is not supported",
    "top_logprobs": "alternatives are not supported; top_logprobs must be 0",
    "tool_choice": "only 'auto' and 'none' are supported",
    "max_tokens": f"the {LIMIT} must be a whole number of at least 1",
    "max_completion_tokens": f"the {LIMIT} must be a whole number of at least 1",
    "response_format": "only text replies are supported",
}


def _readable(kind: type[BaseModel], error: ValidationError) -> BadRequest:
    problems = error.errors()
    if any("content" in problem["loc"] and problem["loc"][-1] == "type" for problem in problems):
        return BadRequest("only text content is supported", param="messages")
    # Unknown fields first: a misspelt name is the likelier reason for what else is wrong.
    problem = min(problems, key=lambda problem: problem["type"] != "extra_forbidden")
    where = ".".join(str(part) for part in problem["loc"])
    field = str(problem["loc"][0]) if problem["loc"] else None
    if problem["type"] == "extra_forbidden":
        names = list(kind.model_fields) if len(problem["loc"]) == 1 else []
        near = next(iter(get_close_matches(where, names, n=1, cutoff=0.5)), None)
        near = "max_completion_tokens" if near == "max_tokens" else near
        return BadRequest(f"unknown field '{where}'", param=where, remedy=near and f"did you mean '{near}'?")
    if field in _NEEDS:
        param = "max_completion_tokens" if field == "max_tokens" else field
        return BadRequest(f"{param}: {_NEEDS[field]}", param=param)
    return BadRequest(f"{where or 'request'}: {problem['msg']}", param=field)
