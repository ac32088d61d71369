"""Which prompts overlap a benchmark, or any other file of tasks that must stay unseen."""

from __future__ import annotations

import hashlib
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

from gymtrl.errors import UserError
from gymtrl.rollouts.codec import TOO_DEEP, decode_json, is_deep
from gymtrl.rollouts.items import Refused
from gymtrl.rollouts.keys import input_key
from gymtrl.rollouts.loose import read_conversation
from gymtrl.rollouts.reader import read_bytes, read_lines
from gymtrl.rollouts.record import Line, Message
from gymtrl.text import plain

from .words import ngrams, split_words

# Of arXiv 2005.14165, appendix C: 13-grams of lower-cased words without punctuation, of which those that more than 10
# documents share are boilerplate. There one n-gram in common is an overlap. Here half of them are asked for, which is
# ours: tasks that one generator made, or that rest on one passage, share some without being the same.
NGRAM = 13
MOST_TASKS = 10
SHARE = 0.5

_CHATS = ("messages", "prompt")
_TEXTS = ("prompt", "question", "problem", "input", "text", "instruction")
# Taken off both ends of a word. Signs that mean something (+ - / = $ \ %) stay, so that 5 - 3 is not 5 + 3.
_PUNCTUATION = ".,;:!?\"'`()[]{}<>*_#…–—«»‹›“”‘’„‚、。「」『』【】《》·¿¡|~"
_ANSWER = {"output": [{"type": "message", "role": "assistant", "content": "."}]}


class HeldOut(NamedTuple):
    """A task that must stay unseen.

    Attributes:
        file (`str`): The file that names it.
        line (`int`): The line, from 1.
        text (`str`): What it asks.
        task_key, input_key (`str`, *optional*): Its keys, where the line gives them.
    """

    file: str
    line: int
    text: str
    task_key: str | None
    input_key: str | None


@dataclass(frozen=True)
class Overlap:
    """A prompt that overlaps a held-out task.

    Attributes:
        index (`int`): The prompt, counted from 0.
        by (`str`): What they share: `task_key`, `input_key` or `ngram`.
        file (`str`), line (`int`): The held-out task; the one with most in common, where there are several.
        share (`float`): N-grams in common over those of the shorter text, boilerplate left out; 1 for a key.
    """

    index: int
    by: Literal["task_key", "input_key", "ngram"]
    file: str
    line: int
    share: float


@dataclass
class _Task:
    """A prompt text of a task.

    Attributes:
        size (`int`): N-grams not known to be boilerplate when it was read.
        held (`list[int]`): Hashes of those that held-out tasks have too.
        indexes (`list[int]`): The prompts with this text that share no key with a held-out task.
    """

    size: int
    held: list[int]
    indexes: list[int] = field(default_factory=list)


def held_out_texts(path: Path) -> list[HeldOut]:
    """Reads a file of tasks that must stay unseen.

    Args:
        path (`Path`): JSONL of Gym rollouts, of Gym input rows, of chats (`messages`, or `prompt` as a list), or of
            rows with a text under `prompt`, `question`, `problem`, `input`, `text` or `instruction`. A row with
            several of them counts once for each.

    Returns:
        `list[HeldOut]`: In the order of the lines.

    Raises:
        `UserError`: If the file is missing or empty, or a line names no task.
    """
    found = [task for line in read_lines([path]) for task in _tasks(line)]
    if not found:
        raise UserError(f"{path} has no rows", remedy="name a JSONL file with one held-out task a line")
    return found


def prompt_text(messages: Sequence[Message]) -> str:
    """What a prompt asks: its user turns, or all of it where there are none.

    The system prompt, and assistant and tool turns (worked examples, what came before the question), are left out:
    they are the environment's and much the same in all its tasks. An image counts as one word, made of its URL.
    """
    asked = [message for message in messages if message.role == "user"]
    return _joined(asked).strip() or _joined(messages).strip()


def find_overlaps(
    prompts: Iterable[tuple[str, str | None, str]],
    held_out: Sequence[HeldOut],
    *,
    n: int = NGRAM,
    share: float = SHARE,
) -> dict[int, Overlap]:
    """Finds prompts that overlap held-out tasks: by key, else by the word n-grams of their texts.

    A text of fewer words is an n-gram of its own, and every text, as a whole, counts as one more. An n-gram that, on
    either side, stands in more than 10 tasks, or in more than half of them and more than two, is boilerplate and
    ignored. How much two texts share is measured on the shorter, so that a question is found in any template.

    What results does not depend on the order of the prompts or of the held-out tasks. Memory holds hashes of the
    held-out n-grams and, of the prompts, those found among them.

    Args:
        prompts (`Iterable[tuple]`): Task key, input key and prompt text of each; read once.
        held_out (`Sequence[HeldOut]`): What must stay unseen.
        n (`int`, *optional*, defaults to 13): Words of an n-gram.
        share (`float`, *optional*, defaults to 0.5): Lowest share in common; at 0 a single n-gram is enough.

    Returns:
        `dict[int, Overlap]`: The overlap of each prompt that has one, by its index, in order.
    """
    rows = sorted(held_out, key=lambda row: (row.file, row.line, row.text))
    by_task = {row.task_key: row for row in reversed(rows) if row.task_key}
    by_input = {row.input_key: row for row in reversed(rows) if row.input_key}
    owners, common = _held_out_ngrams(rows, n)
    overlaps: dict[int, Overlap] = {}
    tasks: dict[tuple[str, int], _Task] = {}
    sharers: defaultdict[int, set[str]] = defaultdict(set)
    for index, (task_key, task_input, text) in enumerate(prompts):
        identity = task_key, _hash(text)
        if identity not in tasks:
            task = tasks[identity] = _look_up(text, n, owners, common)
            for ngram in task.held:
                sharers[ngram].add(task_key)
                if len(sharers[ngram]) > MOST_TASKS:
                    common.add(ngram)
                    del sharers[ngram]
        if task_key in by_task:
            overlaps[index] = _by_key(index, "task_key", by_task[task_key])
        elif task_input in by_input:
            overlaps[index] = _by_key(index, "input_key", by_input[task_input])
        else:
            tasks[identity].indexes.append(index)
    most = _most_tasks(len({task_key for task_key, _ in tasks}))
    common |= {ngram for ngram, keys in sharers.items() if len(keys) > most}
    sizes = Counter(number for ngram, numbers in owners.items() if ngram not in common for number in numbers)
    for task in tasks.values():
        number, part = _closest(task, owners, sizes, common)
        if part and part >= share:
            row = rows[number]
            overlaps |= {index: Overlap(index, "ngram", row.file, row.line, part) for index in task.indexes}
    return dict(sorted(overlaps.items()))


