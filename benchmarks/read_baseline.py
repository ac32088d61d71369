"""The rollout table as a plain script would make it: `json.loads`, dicts, one process. The baseline of `read.py`.

Run as: python benchmarks/read_baseline.py ROLLOUTS.jsonl [...] --out TABLE.parquet

It is given any bytes, never stops, and gives every line the verdict and reason that gymtrl gives, and the same columns,
with keys of its own: equal where gymtrl's are equal, different where those differ. In it are the limits of lines, tools
and arguments, what no JSON or UTF-8 can hold (NaN, lone surrogates), plain chats, rows of any shape, and the proof that
the items can be rebuilt from the messages. Left out are details in words, clusters that a user names, and memory that
does not grow with the table or a long line. Where a row is nested so deeply, or holds an integer so long, that Python's
parser gives up, that parser's limit counts, also for values that nobody reads.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import re
from collections.abc import Iterable
from itertools import count, pairwise
from pathlib import Path
from typing import Any, NoReturn

import polars as pl

Row = dict[str, Any]

COLUMNS = (
    ("file", pl.String),
    ("line offset length", pl.Int64),
    ("row_id verdict reason detail task_key input_key cluster_key completion_key group", pl.String),
    ("task_index repeat", pl.Int64),
    ("agent environment model", pl.String),
    ("reward", pl.Float64),
    ("turns tool_calls", pl.Int64),
    ("tools", pl.List(pl.String)),
    ("prompt_chars completion_chars input_tokens output_tokens recorded_tokens", pl.Int64),
    ("truncated masked", pl.Boolean),
    ("fault", pl.String),
    ("flags", pl.List(pl.String)),
)
SCHEMA = {name: kind for names, kind in COLUMNS for name in names.split()}
MAX_LINE_BYTES = 64_000_000
MAX_DEPTH = 100
HIDDEN_CONTEXT_TOKENS = 500
SIDECAR_ROWS = ("materialized_input", "reward_profile")
PROMPT_ROLES = ("system", "developer", "user")
SHOWN = {"message": "content", "function_call_output": "output"}
TEXT_PARTS = ("input_text", "output_text", "text")
SAMPLING = """
    background frequency_penalty include max_output_tokens max_tool_calls min_p model n parallel_tool_calls
    presence_penalty reasoning repetition_penalty seed service_tier stop store stream temperature top_k top_logprobs
    top_p truncation user
""".split()  # noqa: SIM905
THINK_TAGS = re.compile("</?think>")


class Reject(Exception):
    """The row is no conversation; the argument is the reason."""


def baseline_table(paths: Iterable[Path], *, max_line_bytes: int = MAX_LINE_BYTES) -> pl.DataFrame:
    """The table of rollout files: one row a line that is not blank."""
    rows = []
    for path in paths:
        inputs = input_keys(path)
        offset = 0
        with open(path, "rb") as stream:
            for number, raw in enumerate(stream, 1):
                data = raw.rstrip(b"\r\n")
                too_long = len(data) > max_line_bytes
                if too_long or data.strip():
                    row = {"file": str(path), "line": number, "offset": offset, "length": len(data)}
                    row["row_id"] = hashlib.sha256(data).hexdigest()[:16]
                    found = no_rollout("reject", "line_too_long") if too_long else read_line(data, str(path), inputs)
                    rows.append(row | found)
                offset += len(raw)
    components = sorted({name for row in rows for name in row if name.startswith("reward_")})
    schema = SCHEMA | dict.fromkeys(components, pl.Float64)
    table = pl.DataFrame({name: [row.get(name) for row in rows] for name in schema}, schema=schema)
    differs = pl.col("group").is_not_null() & (pl.col("task_key").n_unique().over("group") > 1)
    return table.with_columns(
        flags=pl.when(differs).then(pl.concat_list("flags", pl.lit("prompt_differs")).list.sort()).otherwise("flags"),
        group=pl.when(~differs).then("group"),
    )


def input_keys(path: Path) -> dict[tuple[int, int], str]:
    """Keys of the run's input rows, from the file that Gym writes beside the rollouts."""
    beside = Path(path).with_name(f"{Path(path).stem}_materialized_inputs.jsonl")
    keys = {}
    for line in beside.open("rb") if beside.is_file() else ():
        try:
            row = decode(line)
            if not isinstance(row, dict):
                continue
            kept = {key: value for key, value in row.items() if key != "agent_ref" and not key.startswith("_ng_")}
            request = kept.get("responses_create_params")
            if isinstance(request, dict):
                request = {key: value for key, value in request.items() if value is not None and key not in SAMPLING}
                metadata = request.get("metadata")
                if isinstance(metadata, dict):
                    request["metadata"] = {key: value for key, value in metadata.items() if key != "extra_body"}
                    if not request["metadata"]:
                        del request["metadata"]
                kept["responses_create_params"] = request
            task, repeat = row.get("_ng_task_index"), row.get("_ng_rollout_index")
            if type(task) is int and type(repeat) is int:
                keys[task, repeat] = digest(kept)
        except (ValueError, RecursionError):
            continue
    return keys


