"""One line's bytes → its verdict and, where it is a conversation, its record."""

from __future__ import annotations

import json
from collections.abc import Iterable
from functools import lru_cache
from typing import Any, NamedTuple

import msgspec
from msgspec import UNSET

from .chat import as_rollout, is_chat
from .codec import TOO_DEEP, decode_json, to_float, to_utf8
from .items import Refused, is_regular
from .keys import named_cluster, task_key
from .loose import flat_output, loose_items, loose_prompt, refuse_surrogates
from .messages import Conversation, Prompt, prompt_head, prompt_messages, read_items, read_prompt
from .record import Line, Origin, Rollout, Sampling
from .sidecars import Sidecar
from .source import Facts, Item, Request, Response, Row, Usage, decode_input, decode_row, keys_of, pick
from .tools import NO_TOOLS, Tools, decode_tools, read_tools

# By how much the counted prompt tokens may exceed the characters that the row shows: chat templates and default system
# prompts add a few hundred at most, and a token is rarely less than a character.
HIDDEN_CONTEXT_TOKENS = 500

DETAIL_CHARS = 300
"""Longest detail of a verdict."""

# Bytes of a prompt above which it is not kept for the next row: what is kept is bounded by count, not by size.
_LONGEST_KEPT = 32_000

_UNCOUNTED = Usage()
_NUMBERS = (bool, int, float)


def judge(data: bytes, origin: Origin, sidecar: Sidecar, cluster: str | None) -> Line:
    """Gives a line its verdict: a strict look that most rollouts pass, then a lenient one that names what is odd.

    Args:
        data (`bytes`): The line.
        origin (`Origin`): Where it stands.
        sidecar (`Sidecar`): Input rows of the run.
        cluster (`str`, *optional*): Dotted path to what a split must not tear apart.

    Returns:
        `Line`: With the rollout for `ok` and `context`.
    """
    row = decode_row(data)
    try:
        line = None if row is None else _first_look(row, data, origin, sidecar, cluster)
    except RecursionError:
        line = None
    if line is None:
        line = _lenient_look(data, origin, sidecar, cluster)
    return _with_short_detail(line) if line.detail else line


def asked_only(data: bytes, origin: Origin, sidecar: Sidecar, cluster: str | None) -> Rollout | None:
    """The record of a rollout whose answer is refused: its keys and its reward, with no completion.

    Args:
        data, origin, sidecar, cluster: As in `judge`.

    Returns:
        `Rollout`, *optional*: `None` where the line is no rollout, or what was asked cannot be told.
    """
    try:
        value = decode_json(data)
        request, response = value["responses_create_params"], value["response"]
        if (
            not isinstance(request, dict)
            or not isinstance(response, dict)
            or value.get("_ng_failure_class") is not None
        ):
            return None
        asked = loose_prompt(request, response)
        conversation = Conversation(prompt_messages(asked), (), (), set(), set(asked.flags))
        refuse_surrogates(conversation)
        offered = read_tools(request.get("tools"))
        echoed = read_tools(response.get("tools")) if offered is NO_TOOLS else NO_TOOLS
        facts, told = pick(Facts, value, *Facts.__struct_fields__), _told(response)
        chat = _Chat(asked, conversation, _sampled(request), told, offered, echoed, 0)
        return _rollout(facts, chat, value, origin, sidecar, cluster)
    except (ValueError, TypeError, KeyError, RecursionError, Refused):
        return None


class _Chat(NamedTuple):
    """A conversation with what is known of its surroundings."""

    asked: Prompt
    conversation: Conversation
    request: Request
    response: Response
    offered: Tools  # the request's
    echoed: Tools  # the response's
    visible: int  # characters of the prompt as JSON, or fewer
    is_kept: bool = False  # the prompt is one object for all rollouts that were sent the same

    @property
    def tools(self) -> Tools:
        return self.echoed if self.offered is NO_TOOLS else self.offered


