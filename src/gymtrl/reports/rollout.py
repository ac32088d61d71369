"""One rollout on a terminal, in the order in which the policy saw it."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from typing import Any

import msgspec
from rich.console import Console
from rich.rule import Rule
from rich.table import Table
from rich.text import Text

from gymtrl.rollouts.reader import read_bytes
from gymtrl.rollouts.reasons import remedy_for
from gymtrl.rollouts.record import Line, Message, Origin, Rollout
from gymtrl.text import plain

VERDICT_STYLES = {"ok": "green", "context": "yellow", "reject": "red", "skip": "dim"}
_POLICY, _GIVEN, _THOUGHT = "cyan", "dim", "italic"
_RAW_CHARS = 2000
_IMAGE_CHARS = 80


def render_rollout(line: Line, console: Console) -> None:
    """Prints one line of a rollout file: its verdict, the facts, and the conversation.

    What the policy produced stands behind a bar; all else was given to it.

    Args:
        line (`Line`): As `read_row` gives it.
        console (`Console`): Where to print. Nothing of the file is taken for markup.
    """
    console.print(Rule(Text(plain(str(line.origin))), style="bold"))
    rollout = line.rollout
    console.print(fact_table([*_verdict(line), *(facts(rollout) if rollout else [("row id", line.origin.row_id)])]))
    if rollout is None:
        console.print(Rule("raw line", style=_GIVEN))
        console.print(Text(plain(raw_excerpt(line.origin))))
        return
    for message in rollout.prompt:
        _given(message, message.role, console)
    turn = 0
    for message in rollout.completion:
        if message.role == "assistant":
            turn += 1
            _policy(message, f"policy · turn {turn} of {rollout.turns}", console)
        elif message.role == "tool":
            _given(message, f"tool result · {message.name} · {message.tool_call_id}", console)
        else:
            _given(message, f"{message.role} · in the course of the rollout", console)


def line_json(line: Line) -> str:
    """A line with its whole record as one JSON document, indented, with a final line break."""
    return msgspec.json.format(msgspec.json.encode(line), indent=2).decode() + "\n"


def facts(rollout: Rollout) -> list[tuple[str, str]]:
    """What is recorded about a rollout beside the conversation, as names and values; what is not recorded is left out.

    Args:
        rollout (`Rollout`): The rollout.

    Returns:
        `list[tuple[str, str]]`: Foreign text in it is as the file holds it.
    """
    tokens = [(rollout.input_tokens, "in"), (rollout.output_tokens, "out")]
    recorded = sum(len(turn.generation_token_ids) for turn in rollout.recorded)
    found = {
        "reward": reward_text(rollout.reward) + (" (masked: no valid measurement)" if rollout.masked else ""),
        "components": ", ".join(f"{name} {value:g}" for name, value in rollout.reward_components.items()),
        "agent": rollout.agent,
        "environment": rollout.environment,
        "model": rollout.model,
        "task": _numbered("index", rollout.task_index) + _numbered(", repeat", rollout.rollout_index),
        "turns": f"{rollout.turns:,}",
        "tool calls": f"{rollout.n_tool_calls:,}",
        "tools": ", ".join(tool["function"]["name"] for tool in rollout.tools),
        "sampling": ", ".join(
            f"{name} {value}" for name, value in msgspec.structs.asdict(rollout.sampling).items() if value is not None
        ),
        "tokens": ", ".join(f"{count:,} {way}" for count, way in tokens if count is not None),
        "token ids": f"recorded for {len(rollout.recorded)} turns, {recorded:,} generated" if rollout.recorded else "",
        "truncated": "yes: the response is incomplete" if rollout.truncated else "",
        "remarks": ", ".join(rollout.flags),
        "row id": rollout.origin.row_id,
        "task key": rollout.task_key,
        "input key": rollout.input_key,
        "cluster key": rollout.cluster_key,
    }
    return [(name, value) for name, value in found.items() if value]


def fact_table(pairs: Iterable[tuple[str, str | Text]]) -> Table:
    """Names and values below each other; nothing in them is taken for markup."""
    table = Table.grid(padding=(0, 2))
    table.add_column(no_wrap=True, style="bold")
    table.add_column(overflow="fold")
    for name, value in pairs:
        table.add_row(Text(name), Text(plain(value)) if isinstance(value, str) else value)
    return table


def reward_text(reward: float | None) -> str:
    """A reward in words."""
    return "no reward" if reward is None else f"{reward:g}"


def parts(message: Message) -> Iterator[tuple[str, str]]:
    """A message's content in order: pairs of `text` or `image`, and the text or the image's address."""
    start = 0
    for image, offset in zip(message.images, message.image_offsets or (0,) * len(message.images), strict=True):
        if offset > start:
            yield "text", message.content[start:offset]
            start = offset
        yield "image", image
    if start < len(message.content):
        yield "text", message.content[start:]


def pretty_json(value: Any) -> str:
    """A JSON value for a person to read: indented, unless that would make most of it spaces."""
    compact = json.dumps(value, ensure_ascii=False)
    indented = json.dumps(value, ensure_ascii=False, indent=2)
    return compact if len(indented) > 4 * len(compact) + 200 else indented


def image_text(address: str) -> str:
    """What stands for an image where it cannot be shown."""
    kind, comma, data = address.partition(",")
    if kind.startswith("data:") and comma:
        return f"[image: {shortened(kind, _IMAGE_CHARS)}, {len(data):,} characters]"
    return f"[image: {shortened(address, _IMAGE_CHARS)}]"


def shortened(text: str, most: int) -> str:
    """The beginning of a text on one line."""
    line = " ".join(text[: 4 * most].split())
    return line if len(line) <= most and len(text) <= 4 * most else f"{line[: most - 1]}…"


def raw_excerpt(origin: Origin) -> str:
    """The first characters of a line as it stands in its file.

    Raises:
        `UserError`: If the file is gone, or has changed since.
    """
    text = read_bytes(origin).decode("utf-8", "replace")
    more = f"… ({origin.length:,} bytes in all)" if len(text) > _RAW_CHARS else ""
    return text[:_RAW_CHARS] + more


def _numbered(what: str, number: int | None) -> str:
    return "" if number is None else f"{what} {number}"


def _verdict(line: Line) -> list[tuple[str, str | Text]]:
    words = f"{line.verdict}: {line.reason}" if line.reason else line.verdict
    found: list[tuple[str, str | Text]] = [("verdict", Text(plain(words), VERDICT_STYLES[line.verdict]))]
    if line.verdict != "ok":
        found += [("found", line.detail), ("remedy", remedy_for(line.verdict, line.reason))]
    return found


def _given(message: Message, heading: str, console: Console) -> None:
    _heading(heading, _GIVEN, console)
    for text in _texts(message):
        console.print(text)


def _policy(message: Message, heading: str, console: Console) -> None:
    _heading(heading, f"bold {_POLICY}", console)
    for text in _texts(message):
        for row in text.wrap(console, console.width - 2):
            console.print(Text("▌ ", _POLICY) + row)


def _heading(heading: str, style: str, console: Console) -> None:
    console.print()
    console.print(Text(f"── {plain(heading)} ", style))


def _texts(message: Message) -> Iterator[Text]:
    """Reasoning, content and calls of a message, each as a block."""
    if message.reasoning_content:
        yield Text(f"[reasoning]\n{plain(message.reasoning_content)}\n", _THOUGHT)
    for kind, value in parts(message):
        yield Text(plain(value if kind == "text" else image_text(value)))
    for call in message.tool_calls:
        text = Text(f"[call] {plain(call.name)}", "bold")
        text.append(f"  {plain(call.id)}\n", "not bold dim")
        text.append(plain(pretty_json(call.arguments)), "not bold")
        yield text