def decode(data: bytes) -> Any:
    """One JSON document, as Python's own writer may have written it; other encodings are not guessed."""
    return json.loads(data.decode("utf-8-sig", "surrogatepass"))


def read_line(data: bytes, file: str, inputs: dict[tuple[int, int], str]) -> Row:
    """Verdict, reason and, for a rollout, everything else of one line."""
    try:
        row = decode(data)
    except (ValueError, RecursionError):
        return no_rollout("reject", "malformed_json")
    if not isinstance(row, dict):
        return no_rollout("reject", "not_object")
    kind = kind_of_row(row)
    try:
        if kind == "custom_record" and is_plain_chat(row):
            row = from_plain_chat(row)
        elif kind:
            return no_rollout("skip" if kind in SIDECAR_ROWS else "reject", kind)
        return rollout_columns(row, read_chat(row), file, inputs)
    except Reject as reject:
        return no_rollout("reject", str(reject))
    except RecursionError:  # what could be decoded may still be too deep to be walked through
        return no_rollout("reject", "malformed_json")


def no_rollout(verdict: str, reason: str) -> Row:
    return {"verdict": verdict, "reason": reason, "flags": [], "tools": []}


def kind_of_row(row: Row) -> str:
    """What a row is where it is no rollout."""
    if row.get("_ng_failure_class") is not None:
        return "failure_row"
    asked = isinstance(row.get("responses_create_params"), dict)
    if asked and isinstance(row.get("response"), dict):
        return ""
    if "_ng_result_type" in row or "episode_interaction_protocol" in row:
        return "episode_result"
    if any(key.startswith("mean/") for key in row):
        return "reward_profile"
    if asked and "response" not in row:
        return "materialized_input" if "_ng_rollout_index" in row else "task_only"
    return "custom_record"


def is_plain_chat(row: Row) -> bool:
    messages = row.get("messages")
    return isinstance(messages, list) and bool(messages) and all(isinstance(m, dict) and "role" in m for m in messages)


