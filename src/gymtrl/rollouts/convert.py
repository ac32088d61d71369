"""One decoded row → its verdict and, where it is a conversation, its record."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from .codec import TOO_DEEP, is_deep, to_float, to_utf8
from .items import Refused
from .keys import named_cluster, task_key
from .messages import Conversation, read_conversation
from .record import Line, Message, Origin, Rollout, Sampling
from .sidecars import Sidecar

# By how much the counted prompt tokens may exceed the characters that the row shows: chat templates and default system
# prompts add a few hundred at most, and a token is rarely less than a character.
HIDDEN_CONTEXT_TOKENS = 500


def convert(row: Any, origin: Origin, sidecar: Sidecar, cluster: str | None) -> Line:
    """Gives a decoded row its verdict.

    Args:
        row: The decoded JSON value.
        origin (`Origin`): Where it stands.
        sidecar (`Sidecar`): Input rows of the run.
        cluster (`str`, *optional*): Dotted path to what a split must not tear apart.

    Returns:
        `Line`: With the rollout for `ok` and `context`.
    """
    if not isinstance(row, dict):
        return Line(origin, "reject", "not_object", f"a JSON {_json_type(row)}, not an object")
    kind = _kind(row)
    if kind in ("materialized_input", "reward_profile"):
        return Line(origin, "skip", kind, "a row of a file that Gym writes beside the rollouts")
    if kind:
        return Line(origin, "reject", kind, _KIND_DETAIL[kind].format(keys=", ".join(list(map(str, row))[:5])))
    request, response = row["responses_create_params"], row["response"]
    try:
        conversation = read_conversation(request, response)
        tools, tool_flags = _tools(request, response)
    except Refused as refused:
        return Line(origin, "reject", refused.reason, refused.detail)
    rollout = _rollout(row, origin, conversation, tools, tool_flags, sidecar, cluster)
    reason, detail = _context(conversation, tools, request, response, rollout)
    return Line(origin, "context" if reason else "ok", reason, detail, rollout)


_KIND_DETAIL = {
    "failure_row": "an attempt that failed before it became a rollout (_ng_failure_class)",
    "episode_result": "the result of an episode, without the chat",
    "task_only": "a task that nobody has answered: no response",
    "custom_record": "neither request nor response; its keys begin with: {keys}",
}


def _kind(row: dict[str, Any]) -> str:
    """What a row is where it is no rollout, `""` where it is one."""
    if row.get("_ng_failure_class") is not None:
        return "failure_row"
    asked = isinstance(row.get("responses_create_params"), dict)
    if asked and isinstance(row.get("response"), dict):
        return ""
    if "_ng_result_type" in row or "episode_interaction_protocol" in row:
        return "episode_result"
    if any(key.startswith("mean/") for key in row):
        return "reward_profile"
    if asked:
        return "materialized_input" if "_ng_rollout_index" in row else "task_only"
    return "custom_record"


def _rollout(
    row: dict[str, Any],
    origin: Origin,
    conversation: Conversation,
    tools: tuple[dict[str, Any], ...],
    tool_flags: frozenset[str],
    sidecar: Sidecar,
    cluster: str | None,
) -> Rollout:
    response = row["response"]
    flags = set(conversation.flags | tool_flags)
    if "token_ids" in flags and not conversation.recorded:
        flags.add("token_ids_partial")
    flags.discard("token_ids")
    agent = _name(row.get("agent_ref"))
    environment = _name(row.get("_ng_environment_server"))
    task_index, rollout_index = _integer(row.get("_ng_task_index")), _integer(row.get("_ng_rollout_index"))
    asked = sidecar.find(task_index, rollout_index)
    task = task_key(environment or agent, conversation.prompt, tools)
    input_key = asked.input_key if asked else None
    cluster_key = input_key or task
    if cluster is not None:
        named = named_cluster(cluster, row, None)
        if named is None and asked is not None:
            named = asked.cluster_key
        if named is None:
            flags.add("cluster_missing")
        cluster_key = named or cluster_key
    reward, odd_reward = _reward(row.get("reward"))
    if odd_reward:
        flags.add("reward_not_a_number")
    usage = response.get("usage") if isinstance(response.get("usage"), dict) else {}
    return Rollout(
        origin=origin,
        prompt=conversation.prompt,
        completion=conversation.completion,
        tools=tools,
        reward=reward,
        task_key=task,
        input_key=input_key,
        cluster_key=cluster_key,
        agent=agent,
        environment=environment,
        model=_name(response.get("model")),
        task_index=task_index,
        rollout_index=rollout_index,
        turns=sum(message.role == "assistant" for message in conversation.completion),
        n_tool_calls=sum(len(message.tool_calls) for message in conversation.completion),
        truncated=response.get("status") == "incomplete" or bool(response.get("incomplete_details")),
        masked=row.get("mask_sample") is True,
        input_tokens=_integer(usage.get("input_tokens")),
        output_tokens=_integer(usage.get("output_tokens")),
        flags=tuple(sorted(flags)),
        recorded=conversation.recorded,
        sampling=_sampling(row["responses_create_params"]),
        reward_components=_components(row.get("reward_components")),
    )


def _tools(request: dict[str, Any], response: dict[str, Any]) -> tuple[tuple[dict[str, Any], ...], frozenset[str]]:
    """Declared tools as chat templates take them; others than functions are flagged, since no template shows them."""
    declared = request.get("tools") or response.get("tools") or []
    tools = []
    flags = set()
    for tool in declared if isinstance(declared, list) else []:
        inner = tool.get("function") if isinstance(tool, dict) else None
        function = inner if isinstance(inner, dict) else tool
        if (
            not isinstance(function, dict)
            or tool.get("type", "function") != "function"
            or not isinstance(function.get("name"), str)
        ):
            flags.add("tool_not_function")
            continue
        fields = ("name", "description", "parameters")
        kept = {field: function[field] for field in fields if function.get(field) is not None}
        tools.append({"type": "function", "function": kept})
    if is_deep(tools):
        raise Refused("malformed_json", TOO_DEEP)
    try:
        json.dumps(tools, ensure_ascii=False, allow_nan=False).encode()
    except UnicodeEncodeError:
        raise Refused("roundtrip_mismatch", "a lone surrogate in a tool, which no UTF-8 text can hold") from None
    except ValueError:
        raise Refused("roundtrip_mismatch", "NaN or infinity in a tool, which no JSON can hold") from None
    return tuple(tools), frozenset(flags)


def _context(
    conversation: Conversation,
    tools: Sequence[dict[str, Any]],
    request: dict[str, Any],
    response: dict[str, Any],
    rollout: Rollout,
) -> tuple[str, str]:
    """The sign that the model saw more than the row holds, with its words, or two empty strings."""
    declared = {tool["function"]["name"] for tool in tools} | _names(request) | _names(response)
    messages = (*conversation.prompt, *conversation.completion)
    undeclared = sorted({call.name for message in messages for call in message.tool_calls} - declared)
    if undeclared:
        return "tools_undeclared", f"calls of tools that no list declares: {', '.join(undeclared[:5])}"
    counted = rollout.input_tokens
    if counted is None or counted <= HIDDEN_CONTEXT_TOKENS or rollout.turns != 1 or _has_image(messages):
        return "", ""
    # The JSON is never shorter than the text in it, so most rows are settled without writing it.
    if counted <= HIDDEN_CONTEXT_TOKENS + sum(len(message.content) for message in conversation.prompt):
        return "", ""
    visible = _json_length(request.get("input"))
    visible += _json_length(request["instructions"]) if request.get("instructions") else 0
    visible += _json_length(request.get("tools") or response.get("tools") or [])
    visible += sum(_json_length(item) for item in conversation.head)
    if counted > visible + HIDDEN_CONTEXT_TOKENS:
        return "hidden_context", f"{counted} prompt tokens were counted, the row shows {visible} characters"
    return "", ""


def _names(params: dict[str, Any]) -> set[str]:
    tools = params.get("tools")
    return {str(tool.get("name")) for tool in tools if isinstance(tool, dict)} if isinstance(tools, list) else set()


def _has_image(messages: Sequence[Message]) -> bool:
    return any(message.images for message in messages)


def _json_length(value: Any) -> int:
    return len(json.dumps(value, ensure_ascii=False))


def _sampling(request: dict[str, Any]) -> Sampling:
    temperature, top_p = (_number(request.get(name)) for name in ("temperature", "top_p"))
    return Sampling(temperature, top_p, _integer(request.get("max_output_tokens")))


def _number(value: Any) -> float | None:
    return to_float(value) if isinstance(value, int | float) and not isinstance(value, bool) else None


def _reward(value: Any) -> tuple[float | None, bool]:
    """The reward, and whether there is something that is none."""
    return (to_float(value), False) if isinstance(value, bool | int | float) else (None, value is not None)


def _components(value: Any) -> dict[str, float]:
    parts = value.items() if isinstance(value, dict) else ()
    return {to_utf8(name): to_float(part) for name, part in parts if isinstance(part, bool | int | float)}


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