def _first_look(row: Row, data: bytes, origin: Origin, sidecar: Sidecar, cluster: str | None) -> Line | None:
    """The verdict on a row of the usual shape, `None` where it needs a second look."""
    request, response = row.responses_create_params, row.response
    failed = row._ng_failure_class is not None
    if not isinstance(request, Request) or not isinstance(response, Response) or failed:
        if row.messages is not UNSET:
            return None
        if not failed and _is_plain_input(row, data):
            return _no_rollout("materialized_input", (), origin)
        keys = keys_of(data)
        asked, answered = isinstance(request, Request), isinstance(response, Response)
        return _no_rollout(_kind(keys, failed=failed, asked=asked, answered=answered), keys, origin)
    instructions = request.instructions if isinstance(request.instructions, str) else ""
    sent, output = bytes(request.input), response.output
    is_kept = len(sent) + len(instructions) <= _LONGEST_KEPT
    given = _asked(sent, instructions) if is_kept else _read_asked(sent, instructions)
    heard = request.metadata
    if heard is not None and (heard.audio_data or heard.audio_url or heard.audio_path):
        return None
    if given is None or not output or not is_regular(output):
        return None
    try:
        conversation = read_items(given, output)
        offered = decode_tools(bytes(request.tools))
        echoed = decode_tools(bytes(response.tools)) if _needs_echo(conversation, offered) else NO_TOOLS
    except Refused as refused:
        return Line(origin, "reject", refused.reason, refused.detail)
    chat = _Chat(given, conversation, request, response, offered, echoed, _shortest(conversation), is_kept)
    if _hides_surrogate(conversation):
        return None
    hides = _hides_context(chat)
    if hides:
        head = prompt_head(output)
        try:
            came = flat_output(decode_json(data)["response"]["output"])[:head] if head else []
            chat = chat._replace(visible=_visible(decode_json(sent) if sent else None, instructions, came))
        except ValueError:  # nested too deeply
            return None
        hides = _hides_context(chat)
    return _line(row, chat, None if cluster is None else _decoded(data), origin, sidecar, cluster, hides=hides)


def _lenient_look(data: bytes, origin: Origin, sidecar: Sidecar, cluster: str | None) -> Line:
    """The verdict on any line."""
    try:
        value = decode_json(data.rstrip(b"\r\n"))  # what is odd is told by its place in the line
    except ValueError as error:
        return Line(origin, "reject", "malformed_json", str(error))
    try:
        return _second_look(value, origin, sidecar, cluster)
    except RecursionError:  # what could just be decoded may still be too deep to be walked through
        return Line(origin, "reject", "malformed_json", TOO_DEEP)


def _with_short_detail(line: Line) -> Line:
    """A detail quotes from the row, and names and keys in it may have any length."""
    detail = to_utf8(line.detail)
    if len(detail) > DETAIL_CHARS:
        detail = detail[: DETAIL_CHARS - 1] + "…"
    return msgspec.structs.replace(line, detail=detail)


def _second_look(value: Any, origin: Origin, sidecar: Sidecar, cluster: str | None) -> Line:
    if not isinstance(value, dict):
        return Line(origin, "reject", "not_object", f"a JSON {_json_type(value)}, not an object")
    failed = value.get("_ng_failure_class") is not None
    asked, answered = (isinstance(value.get(key), dict) for key in ("responses_create_params", "response"))
    kind = _kind(value, failed=failed, asked=asked, answered=answered)
    if kind == "custom_record" and is_chat(value):
        value = as_rollout(value)
    elif kind:
        return _no_rollout(kind, value, origin)
    request, response = value["responses_create_params"], value["response"]
    try:
        items, output = loose_items(request, response)
        given = read_prompt(items)
        conversation = read_items(given, output)
        refuse_surrogates(conversation)
        offered = read_tools(request.get("tools"))
        echoed = read_tools(response.get("tools")) if _needs_echo(conversation, offered) else NO_TOOLS
    except Refused as refused:
        return Line(origin, "reject", refused.reason, refused.detail)
    chat = _Chat(given, conversation, _sampled(request), _told(response), offered, echoed, _shortest(conversation))
    hides = _hides_context(chat)
    if hides:
        head = flat_output(response["output"])[: prompt_head(output)]
        chat = chat._replace(visible=_visible(request.get("input"), request.get("instructions"), head))
        hides = _hides_context(chat)
    facts = pick(Facts, value, *Facts.__struct_fields__)
    return _line(facts, chat, value, origin, sidecar, cluster, hides=hides)


def _sampled(request: dict[str, Any]) -> Request:
    return pick(Request, request, "temperature", "top_p", "max_output_tokens")