def from_plain_chat(row: Row) -> Row:
    """A row of chat messages with request and response; calls without an id are numbered, and answered in order.

    So are calls whose id belongs to an earlier call that was answered.
    """
    output: list[Row] = []
    given = set()
    for message in row["messages"]:
        for owner, key in ((message, "tool_call_id"), *((call, "id") for call in message_calls(message))):
            if isinstance(owner, dict) and is_text(owner.get(key)):
                given.add(owner[key])
    numbers = (f"call_{number}" for number in count() if f"call_{number}" not in given)
    seen: set[str] = set()
    open_calls: Row = {}
    for message in row["messages"]:
        content = message.get("content")
        if isinstance(content, list):
            content = [
                part | {"type": "input_image"} if isinstance(part, dict) and part.get("type") == "image_url" else part
                for part in content
            ]
        if message["role"] == "tool":
            answered = message.get("tool_call_id") or next(iter(open_calls), None)
            if is_text(answered) and answered in open_calls:
                answered = open_calls.pop(answered)
            output.append({"type": "function_call_output", "call_id": answered, "output": content})
            continue
        thoughts = message.get("reasoning_content") or message.get("reasoning")
        calls = message_calls(message)
        if message.get("audio") or message.get("refusal"):
            content = content if isinstance(content, list) else [{"type": "text", "text": content}] if content else []
            content = content + ([{"type": "input_audio"}] if message.get("audio") else [])
            content = content + ([{"type": "refusal"}] if message.get("refusal") else [])
        if thoughts:
            output.append({"type": "reasoning", "summary": [{"text": thoughts}]})
        if content or not (calls or thoughts):
            output.append({"type": "message", "role": message["role"], "content": content})
        for call in calls:
            if not isinstance(call, dict):
                output.append({"type": "tool_call"})
                continue
            call_id = call.get("id")
            name = call_id
            if not call_id or (is_text(call_id) and call_id in seen and call_id not in open_calls):
                name = next(numbers)
                call_id = call_id or name
            function = call["function"] if isinstance(call.get("function"), dict) else call
            arguments = function.get("arguments")
            if isinstance(arguments, dict):
                arguments = json.dumps(arguments, ensure_ascii=False)
            item = {"type": "function_call", "call_id": name, "name": function.get("name"), "arguments": arguments}
            output.append(item)
            if is_text(call_id):
                seen.add(call_id)
                open_calls[call_id] = name
    usage = row.get("usage")
    if isinstance(usage, dict):
        for old, new in (("prompt_tokens", "input_tokens"), ("completion_tokens", "output_tokens")):
            if old in usage and new not in usage:
                usage = usage | {new: usage[old]}
    response = {"output": output, "model": row.get("model"), "usage": usage}
    return row | {"responses_create_params": {"tools": row.get("tools")}, "response": response}


def message_calls(message: Row) -> list[Any]:
    """The calls of a chat message; anything else in their place is there to be refused."""
    calls = message.get("tool_calls")
    if not isinstance(calls, list):
        calls = [] if calls is None else [None]
    return calls + ([None] if message.get("function_call") else [])


def read_chat(row: Row) -> Row:
    """Prompt, completion and tools of a rollout, as lists of plain dicts."""
    request, response = row["responses_create_params"], row["response"]
    output = flat_output(response.get("output"))
    given = request.get("input")
    refuse_audio(request, [*(given if isinstance(given, list) else []), *output])
    asked = []
    if isinstance(request.get("instructions"), str) and request["instructions"]:
        asked.append({"role": "system", "content": request["instructions"]})
    if isinstance(given, str):
        asked.append({"role": "user", "content": given})
    elif given is not None:
        asked += given if isinstance(given, list) else [given]
    cut = 0
    while cut < len(output) and item_kind(output[cut]) == "message" and output[cut].get("role") in PROMPT_ROLES:
        cut += 1
    if not asked and not cut:
        raise Reject("no_prompt")
    if not any(is_policy(item_kind(item), item) for item in output[cut:]):
        raise Reject("no_assistant_turn")
    check_items([*asked, *output])
    before = [parse_item(item) for item in asked + output[:cut]]
    said = [parse_item(item) for item in output[cut:]]
    calls = check_calls(before + said)
    check_turns(said)
    prompt = [message for message in fold(before, calls) if not is_empty(message)]
    completion = fold(said, calls)
    if any(is_empty(message) for message in completion):
        raise Reject("empty_assistant")
    check_round_trip(before, prompt)
    check_round_trip(said, completion)
    offered = read_tools(request.get("tools"))
    called = {call["name"] for call in calls.values()}
    # Where the request declares all that is called, its echo in the response adds nothing.
    needed = not offered["declared"] or not called <= offered["names"]
    echoed = read_tools(response.get("tools")) if needed else read_tools(None)
    used = offered if offered["declared"] else echoed
    flags = set()
    if any(item["kind"] == "reasoning" and not item["text"] for item in said):
        flags.add("reasoning_hidden")
    if used["odd"]:
        flags.add("tool_not_function")
    return {
        "prompt": prompt,
        "completion": completion,
        "tools": used["functions"],
        "declared": used["declared"],
        "tool_names": offered["names"] | echoed["names"],
        "head": output[:cut],
        "flags": flags,
    }


