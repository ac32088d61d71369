"""The rollout table as a short script would make it: `json.loads`, plain dicts, one process. The baseline of `read.py`.

Run as: python benchmarks/read_baseline.py ROLLOUTS.jsonl [...] --out TABLE.parquet

It gives the same verdict and reason to every line and fills the same columns, with keys of its own: they are equal
where gymtrl's are equal, and different where those differ. Left out, since the table does not need it or no ordinary
file shows it: details in words, the proof that the messages can be turned back into the items, where images stand in a
text, lone surrogates, depth limits, line limits, clusters named by the user.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import re
from collections.abc import Iterable
from itertools import pairwise
from pathlib import Path
from typing import Any

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
HIDDEN_CONTEXT_TOKENS = 500
SAMPLING = """
    background frequency_penalty include max_output_tokens max_tool_calls min_p model n parallel_tool_calls
    presence_penalty reasoning repetition_penalty seed service_tier stop store stream temperature top_k top_logprobs
    top_p truncation user
""".split()  # noqa: SIM905
THINK_TAGS = re.compile("</?think>")


class Reject(Exception):
    """The row is no conversation; the argument is the reason."""


def baseline_table(paths: Iterable[Path]) -> pl.DataFrame:
    """The table of rollout files: one row a line that is not blank."""
    rows = []
    for path in paths:
        inputs = input_keys(path)
        offset = 0
        with open(path, "rb") as stream:
            for number, raw in enumerate(stream, 1):
                data = raw.rstrip(b"\r\n")
                if data.strip():
                    row = {"file": str(path), "line": number, "offset": offset, "length": len(data)}
                    row["row_id"] = hashlib.sha256(data).hexdigest()[:16]
                    rows.append(row | read_line(data, str(path), inputs))
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
            row = json.loads(line)
        except ValueError:
            continue
        if not isinstance(row, dict) or not isinstance(row.get("_ng_task_index"), int):
            continue
        kept = {key: value for key, value in row.items() if key != "agent_ref" and not key.startswith("_ng_")}
        request = kept.get("responses_create_params")
        if isinstance(request, dict):
            request = {key: value for key, value in request.items() if value is not None and key not in SAMPLING}
            metadata = {key: value for key, value in (request.pop("metadata", {})).items() if key != "extra_body"}
            kept["responses_create_params"] = request | ({"metadata": metadata} if metadata else {})
        keys[row["_ng_task_index"], row.get("_ng_rollout_index")] = digest(kept)
    return keys


def read_line(data: bytes, file: str, inputs: dict[tuple[int, int], str]) -> Row:
    """Verdict, reason and, for a rollout, everything else of one line."""
    try:
        row = json.loads(data)
    except ValueError:
        return no_rollout("reject", "malformed_json")
    if not isinstance(row, dict):
        return no_rollout("reject", "not_object")
    kind = kind_of_row(row)
    if kind:
        return no_rollout("skip" if kind in ("materialized_input", "reward_profile") else "reject", kind)
    try:
        chat = read_chat(row)
    except Reject as reject:
        return no_rollout("reject", str(reject))
    return rollout_columns(row, chat, file, inputs)


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
    if asked:
        return "materialized_input" if "_ng_rollout_index" in row else "task_only"
    return "custom_record"


def read_chat(row: Row) -> Row:
    """Prompt, completion and tools of a rollout, as lists of plain dicts."""
    request, response = row["responses_create_params"], row["response"]
    output = flat_output(response.get("output"))
    given = request.get("input")
    refuse_audio(request, [*(given if isinstance(given, list) else []), *output])
    before = [{"role": "system", "content": request["instructions"]}] if request.get("instructions") else []
    if isinstance(given, str):
        before.append({"role": "user", "content": given})
    else:
        before += given or []
    cut = 0
    while cut < len(output) and item_role(output[cut]) in ("system", "developer", "user"):
        cut += 1
    head, said = output[:cut], output[cut:]
    before += head
    if not before:
        raise Reject("no_prompt")
    if not any(is_policy(item) for item in said):
        raise Reject("no_assistant_turn")
    check_items([*before, *said])
    calls = check_calls([*before, *said])
    check_turns(said)
    prompt = [message for message in fold(before, calls) if not is_empty(message)]
    completion = fold(said, calls)
    if any(is_empty(message) for message in completion):
        raise Reject("empty_assistant")
    tools, odd_tool = read_tools(request, response)
    hidden = any(item_kind(item) == "reasoning" and not item_text(item)[0] for item in said)
    flags = {"reasoning_hidden"} if hidden else set()
    if odd_tool:
        flags.add("tool_not_function")
    return {"prompt": prompt, "completion": completion, "tools": tools, "head": head, "flags": flags}


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
    metadata = request.get("metadata") or {}
    if any(metadata.get(key) for key in ("audio_data", "audio_url", "audio_path")):
        raise Reject("unsupported_modality_audio")
    for item in items:
        content = item.get("content") if isinstance(item, dict) else None
        if isinstance(content, list) and any(part.get("type") == "input_audio" for part in content):
            raise Reject("unsupported_modality_audio")


def item_kind(item: Any) -> str:
    if not isinstance(item, dict):
        return ""
    return item.get("type") or ("message" if "role" in item else "")


def item_role(item: Any) -> str:
    """The role of a message; of other items none."""
    return item.get("role", "") if item_kind(item) == "message" else ""


def is_policy(item: Any) -> bool:
    return item_kind(item) in ("reasoning", "function_call") or item_role(item) == "assistant"


def check_items(items: list[Any]) -> None:
    """Refuses items and content that a chat has no place for."""
    for item in items:
        kind = item_kind(item)
        if kind == "message" and item.get("role") not in ("system", "developer", "user", "assistant"):
            raise Reject(f"unsupported_item_type:{item.get('role')}")
        if kind not in ("message", "reasoning", "function_call", "function_call_output"):
            raise Reject(f"unsupported_item_type:{kind or type(item).__name__}")
    refusal = False
    for item in items:
        kind = item_kind(item)
        if kind == "function_call":
            continue
        if kind == "reasoning":
            parts = [*(item.get("summary") or []), *(item.get("content") or [])]
            if not all(isinstance(part.get("text"), str) for part in parts):
                raise Reject("unsupported_content_part")
            continue
        content = item.get("output") if kind == "function_call_output" else item.get("content")
        if content is None or isinstance(content, str):
            continue
        if not isinstance(content, list):
            raise Reject("unsupported_content_part")
        for part in content:
            part_kind = part.get("type") if isinstance(part, dict) else None
            if part_kind in ("input_text", "output_text", "text") and isinstance(part.get("text"), str):
                continue
            if part_kind == "refusal":
                refusal = True
            elif not (part_kind == "input_image" and item.get("role") != "assistant" and image_url(part)):
                raise Reject("unsupported_content_part")
    if refusal:
        raise Reject("refusal_part")


def image_url(part: Row) -> Any:
    url = part.get("image_url")
    return url.get("url") if isinstance(url, dict) else url


def check_calls(items: list[Row]) -> dict[str, Row]:
    """The calls by id, with parsed arguments; refuses calls and answers that do not belong together."""
    asked = [item for item in items if item_kind(item) == "function_call"]
    answers = [item for item in items if item_kind(item) == "function_call_output"]
    if not all(item.get("call_id") for item in asked + answers):
        raise Reject("missing_call_id")
    if len({item["call_id"] for item in asked}) < len(asked):
        raise Reject("duplicate_call_id")
    calls = {}
    for item in asked:
        try:
            arguments = json.loads(item["arguments"])
        except (ValueError, TypeError, KeyError):
            arguments = None
        if not isinstance(arguments, dict) or not item.get("name"):
            raise Reject("bad_tool_arguments")
        calls[item["call_id"]] = {"name": item["name"], "arguments": arguments, "chars": len(item["arguments"])}
    known = set()
    for item in items:
        if item_kind(item) == "function_call":
            known.add(item["call_id"])
        elif item_kind(item) == "function_call_output" and item["call_id"] not in known:
            raise Reject("orphan_tool_output")
    answered = {item["call_id"] for item in answers}
    if len(answered) < len(answers):
        raise Reject("duplicate_tool_output")
    end = len(items)
    while end and item_kind(items[end - 1]) == "function_call":  # nobody has to answer the last calls
        end -= 1
    if any(item_kind(item) == "function_call" and item["call_id"] not in answered for item in items[:end]):
        raise Reject("missing_tool_output")
    return calls


def check_turns(said: list[Row]) -> None:
    """Refuses several model calls side by side with nothing to tell them apart."""
    spoken, unanswered = False, set()
    for item in said:
        kind = item_kind(item)
        if kind == "function_call":
            unanswered.add(item["call_id"])
        elif kind == "function_call_output":
            unanswered.discard(item["call_id"])
            spoken = False
        elif not is_policy(item):
            spoken = False
        elif spoken and not unanswered:
            raise Reject("ambiguous_turns")
        elif kind == "message":
            spoken = True


def item_text(item: Row) -> tuple[str, list[str]]:
    """Text and images of an item."""
    if item_kind(item) == "reasoning":
        parts = [*(item.get("summary") or []), *(item.get("content") or [])]
        return "\n\n".join(part["text"] for part in parts if part["text"]), []
    content = item.get("output") if item_kind(item) == "function_call_output" else item.get("content")
    if not isinstance(content, list):
        return content or "", []
    text = "".join(part["text"] for part in content if part["type"] != "input_image")
    return text, [image_url(part) for part in content if part["type"] == "input_image"]


def fold(items: list[Row], calls: dict[str, Row]) -> list[Row]:
    """Items → messages: what the policy said in a row is one message."""
    messages: list[Row] = []
    turn: Row | None = None
    for item in items:
        kind = item_kind(item)
        if is_policy(item):
            if turn is None:
                turn = {"role": "assistant", "content": "", "thoughts": [], "calls": [], "recorded": []}
                messages.append(turn)
            if kind == "function_call":
                turn["calls"].append({"id": item["call_id"], **calls[item["call_id"]]})
            elif kind == "reasoning":
                turn["thoughts"] += filter(None, [item_text(item)[0]])
            else:
                turn["content"] += item_text(item)[0]
            if item.get("generation_token_ids"):
                turn["recorded"].append(item)
            continue
        turn = None
        text, images = item_text(item)
        message = {"role": item.get("role"), "content": text}
        if kind == "function_call_output":
            call = item["call_id"]
            message = {"role": "tool", "content": text, "tool_call_id": call, "name": calls[call]["name"]}
        messages.append(message | ({"images": images} if images else {}))
    return messages


def is_empty(message: Row) -> bool:
    said = message["content"] or message.get("thoughts") or message.get("calls")
    return message["role"] == "assistant" and not said


def read_tools(request: Row, response: Row) -> tuple[list[Row], bool]:
    """Declared functions, and whether something else is declared."""
    tools, odd = [], False
    for tool in request.get("tools") or response.get("tools") or []:
        function = tool["function"] if isinstance(tool.get("function"), dict) else tool
        if tool.get("type", "function") != "function" or not isinstance(function.get("name"), str):
            odd = True
            continue
        fields = ("name", "description", "parameters")
        kept = {field: function[field] for field in fields if function.get(field) is not None}
        tools.append({"type": "function", "function": kept})
    return tools, odd


def rollout_columns(row: Row, chat: Row, file: str, inputs: dict[tuple[int, int], str]) -> Row:
    """The columns of a rollout."""
    request, response = row["responses_create_params"], row["response"]
    prompt, completion = chat["prompt"], chat["completion"]
    turns = [message for message in completion if message["role"] == "assistant"]
    agent, environment = name_of(row.get("agent_ref")), name_of(row.get("_ng_environment_server"))
    task_index, repeat = whole(row.get("_ng_task_index")), whole(row.get("_ng_rollout_index"))
    task_key = digest([environment or agent, [plain(message) for message in prompt], chat["tools"]])
    input_key = inputs.get((task_index, repeat)) if task_index is not None and repeat is not None else None
    usage = response.get("usage") if isinstance(response.get("usage"), dict) else {}
    input_tokens = whole(usage.get("input_tokens"))
    reason = context_reason(request, response, chat, len(turns), input_tokens)
    reward = row.get("reward")
    number = isinstance(reward, int | float)
    recorded = recorded_tokens(turns)
    flags = set(chat["flags"])
    if any(message["role"] == "developer" for message in prompt + completion):
        flags.add("developer_role")
    if any("<think>" in turn["content"] or "</think>" in turn["content"] for turn in turns):
        flags.add("think_in_content")
    if recorded is None and any(turn["recorded"] for turn in turns):
        flags.add("token_ids_partial")
    if not number and reward is not None:
        flags.add("reward_not_a_number")
    components = row.get("reward_components") if isinstance(row.get("reward_components"), dict) else {}
    return {
        "verdict": "context" if reason else "ok",
        "reason": reason,
        "task_key": task_key,
        "input_key": input_key,
        "cluster_key": input_key or task_key,
        "completion_key": digest([plain(message) for message in completion]),
        "group": digest([file, environment or agent, task_key if task_index is None else task_index])[:16],
        "task_index": task_index,
        "repeat": repeat,
        "agent": agent,
        "environment": environment,
        "model": name_of(response.get("model")),
        "reward": float(reward) if number else None,
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
        **{f"reward_{name}": float(part) for name, part in components.items() if isinstance(part, int | float)},
    }


def context_reason(request: Row, response: Row, chat: Row, turns: int, counted: int | None) -> str:
    """The sign that the model saw more than the row holds, or `""`."""
    messages = chat["prompt"] + chat["completion"]
    called = {call["name"] for message in messages for call in message.get("calls", ())}
    if called:
        declared = {tool["function"]["name"] for tool in chat["tools"]}
        declared |= {tool.get("name") for params in (request, response) for tool in params.get("tools") or ()}
        if called - declared:
            return "tools_undeclared"
    if counted is None or counted <= HIDDEN_CONTEXT_TOKENS or turns != 1:
        return ""
    if any(message.get("images") for message in messages):
        return ""
    if counted <= HIDDEN_CONTEXT_TOKENS + sum(len(message["content"]) for message in chat["prompt"]):
        return ""  # written as JSON, the text is no shorter
    shown = [request.get("input"), request.get("tools") or response.get("tools") or [], *chat["head"]]
    shown += [request["instructions"]] if request.get("instructions") else []
    visible = sum(len(json.dumps(value, ensure_ascii=False)) for value in shown)
    return "hidden_context" if counted > visible + HIDDEN_CONTEXT_TOKENS else ""


def recorded_tokens(turns: list[Row]) -> int | None:
    """Generated tokens that the row records, where every turn has a whole record."""
    total = 0
    for turn in turns:
        if len(turn["recorded"]) != 1:
            return None
        item = turn["recorded"][0]
        asked, made, logs = (item.get(f) for f in ("prompt_token_ids", "generation_token_ids", "generation_log_probs"))
        if not asked or not logs or len(made) != len(logs) or not all(type(token) is int for token in asked + made):
            return None
        total += len(made)
    return total or None


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
    kept = {key: message[key] for key in ("role", "content", "images", "name") if key in message}
    if message.get("thoughts"):
        kept["reasoning_content"] = "\n\n".join(message["thoughts"])
    if message.get("calls"):
        kept["tool_calls"] = [{"name": call["name"], "arguments": call["arguments"]} for call in message["calls"]]
    return kept


def chat_message(message: Row) -> Row:
    """A message as chat templates take it."""
    kept = plain(message)
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
        total += len("\n\n".join(message.get("thoughts", ()))) + sum(call["chars"] for call in message.get("calls", ()))
    return total


def name_of(value: Any) -> str | None:
    """A name given as such or as a reference with a name."""
    name = value.get("name") if isinstance(value, dict) else value
    return name if isinstance(name, str) and name else None


def whole(value: Any) -> int | None:
    return value if type(value) is int else None


def digest(value: Any) -> str:
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()


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