def _told(response: dict[str, Any]) -> Response:
    usage = response.get("usage")
    return Response(
        usage=pick(Usage, usage, "input_tokens", "output_tokens") if isinstance(usage, dict) else None,
        status=response.get("status"),
        incomplete_details=response.get("incomplete_details"),
        model=response.get("model"),
    )


def _needs_echo(conversation: Conversation, offered: Tools) -> bool:
    """Where the request declares all that is called, its echo in the response adds nothing."""
    return offered is NO_TOOLS or not conversation.called <= offered.names


_KIND_DETAIL = {
    "failure_row": "an attempt that failed before it became a rollout (_ng_failure_class)",
    "episode_result": "the result of an episode, without the chat",
    "task_only": "a task that nobody has answered: no response",
    "custom_record": "not both a request and a response; its keys begin with: {keys}",
}


def _kind(keys: Iterable[str], *, failed: bool, asked: bool, answered: bool) -> str:
    """What a row is where it is no rollout, `""` where it is one."""
    if failed:
        return "failure_row"
    if asked and answered:
        return ""
    if "_ng_result_type" in keys or "episode_interaction_protocol" in keys:
        return "episode_result"
    if any(key.startswith("mean/") for key in keys):
        return "reward_profile"
    if asked and "response" not in keys:
        return "materialized_input" if "_ng_rollout_index" in keys else "task_only"
    return "custom_record"


def _is_plain_input(row: Row, data: bytes) -> bool:
    """Whether `_kind` would call a row a materialized input, as far as that can be told without its keys."""
    asked_only = isinstance(row.responses_create_params, Request) and row.response is UNSET
    told_otherwise = row._ng_result_type is not UNSET or row.episode_interaction_protocol is not UNSET
    may_profile = b'"mean/' in data or b"\\u00" in data  # a key may be written with escapes
    return asked_only and row._ng_rollout_index is not None and not told_otherwise and not may_profile


def _no_rollout(kind: str, keys: Iterable[str], origin: Origin) -> Line:
    if kind in ("materialized_input", "reward_profile"):
        return Line(origin, "skip", kind, "a row of a file that Gym writes beside the rollouts")
    return Line(origin, "reject", kind, _KIND_DETAIL[kind].format(keys=", ".join(list(keys)[:5])))


def _read_asked(data: bytes, instructions: str) -> Prompt | None:
    items = decode_input(data)
    if items is None or not is_regular(items):
        return None
    return read_prompt([Item("message", "system", instructions), *items] if instructions else items)


# The rollouts of one task were sent the same, and most tasks have several.
_asked = lru_cache(maxsize=1024)(_read_asked)


@lru_cache(maxsize=1024)
def _asked_key(name: str | None, asked: Prompt, tools: bytes) -> str:
    return task_key(name, asked.messages or (), tools)


def _line(
    facts: Facts, chat: _Chat, value: Any, origin: Origin, sidecar: Sidecar, cluster: str | None, *, hides: bool
) -> Line:
    rollout = _rollout(facts, chat, value, origin, sidecar, cluster)
    undeclared = chat.conversation.called - chat.offered.names - chat.echoed.names
    if undeclared:
        detail = f"calls of tools that no list declares: {', '.join(sorted(undeclared)[:5])}"
        return Line(origin, "context", "tools_undeclared", detail, rollout)
    if hides:
        detail = f"{rollout.input_tokens} prompt tokens were counted, the row shows {chat.visible} characters"
        return Line(origin, "context", "hidden_context", detail, rollout)
    return Line(origin, "ok", rollout=rollout)