def flat_output(output: Any) -> list[Any]:
    """The output items; of cumulative transitions the last list."""
    if not isinstance(output, list) or not output:
        raise Reject("empty_output")
    if not any(isinstance(item, list) for item in output):
        return output
    if not all(isinstance(item, list) for item in output):
        raise Reject("noncumulative_transitions")
    if any(earlier != later[: len(earlier)] for earlier, later in pairwise(output)):
        raise Reject("noncumulative_transitions")
    if not output[-1]:
        raise Reject("empty_output")
    last: list[Any] = output[-1]
    return last


def refuse_audio(request: Row, items: list[Any]) -> None:
    metadata = request.get("metadata")
    if isinstance(metadata, dict) and any(metadata.get(key) for key in ("audio_data", "audio_url", "audio_path")):
        raise Reject("unsupported_modality_audio")
    for item in items:
        kind = item_kind(item)
        content = item.get(SHOWN[kind]) if kind in SHOWN else None
        for part in content if isinstance(content, list) else ():
            if isinstance(part, dict) and part.get("type") == "input_audio":
                raise Reject("unsupported_modality_audio")


def item_kind(item: Any) -> str:
    """The type of an item; a role without a type makes a message."""
    if not isinstance(item, dict):
        return ""
    kind = item.get("type")
    if isinstance(kind, str) and kind:
        return kind
    return "message" if isinstance(item.get("role"), str) else ""


def is_policy(kind: str, item: Row) -> bool:
    return kind in ("reasoning", "function_call") or (kind == "message" and item.get("role") == "assistant")


def check_items(items: list[Any]) -> None:
    """Refuses items and content that a chat has no place for."""
    for item in items:
        kind = item_kind(item)
        if kind == "message" and item.get("role") not in (*PROMPT_ROLES, "assistant"):
            raise Reject(f"unsupported_item_type:{label(item.get('role'))}")
        if kind not in ("message", "reasoning", "function_call", "function_call_output"):
            raise Reject(f"unsupported_item_type:{label(kind or type(item).__name__)}")
    refusal = False
    for item in items:
        kind = item_kind(item)
        if kind == "function_call":
            continue
        if kind == "reasoning":
            for parts in (item.get("summary"), item.get("content")):
                sound = isinstance(parts, list) and all(isinstance(p, dict) and is_text(p.get("text")) for p in parts)
                if parts is not None and not sound:
                    raise Reject("unsupported_content_part")
            continue
        content = item.get("output") if kind == "function_call_output" else item.get("content")
        if content is None or isinstance(content, str):
            continue
        if not isinstance(content, list):
            raise Reject("unsupported_content_part")
        for part in content:
            part_kind = part.get("type") if isinstance(part, dict) else None
            if part_kind in TEXT_PARTS and is_text(part.get("text")):
                continue
            if part_kind == "refusal":
                refusal = True
            elif not (part_kind == "input_image" and not is_policy(kind, item) and image_url(part)):
                raise Reject("unsupported_content_part")
    if refusal:
        raise Reject("refusal_part")


def label(value: Any) -> str:
    """A name from the file, short and harmless."""
    return "".join(c if c.isalnum() or c in "_.-" else "_" for c in str(value))[:40] or "none"


def is_text(value: Any) -> bool:
    return isinstance(value, str)


def image_url(part: Row) -> str:
    url = part.get("image_url")
    url = url.get("url") if isinstance(url, dict) else url
    return url if isinstance(url, str) else ""