def _tasks(line: Line) -> Iterator[HeldOut]:
    """The tasks that a line of a held-out file names."""
    file, number = line.origin.file, line.origin.line
    if line.rollout is not None:
        asked = prompt_text(line.rollout.prompt)
        yield HeldOut(file, number, asked, line.rollout.task_key, line.rollout.input_key)
        return
    if line.reason in ("malformed_json", "not_object", "line_too_long"):
        raise UserError(f"{line.origin} is no JSON object that can be read: {plain(line.detail)}")
    row = decode_json(read_bytes(line.origin))
    if is_deep(row):
        raise UserError(f"{line.origin} is {TOO_DEEP}")
    if isinstance(row.get("responses_create_params"), dict):
        key = input_key(row) if line.reason in ("task_only", "materialized_input") else None
        yield HeldOut(file, number, prompt_text(_asked(row["responses_create_params"], line)), None, key)
        return
    chats = [prompt_text(_chat(row[name])) for name in _CHATS if isinstance(row.get(name), list)]
    texts = [text for text in (*chats, *(row.get(name) for name in _TEXTS)) if isinstance(text, str) and text.strip()]
    if not texts:
        keys = ", ".join(list(map(str, row))[:10]) or "none"
        raise UserError(
            f"{line.origin} names no task that could be held out; its keys: {plain(keys)}",
            remedy=f"give each row its text under one of {', '.join(_TEXTS)}, or a chat under messages",
        )
    for text in texts:
        yield HeldOut(file, number, text, None, None)


def _asked(request: dict[str, Any], line: Line) -> Sequence[Message]:
    """The prompt of an input row, read as that of a rollout would be."""
    try:
        return read_conversation(request, _ANSWER).prompt
    except Refused as refused:
        raise UserError(f"{line.origin} holds no prompt that can be read: {plain(refused.detail)}") from None


def _chat(turns: Sequence[Any]) -> list[Message]:
    """The texts of a chat in the form of chat completions."""
    found = []
    for turn in turns:
        content = turn.get("content") if isinstance(turn, dict) else None
        if isinstance(content, list):
            parts = [part.get("text") for part in content if isinstance(part, dict)]
            content = "".join(part for part in parts if isinstance(part, str))
        if isinstance(content, str):
            found.append(Message(role=turn.get("role"), content=content))
    return found


def _joined(messages: Iterable[Message]) -> str:
    return "\n".join(text for message in messages for text in (message.content, *map(_image_word, message.images)))


def _image_word(url: str) -> str:
    return f"image:{_hash(url):016x}"


def _held_out_ngrams(rows: Sequence[HeldOut], n: int) -> tuple[dict[int, list[int]], set[int]]:
    """For each n-gram the rows that have it, and the n-grams that are boilerplate; of equal rows the first."""
    owners: dict[int, list[int]] = {}
    seen: set[str] = set()
    for number, row in enumerate(rows):
        if row.text not in seen:
            seen.add(row.text)
            for ngram in _ngram_hashes(row.text, n):
                owners.setdefault(ngram, []).append(number)
    most = _most_tasks(len(seen))
    return owners, {ngram for ngram, numbers in owners.items() if len(numbers) > most}


def _most_tasks(tasks: int) -> int:
    """How many tasks may share an n-gram that says something."""
    return min(MOST_TASKS, max(2, tasks // 2))


def _ngram_hashes(text: str, n: int) -> set[int]:
    normal = split_words(unicodedata.normalize("NFKC", text).lower())
    words = [word.strip(_PUNCTUATION) or word for word in normal]
    hashes = {_hash(ngram) for ngram in ngrams(words, n)}
    return hashes | {_hash(" ".join(words))} if words else hashes


def _hash(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "big")


def _by_key(index: int, by: Literal["task_key", "input_key"], row: HeldOut) -> Overlap:
    return Overlap(index, by, row.file, row.line, 1.0)


def _look_up(text: str, n: int, owners: Mapping[int, Sequence[int]], common: Set[int]) -> _Task:
    hashes = _ngram_hashes(text, n) - common
    return _Task(len(hashes), [ngram for ngram in hashes if ngram in owners])


def _closest(
    task: _Task, owners: Mapping[int, Sequence[int]], sizes: Mapping[int, int], common: Set[int]
) -> tuple[int, float]:
    """The held-out row that shares most with a task, and how much; 0 where none shares anything."""
    rare = [ngram for ngram in task.held if ngram not in common]
    size = task.size - len(task.held) + len(rare)
    shared = Counter(number for ngram in rare for number in owners[ngram])
    parts = ((count / min(size, sizes[number]), count, -number) for number, count in shared.items())
    part, _, negated = max(parts, default=(0.0, 0, 0))
    return -negated, part
