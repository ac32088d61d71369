"""A rollout in few enough characters to stand beside another one: its beginning and its end, with notes between."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from gymtrl.rollouts.record import Line, Message

from .rollout import image_text, parts, pretty_json, raw_excerpt, reward_text

ROOM = 10_000
"""Characters of a trajectory."""

_STEPS = 16
_TEXTS = 6
_NAME = 120
_LEAST = 40


@dataclass(frozen=True)
class Text:
    """A piece of a message.

    Attributes:
        kind (`str`): `text`, `reasoning` or `call`.
        name (`str`): Of a call, the function.
        text (`str`): What it says, or the arguments.
    """

    kind: str
    name: str
    text: str


@dataclass(frozen=True)
class Step:
    """A message, or a note that some are left out.

    Attributes:
        heading (`str`): Whose it is.
        policy (`bool`): The policy produced it.
        texts (`list[Text]`): What it holds; of a note nothing.
    """

    heading: str
    policy: bool
    texts: list[Text]


@dataclass(frozen=True)
class Trajectory:
    """A rollout to be shown.

    Attributes:
        place (`str`): `file:line`.
        reward (`str`): In words; `""` where the line is refused.
        facts (`str`): Turns, calls and tokens, in words.
        asked (`list[Step]`): The prompt.
        steps (`list[Step]`): What followed.
        refused (`str`): Why the line is no sound rollout; `""` where it is.
        raw (`str`): Of a refused line, its beginning.
        cut (`bool`): Something is left out.
    """

    place: str
    reward: str
    facts: str
    asked: list[Step]
    steps: list[Step]
    refused: str
    raw: str
    cut: bool


def trajectory(line: Line, room: int = ROOM) -> Trajectory:
    """Prepares a line for showing.

    Args:
        line (`Line`): As `read_at` gives it.
        room (`int`, *optional*, defaults to 10,000): Characters of its messages, names and notes not counted.

    Raises:
        `UserError`: If the file of a refused line is gone, or has changed since.
    """
    place, rollout = str(line.origin), line.rollout
    if rollout is None:
        return Trajectory(place, "", "", [], [], f"{line.reason}: {line.detail}", raw_excerpt(line.origin), True)
    asked, cut_prompt = _shortened([(m, m.role) for m in rollout.prompt], room // 3)
    steps, cut_steps = _shortened(list(_headed(rollout.completion)), room - room // 3)
    tokens = "" if rollout.output_tokens is None else f" · {rollout.output_tokens:,} tokens"
    calls = f" · {_counted(rollout.n_tool_calls, 'tool call')}" if rollout.n_tool_calls else ""
    truncated = " · truncated" if rollout.truncated else ""
    facts = f"{_counted(rollout.turns, 'turn')}{calls}{tokens}{truncated}"
    return Trajectory(place, reward_text(rollout.reward), facts, asked, steps, "", "", cut_prompt or cut_steps)


def _headed(messages: Sequence[Message]) -> Iterator[tuple[Message, str]]:
    turn = 0
    for message in messages:
        if message.role == "assistant":
            turn += 1
            yield message, f"policy · turn {turn}"
        elif message.role == "tool":
            yield message, f"tool result · {_cut(message.name or '', _NAME)}"
        else:
            yield message, f"{message.role} · in the course of the rollout"


def _shortened(headed: Sequence[tuple[Message, str]], room: int) -> tuple[list[Step], bool]:
    """The first and last messages, each with its share of the room, and whether anything is left out."""
    lacking = len(headed) - _STEPS
    kept = list(headed) if lacking <= 0 else [*headed[: _STEPS // 2], *headed[-_STEPS // 2 :]]
    found, cut = [], lacking > 0
    shares = _shares([sum(len(text.text) for text in _texts(message)) for message, _ in kept], room)
    for (message, heading), share in zip(kept, shares, strict=True):
        texts = list(_texts(message))
        pieces = texts[:_TEXTS]
        sizes = _shares([len(text.text) for text in pieces], share)
        shown = [Text(t.kind, t.name, _cut(t.text, size)) for t, size in zip(pieces, sizes, strict=True)]
        if len(texts) > _TEXTS:
            shown.append(Text("text", "", f"… {_counted(len(texts) - _TEXTS, 'further part')} left out …"))
        cut = cut or len(shown) > _TEXTS or any(len(t.text) > size for t, size in zip(pieces, sizes, strict=True))
        found.append(Step(heading, message.role == "assistant", shown))
    if lacking > 0:
        found.insert(_STEPS // 2, Step(f"… {_counted(lacking, 'message')} left out …", False, []))
    return found, cut


def _shares(sizes: Sequence[int], room: int) -> list[int]:
    """Divides the room: what is short gets all that it needs, the rest share what is left."""
    shares, left = [0] * len(sizes), room
    for done, place in enumerate(sorted(range(len(sizes)), key=lambda place: sizes[place])):
        shares[place] = min(sizes[place], max(left // (len(sizes) - done), _LEAST))
        left -= shares[place]
    return shares


def _texts(message: Message) -> Iterator[Text]:
    if message.reasoning_content:
        yield Text("reasoning", "", message.reasoning_content)
    for kind, value in parts(message):
        yield Text("text", "", value if kind == "text" else image_text(value))
    for call in message.tool_calls:
        yield Text("call", _cut(call.name, _NAME), pretty_json(call.arguments))


def _cut(text: str, most: int) -> str:
    """The beginning and the end of a text that is too long."""
    if len(text) <= most:
        return text
    tail = most // 3
    return f"{text[: most - tail]} … {len(text) - most:,} characters left out … {text[len(text) - tail :]}"


def _counted(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'' if number == 1 else 's'}"