def parse_item(item: Row) -> Row:
    """An item that passed `check_items`: its kind, role, text, images with their places in the text, and call."""
    kind = item_kind(item)
    parsed: Row = {"kind": kind, "role": None, "call_id": None, "text": "", "images": [], "offsets": [], "source": item}
    if kind in ("function_call", "function_call_output"):
        parsed["call_id"] = item["call_id"] if is_text(item.get("call_id")) else None
    if kind == "function_call":
        return parsed | {field: item[field] if is_text(item.get(field)) else None for field in ("name", "arguments")}
    if kind == "reasoning":
        parts = [*(item.get("summary") or []), *(item.get("content") or [])]
        return parsed | {"text": "\n\n".join(part["text"] for part in parts if part["text"])}
    if kind == "message":
        parsed["role"] = item["role"]
    content = item.get("output") if kind == "function_call_output" else item.get("content")
    if not isinstance(content, list):
        return parsed | {"text": content or ""}
    for part in content:
        if part["type"] == "input_image":
            parsed["images"].append(image_url(part))
            parsed["offsets"].append(len(parsed["text"]))
        else:
            parsed["text"] += part["text"]
    return parsed


def check_calls(items: list[Row]) -> dict[str, Row]:
    """The calls by id, with parsed arguments; refuses calls and answers that do not belong together."""
    asked = [item for item in items if item["kind"] == "function_call"]
    answers = [item for item in items if item["kind"] == "function_call_output"]
    if not all(item["call_id"] for item in asked + answers):
        raise Reject("missing_call_id")
    if len({item["call_id"] for item in asked}) < len(asked):
        raise Reject("duplicate_call_id")
    calls = {}
    for item in asked:
        arguments = read_arguments(item["arguments"])
        if arguments is None or not item["name"]:
            raise Reject("bad_tool_arguments")
        call = {"id": item["call_id"], "name": item["name"], "arguments": arguments, "raw": item["arguments"]}
        calls[item["call_id"]] = call
    known = set()
    for item in items:
        if item["kind"] == "function_call":
            known.add(item["call_id"])
        elif item["kind"] == "function_call_output" and item["call_id"] not in known:
            raise Reject("orphan_tool_output")
    answered = {item["call_id"] for item in answers}
    if len(answered) < len(answers):
        raise Reject("duplicate_tool_output")
    end = len(items)
    while end and items[end - 1]["kind"] == "function_call":  # nobody has to answer the last calls
        end -= 1
    if any(item["kind"] == "function_call" and item["call_id"] not in answered for item in items[:end]):
        raise Reject("missing_tool_output")
    return calls


def read_arguments(raw: str | None) -> Row | None:
    """The arguments of a call; `None` where they are no object, too deep, or hold what no JSON can."""
    try:
        arguments = json.loads(raw or "", parse_constant=no_constant, parse_float=finite)
    except (ValueError, RecursionError):
        return None
    return arguments if isinstance(arguments, dict) and not is_deep(arguments) else None


def no_constant(name: str) -> NoReturn:
    raise ValueError(name)


def finite(number: str) -> float:
    value = float(number)
    if math.isinf(value):
        raise ValueError(number)
    return value


def is_deep(value: Any, levels: int = MAX_DEPTH) -> bool:
    """Whether a value is nested deeper than that many levels."""
    if not isinstance(value, dict | list):
        return False
    inner = value.values() if isinstance(value, dict) else value
    return levels == 0 or any(is_deep(item, levels - 1) for item in inner)


def check_turns(said: list[Row]) -> None:
    """Refuses several model calls side by side with nothing to tell them apart."""
    spoken, unanswered = False, set()
    for item in said:
        if item["kind"] == "function_call":
            unanswered.add(item["call_id"])
        elif item["kind"] == "function_call_output":
            unanswered.discard(item["call_id"])
            spoken = False
        elif item["role"] in PROMPT_ROLES:
            spoken = False
        elif spoken and not unanswered:
            raise Reject("ambiguous_turns")
        elif item["kind"] == "message":
            spoken = True


def fold(items: list[Row], calls: dict[str, Row]) -> list[Row]:
    """Items → messages: what the policy said in a row is one message."""
    messages: list[Row] = []
    turn: Row | None = None
    for item in items:
        kind = item["kind"]
        if is_policy(kind, item):
            if turn is None:
                turn = {"role": "assistant", "content": "", "thoughts": [], "calls": [], "recorded": []}
                messages.append(turn)
            if kind == "function_call":
                turn["calls"].append(calls[item["call_id"]])
            elif kind == "reasoning":
                turn["thoughts"] += [item["text"]] if item["text"] else []
            else:
                turn["content"] += item["text"]
            if numbers(item["source"].get("generation_token_ids"), int):
                turn["recorded"].append(item["source"])
            continue
        turn = None
        message = {"role": item["role"], "content": item["text"]}
        if kind == "function_call_output":
            call = calls[item["call_id"]]
            message = {"role": "tool", "content": item["text"], "tool_call_id": call["id"], "name": call["name"]}
        if item["images"]:
            message |= {"images": item["images"], "offsets": item["offsets"]}
        messages.append(message)
    return messages