def _rollout(facts: Facts, chat: _Chat, value: Any, origin: Origin, sidecar: Sidecar, cluster: str | None) -> Rollout:
    conversation, request, response, tools = chat.conversation, chat.request, chat.response, chat.tools
    flags = conversation.flags
    if not tools.all_functions:
        flags.add("tool_not_function")
    agent, environment = _name(facts.agent_ref), _name(facts._ng_environment_server)
    task_index, rollout_index = _integer(facts._ng_task_index), _integer(facts._ng_rollout_index)
    asked = sidecar.find(task_index, rollout_index)
    if chat.is_kept and conversation.prompt is chat.asked.messages:
        task = _asked_key(environment or agent, chat.asked, tools.canonical)
    else:
        task = task_key(environment or agent, conversation.prompt, tools.canonical)
    input_key = asked.input_key if asked else None
    cluster_key = input_key or task
    if cluster is not None:
        named = _named_cluster(cluster, value) or (asked.cluster_key if asked else None)
        if named is None:
            flags.add("cluster_missing")
        cluster_key = named or cluster_key
    reward = facts.reward
    if isinstance(reward, _NUMBERS):
        reward = to_float(reward)
    elif reward is not None:
        reward = None
        flags.add("reward_not_a_number")
    usage = response.usage or _UNCOUNTED
    said = [message for message in conversation.completion if message.role == "assistant"]
    return Rollout(  # by place: names cost a microsecond a row
        origin,
        conversation.prompt,
        conversation.completion,
        tools.functions,
        reward,
        task,
        input_key,
        cluster_key,
        agent,
        environment,
        _name(response.model),
        task_index,
        rollout_index,
        len(said),
        sum([len(message.tool_calls) for message in said]),
        response.status == "incomplete" or bool(response.incomplete_details),
        facts.mask_sample is True,
        _integer(usage.input_tokens),
        _integer(usage.output_tokens),
        tuple(sorted(flags)) if flags else (),
        conversation.recorded,
        Sampling(_number(request.temperature), _number(request.top_p), _integer(request.max_output_tokens)),
        _components(facts.reward_components) if facts.reward_components else {},
    )


def _decoded(data: bytes) -> Any:
    """A row without its types, `None` where something that nobody reads cannot be decoded."""
    try:
        return decode_json(data)
    except ValueError:
        return None


def _named_cluster(cluster: str, value: Any) -> str | None:
    try:
        return named_cluster(cluster, value, None)
    except RecursionError:  # nested too deeply to have a key
        return None


def _hides_context(chat: _Chat) -> bool:
    """Whether more prompt tokens were counted than what is visible can have."""
    counted = _integer((chat.response.usage or _UNCOUNTED).input_tokens)
    if counted is None or counted <= HIDDEN_CONTEXT_TOKENS + chat.visible:
        return False
    prompt, completion = chat.conversation.prompt, chat.conversation.completion
    one_turn = [message.role for message in completion].count("assistant") == 1
    if not one_turn or any(message.images for message in (*prompt, *completion)):
        return False
    return counted > HIDDEN_CONTEXT_TOKENS + chat.visible + chat.tools.length


def _hides_surrogate(conversation: Conversation) -> bool:
    """Whether there is a lone surrogate behind an escape in arguments."""
    if not conversation.called:
        return False
    messages = (*conversation.prompt, *conversation.completion)
    escaped = [c.arguments for m in messages for c in m.tool_calls if "\\u" in c.arguments_json]
    try:
        msgspec.json.encode(escaped)
    except UnicodeEncodeError:
        return True
    return False


def _shortest(conversation: Conversation) -> int:
    """Characters of the prompt's texts: written as JSON, they are no fewer."""
    return sum([len(message.content) for message in conversation.prompt])


def _visible(sent: Any, instructions: Any, head: list[Any]) -> int:
    """Characters as JSON of what was sent and of the prompt's items at the head of the output, without the tools."""
    shown = [sent, *([instructions] if instructions and isinstance(instructions, str) else []), *head]
    return sum([len(json.dumps(item, ensure_ascii=False)) for item in shown])


def _number(value: Any) -> float | None:
    return to_float(value) if type(value) is float or type(value) is int else None


def _components(value: Any) -> dict[str, float]:
    parts = value.items() if isinstance(value, dict) else ()
    return {to_utf8(name): to_float(part) for name, part in parts if isinstance(part, _NUMBERS)}


def _name(value: Any) -> str | None:
    """A name given as such or as a reference with a name."""
    if isinstance(value, dict):
        value = value.get("name")
    return to_utf8(value) if isinstance(value, str) and value else None


def _integer(value: Any) -> int | None:
    """A count or index that fits a 64-bit column."""
    return value if type(value) is int and -(2**63) <= value < 2**63 else None


def _json_type(value: Any) -> str:
    return {list: "array", str: "string", bool: "boolean", type(None): "null"}.get(type(value), "number")