def is_empty(message: Row) -> bool:
    said = message["content"] or message.get("thoughts") or message.get("calls")
    return message["role"] == "assistant" and not said


def check_round_trip(items: list[Row], messages: list[Row]) -> None:
    """Proves that the messages give the items back, and that they can be written."""
    rebuilt = [parse_item(item) for message in messages for item in rebuild_items(message)]
    if essence(rebuilt) != essence(items):
        raise Reject("roundtrip_mismatch")
    for message in messages:
        texts = [message["content"], *message.get("thoughts", ()), *message.get("images", ())]
        texts.append(message.get("tool_call_id", ""))
        for call in message.get("calls", ()):
            texts += [call["id"], call["name"], call["raw"]]
            if "\\u" in call["raw"]:  # an escape may hide a surrogate
                texts.append(json.dumps(call["arguments"], ensure_ascii=False))
        try:
            "\n".join(texts).encode()
        except UnicodeEncodeError:
            raise Reject("roundtrip_mismatch") from None


def rebuild_items(message: Row) -> list[Row]:
    """The items of a message."""
    if message["role"] == "assistant":
        items: list[Row] = []
        if message["thoughts"]:
            items.append({"type": "reasoning", "summary": [{"text": "\n\n".join(message["thoughts"])}]})
        if message["content"]:
            content = [{"type": "output_text", "text": message["content"]}]
            items.append({"type": "message", "role": "assistant", "content": content})
        for call in message["calls"]:
            call = {"call_id": call["id"], "name": call["name"], "arguments": call["raw"]}
            items.append({"type": "function_call", **call})
        return items
    content, start = [], 0
    for image, offset in zip(message.get("images", ()), message.get("offsets", ()), strict=True):
        if offset > start:
            content.append({"type": "input_text", "text": message["content"][start:offset]})
        content.append({"type": "input_image", "image_url": image})
        start = offset
    content.append({"type": "input_text", "text": message["content"][start:]})
    if message["role"] == "tool":
        return [{"type": "function_call_output", "call_id": message["tool_call_id"], "output": content}]
    return [{"type": "message", "role": message["role"], "content": content}]


def essence(items: list[Row]) -> list[Any]:
    """Items without the order inside a turn, without empty ones of the policy, ids and status."""
    found: list[Any] = []
    turn: Row | None = None
    for item in items:
        if not is_policy(item["kind"], item):
            found.append([item[field] for field in ("kind", "role", "call_id", "text", "images", "offsets")])
            turn = None
            continue
        if item["kind"] != "function_call" and not item["text"]:
            continue
        if turn is None:
            turn = {"reasoning": "", "message": "", "function_call": []}
            found.append(turn)
        if item["kind"] == "function_call":
            turn["function_call"].append([item["call_id"], item["name"], item["arguments"]])
        elif item["kind"] == "reasoning" and turn["reasoning"]:
            turn["reasoning"] += "\n\n" + item["text"]
        else:
            turn[item["kind"]] += item["text"]
    return found


def read_tools(declared: Any) -> Row:
    """What a list declares: its functions, every name, and whether there is something else in it."""
    declared = declared if isinstance(declared, list) else []
    functions, odd = [], False
    names = set()
    for tool in declared:
        function = tool["function"] if isinstance(tool, dict) and isinstance(tool.get("function"), dict) else tool
        for named in (tool, function):
            if isinstance(named, dict) and is_text(named.get("name")):
                names.add(named["name"])
        if (
            not isinstance(function, dict)
            or not is_text(function.get("name"))
            or tool.get("type", "function") != "function"
        ):
            odd = True
            continue
        fields = ("name", "description", "parameters")
        kept = {field: function[field] for field in fields if function.get(field) is not None}
        functions.append({"type": "function", "function": kept})
    if is_deep(functions) or is_deep(declared):
        raise Reject("malformed_json")
    try:
        json.dumps(functions, ensure_ascii=False, allow_nan=False).encode()
    except ValueError:  # a lone surrogate, NaN or infinity
        raise Reject("roundtrip_mismatch") from None
    return {"declared": declared, "functions": functions, "names": names, "odd": odd}


def rollout_columns(row: Row, chat: Row, file: str, inputs: dict[tuple[int, int], str]) -> Row:
    """The columns of a rollout."""
    request, response = row["responses_create_params"], row["response"]
    prompt, completion = chat["prompt"], chat["completion"]
    turns = [message for message in completion if message["role"] == "assistant"]
    agent, environment = name_of(row.get("agent_ref")), name_of(row.get("_ng_environment_server"))
    task_index, repeat = whole(row.get("_ng_task_index")), whole(row.get("_ng_rollout_index"))
    task_key = digest([environment or agent, [plain(message) for message in prompt], chat["tools"]])
    input_key = inputs.get((task_index, repeat)) if task_index is not None and repeat is not None else None
    usage = response["usage"] if isinstance(response.get("usage"), dict) else {}
    input_tokens = whole(usage.get("input_tokens"))
    reason = context_reason(request, chat, len(turns), input_tokens)
    reward, recorded = row.get("reward"), recorded_tokens(turns)
    flags = set(chat["flags"])
    if any(message["role"] == "developer" for message in prompt + completion):
        flags.add("developer_role")
    if any("<think>" in turn["content"] or "</think>" in turn["content"] for turn in turns):
        flags.add("think_in_content")
    if recorded is None and any(turn["recorded"] for turn in turns):
        flags.add("token_ids_partial")
    if reward is not None and not isinstance(reward, int | float):
        flags.add("reward_not_a_number")
    components = row["reward_components"] if isinstance(row.get("reward_components"), dict) else {}
    return {
        "verdict": "context" if reason else "ok",
        "reason": reason,
        "task_key": task_key,
        "input_key": input_key,
        "cluster_key": input_key or task_key,
        "completion_key": digest([[plain(m), [call["raw"] for call in m.get("calls", ())]] for m in completion]),
        "group": digest([file, environment or agent, task_key if task_index is None else task_index])[:16],
        "task_index": task_index,
        "repeat": repeat,
        "agent": agent,
        "environment": environment,
        "model": name_of(response.get("model")),
        "reward": number(reward),
        "turns": len(turns),
        "tool_calls": sum(len(turn["calls"]) for turn in turns),
        "tools": sorted({call["name"] for turn in turns for call in turn["calls"]}),
        "prompt_chars": characters(prompt),
        "completion_chars": characters(completion),
        "input_tokens": input_tokens,
        "output_tokens": whole(usage.get("output_tokens")),
        "recorded_tokens": recorded,
        "truncated": response.get("status") == "incomplete" or bool(response.get("incomplete_details")),
        "masked": row.get("mask_sample") is True,
        "fault": fault(turns),
        "flags": sorted(flags),
        **{f"reward_{utf8(k)}": number(part) for k, part in components.items() if isinstance(part, int | float)},
    }


def context_reason(request: Row, chat: Row, turns: int, counted: int | None) -> str:
    """The sign that the model saw more than the row holds, or `""`."""
    messages = chat["prompt"] + chat["completion"]
    if {call["name"] for message in messages for call in message.get("calls", ())} - chat["tool_names"]:
        return "tools_undeclared"
    if counted is None or counted <= HIDDEN_CONTEXT_TOKENS or turns != 1:
        return ""
    if any(message.get("images") for message in messages):
        return ""
    if counted <= HIDDEN_CONTEXT_TOKENS + sum(len(message["content"]) for message in chat["prompt"]):
        return ""  # written as JSON, the text is no shorter
    shown = [request.get("input"), chat["declared"], *chat["head"]]
    shown += [request["instructions"]] if request.get("instructions") and is_text(request["instructions"]) else []
    visible = sum(len(json.dumps(value, ensure_ascii=False)) for value in shown)
    return "hidden_context" if counted > visible + HIDDEN_CONTEXT_TOKENS else ""


def recorded_tokens(turns: list[Row]) -> int | None:
    """Generated tokens that the row records, where every turn has a whole record."""
    total = 0
    for turn in turns:
        if len(turn["recorded"]) != 1:
            return None
        item = turn["recorded"][0]
        logs = numbers(item.get("generation_log_probs"), int, float)
        if not numbers(item.get("prompt_token_ids"), int) or len(logs) != len(item["generation_token_ids"]):
            return None
        total += len(logs)
    return total


def numbers(values: Any, *kinds: type) -> list[Any]:
    """A list of such numbers; none where anything else is in it."""
    return values if isinstance(values, list) and all(type(value) in kinds for value in values) else []


def fault(turns: list[Row]) -> str | None:
    """What is wrong with a completion as such."""
    if not turns[-1]["calls"] and not turns[-1]["content"].rpartition("</think>")[2].strip():
        return "ends_in_reasoning"
    for turn in turns:
        tags = THINK_TAGS.findall(turn["content"])
        if len(tags) % 2 or tags != ["<think>", "</think>"] * (len(tags) // 2):
            return "unbalanced_think"
    return None


def plain(message: Row) -> Row:
    """A message as keys see it: without call ids."""
    kept = {key: message[key] for key in ("role", "content", "images", "offsets", "name") if key in message}
    if message.get("thoughts"):
        kept["reasoning_content"] = "\n\n".join(message["thoughts"])
    if message.get("calls"):
        kept["tool_calls"] = [{"name": call["name"], "arguments": call["arguments"]} for call in message["calls"]]
    return kept


def chat_message(message: Row) -> Row:
    """A message as chat templates take it."""
    kept = plain(message)
    if images := kept.pop("images", None):
        cuts = [0, *kept.pop("offsets"), len(message["content"])]
        kept["content"] = []
        for number in range(len(images) + 1):
            text = message["content"][cuts[number] : cuts[number + 1]]
            kept["content"] += [{"type": "image"}] if number else []
            kept["content"] += [{"type": "text", "text": text}] if text else []
    if message.get("calls"):
        kept["tool_calls"] = [
            {"id": call["id"], "type": "function", "function": {"name": call["name"], "arguments": call["arguments"]}}
            for call in message["calls"]
        ]
    if "tool_call_id" in message:
        kept["tool_call_id"] = message["tool_call_id"]
    return kept


def characters(messages: list[Row]) -> int:
    """Characters of text, reasoning and call arguments."""
    total = 0
    for message in messages:
        total += len(message["content"])
        total += len("\n\n".join(message.get("thoughts", ())))
        total += sum(len(call["raw"]) for call in message.get("calls", ()))
    return total


def name_of(value: Any) -> str | None:
    """A name given as such or as a reference with a name."""
    name = value.get("name") if isinstance(value, dict) else value
    return utf8(name) if isinstance(name, str) and name else None


def utf8(text: str) -> str:
    """A text that a table can hold."""
    return text.encode("utf-8", "replace").decode()


def whole(value: Any) -> int | None:
    """An integer that a column can hold."""
    return value if type(value) is int and -(2**63) <= value < 2**63 else None


def number(value: Any) -> float | None:
    """A number as a double; what is beyond its range is infinite."""
    try:
        return float(value) if isinstance(value, int | float) else None
    except OverflowError:
        return math.inf if value > 0 else -math.inf


def digest(value: Any) -> str:
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


def main() -> None:
    """Writes the table of the files that are named."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("files", type=Path, nargs="+", help="rollout files")
    parser.add_argument("--out", type=Path, required=True, help="Parquet file to write")
    options = parser.parse_args()
    table = baseline_table(options.files)
    table.write_parquet(options.out)
    print(table.group_by("verdict").len().sort("verdict"))


if __name__ == "__main__":
    main()
