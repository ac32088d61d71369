"""Which prompts overlap a benchmark, or any other file of tasks that must stay unseen."""

from __future__ import annotations

import hashlib
import unicodedata
from array import array
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence, Set
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

from gymtrl.rollouts.groups import tie

from .held_out import HeldOut
from .words import split_words

# Of arXiv 2005.14165, appendix C: 13-grams of lower-cased words without punctuation, of which those that more than 10
# documents share are boilerplate. There one n-gram in common is an overlap. Here half of them are asked for, which is
# ours: tasks that one generator made, or that rest on one passage, share some without being the same.
NGRAM = 13
MOST_TASKS = 10
SHARE = 0.5

# Ours. Fewer words say too little to be looked for inside of other texts.
SHORTEST = 5
# How much of a held-out text must be there where the prompts' boilerplate is all that it has in common with one.
WHOLE = 0.8

# Taken off both ends of a word. Signs that mean something (+ - / = $ \ %) stay, so that 5 - 3 is not 5 + 3.
_PUNCTUATION = ".,;:!?\"'`()[]{}<>*_#…–—«»‹›“”‘’„‚、。「」『』【】《》·¿¡|~"


class Prompt(NamedTuple):
    """What is looked for in the held-out tasks.

    Attributes:
        task_key (`str`): The task.
        input_key (`str`, *optional*): Its input row.
        environment (`str`, *optional*): The environment or the agent; what most of its tasks say is boilerplate.
        text (`str`): What it asks.
    """

    task_key: str
    input_key: str | None
    environment: str | None
    text: str


@dataclass(frozen=True)
class Overlap:
    """A prompt that overlaps a held-out task.

    Attributes:
        index (`int`): The prompt, counted from 0.
        by (`str`): What they share: `task_key`, `input_key` or `ngram`.
        file (`str`), line (`int`): The held-out task; the one with most in common, where there are several.
        share (`float`): N-grams in common over those of the shorter text, boilerplate left out; over all of the
            held-out text, where only so much is in common; 1 for a key and for equal texts.
    """

    index: int
    by: Literal["task_key", "input_key", "ngram"]
    file: str
    line: int
    share: float


@dataclass
class _Text:
    """A text that prompts have.

    Attributes:
        words (`int`): Its words.
        size (`int`): N-grams that are no boilerplate of the held-out tasks.
        held (`array`): Hashes of those that held-out tasks have too.
        environments (`set`): Where it is asked.
        keys (`set`): Keys of its tasks.
        indexes (`list[int]`): The prompts with this text that share no key with a held-out task.
    """

    words: int
    size: int
    held: array[int]
    environments: set[str | None] = field(default_factory=set)
    keys: set[str] = field(default_factory=set)
    indexes: list[int] = field(default_factory=list)


@dataclass(frozen=True)
class _HeldOutTexts:
    """What held-out tasks say, boilerplate left out; of rows with equal texts the first.

    Attributes:
        equal (`dict[int, int]`): The row of each text, by the text's hash.
        owners (`dict[int, list[int]]`): The rows of each n-gram.
        sizes (`dict[int, int]`): How many n-grams a row has.
        short (`dict[int, int]`): How many words a row has that is too short for an n-gram of the usual length.
        starts (`dict[str, set[int]]`): By first word, how many words such rows have.
        boilerplate (`set[int]`): N-grams of too many tasks.
    """

    equal: Mapping[int, int]
    owners: Mapping[int, Sequence[int]]
    sizes: Mapping[int, int]
    short: Mapping[int, int]
    starts: Mapping[str, Set[int]]
    boilerplate: Set[int]


def find_overlaps(prompts: Iterable[Prompt], held_out: Sequence[HeldOut]) -> dict[int, Overlap]:
    """Finds prompts that overlap held-out tasks: by key, else by equal texts, else by the texts' word n-grams.

    An n-gram has 13 words; a held-out text of 5 to 12 words is one n-gram of its own length, and a shorter one is only
    compared as a whole. An n-gram is boilerplate if, on either side, more than 10 tasks have it, or more than half of
    them and more than two; among the prompts also if that is so within one environment. Prompts of equal text or with a
    key in common are one task here, and so are the texts of one held-out line.

    What is boilerplate of the held-out tasks is ignored. Of the rest, a prompt overlaps a text if

    - at least half of what is no boilerplate of the prompts either, on the shorter side, is in both, so that a question
      is found in any template; or
    - at least 80 % of the held-out text is in the prompt, boilerplate of the prompts or not, and what is not there is
      boilerplate. So a question is found that many prompts repeat; one of fewer than 13 words must then be half of the
      prompt.

    What results does not depend on the order of the prompts or of the held-out tasks. Memory holds hashes of the
    held-out n-grams and, of each different prompt, those found among them.

    Args:
        prompts (`Iterable[Prompt]`): The prompts; read once.
        held_out (`Sequence[HeldOut]`): What must stay unseen.

    Returns:
        `dict[int, Overlap]`: The overlap of each prompt that has one, by its index, in order.
    """
    rows = sorted(held_out, key=lambda row: (row.file, row.line, row.text))
    by_task = {row.task_key: row for row in reversed(rows) if row.task_key}
    by_input = {row.input_key: row for row in reversed(rows) if row.input_key}
    held = _index(rows)
    overlaps: dict[int, Overlap] = {}
    texts: dict[int, _Text] = {}
    for index, (task_key, input_key, environment, asked) in enumerate(prompts):
        words = plain_words(asked)
        whole = hash_words(words)
        if whole not in texts:
            texts[whole] = _look_up(words, held)
        text = texts[whole]
        text.environments.add(environment)
        text.keys.update(key for key in (task_key, input_key) if key)
        if task_key in by_task:
            overlaps[index] = _overlap(index, "task_key", by_task[task_key])
        elif input_key in by_input:
            overlaps[index] = _overlap(index, "input_key", by_input[input_key])
        elif whole in held.equal:
            overlaps[index] = _overlap(index, "ngram", rows[held.equal[whole]])
        else:
            text.indexes.append(index)
    common = _prompt_boilerplate(texts)
    sizes = Counter(number for ngram, numbers in held.owners.items() if ngram not in common for number in numbers)
    for text in texts.values():
        part, _, negated = max(_parts(text, held, sizes, common), default=(0.0, 0, 0))
        if part:
            overlaps |= {index: _overlap(index, "ngram", rows[-negated], part) for index in text.indexes}
    return dict(sorted(overlaps.items()))


def _index(rows: Sequence[HeldOut]) -> _HeldOutTexts:
    equal: dict[int, int] = {}
    short: dict[int, int] = {}
    starts: defaultdict[str, set[int]] = defaultdict(set)
    said: dict[int, set[int]] = {}
    wholes: defaultdict[str, list[int]] = defaultdict(list)
    keys: defaultdict[str, list[str]] = defaultdict(list)
    for number, row in enumerate(rows):
        words = plain_words(row.text)
        whole = hash_words(words)
        line = f"{row.file}:{row.line}"
        wholes[line].append(whole)
        keys[line] += [key for key in (row.task_key, row.input_key) if key]
        if words and whole not in equal:
            equal[whole] = number
            said[whole] = _ngram_hashes(words)
            if SHORTEST <= len(words) < NGRAM:
                said[whole] = {whole}
                short[number] = len(words)
                starts[words[0]].add(len(words))
    tied = tie((line, [tuple(texts), *keys[line]]) for line, texts in wholes.items())
    tasks: defaultdict[str, set[int]] = defaultdict(set)
    for line, texts in wholes.items():
        tasks[tied[line]].update(*(said.get(whole, ()) for whole in texts))
    boilerplate = _shared_by_many(tasks.values(), len(tasks))
    owners: dict[int, list[int]] = {}
    for whole, number in equal.items():
        for ngram in said[whole] - boilerplate:
            owners.setdefault(ngram, []).append(number)
    sizes = Counter(number for numbers in owners.values() for number in numbers)
    return _HeldOutTexts(equal, owners, sizes, short, starts, boilerplate)


def _look_up(words: Sequence[str], held: _HeldOutTexts) -> _Text:
    hashes = _ngram_hashes(words) - held.boilerplate
    for start, word in enumerate(words):
        for length in held.starts.get(word, ()):
            ngram = hash_words(words[start : start + length])
            if ngram in held.owners:
                hashes.add(ngram)
    return _Text(len(words), len(hashes), array("Q", (ngram for ngram in hashes if ngram in held.owners)))


def _prompt_boilerplate(texts: Mapping[int, _Text]) -> set[int]:
    """N-grams that too many tasks have, of all the prompts or of those of one environment."""
    tied = tie((str(whole), sorted(text.keys)) for whole, text in texts.items())
    everywhere: defaultdict[str, list[_Text]] = defaultdict(list)
    inside: defaultdict[str | None, defaultdict[str, list[_Text]]] = defaultdict(lambda: defaultdict(list))
    for whole, text in texts.items():
        task = tied[str(whole)]
        everywhere[task].append(text)
        for environment in text.environments:
            inside[environment][task].append(text)
    found: set[int] = set()
    for tasks in (everywhere, *(inside.values() if len(inside) > 1 else ())):
        found |= _shared_by_many(
            ({ngram for text in members for ngram in text.held} for members in tasks.values()), len(tasks)
        )
    return found


def _shared_by_many(tasks: Iterable[Set[int]], number: int) -> set[int]:
    """The n-grams of more than 10 tasks, or of more than half of them and more than two."""
    most = min(MOST_TASKS, max(2, number // 2))
    return {ngram for ngram, count in Counter(ngram for task in tasks for ngram in task).items() if count > most}


def _parts(text: _Text, held: _HeldOutTexts, sizes: Counter[int], common: Set[int]) -> Iterable[tuple[float, int, int]]:
    """How much a text has in common with each row that it overlaps, in n-grams too, and the row, negated."""
    rare = [ngram for ngram in text.held if ngram not in common]
    size = text.size - len(text.held) + len(rare)
    shared = Counter(number for ngram in rare for number in held.owners[ngram])
    for number, count in Counter(number for ngram in text.held for number in held.owners[ngram]).items():
        part = shared[number] / min(size, sizes[number]) if shared[number] else 0.0
        if part >= SHARE:
            yield part, shared[number], -number
        whole = count / held.sizes[number]
        if whole >= WHOLE and shared[number] == sizes[number] and _holds(text, number, held):
            yield whole, count, -number


def _holds(text: _Text, number: int, held: _HeldOutTexts) -> bool:
    """Whether a text that has the n-grams of a row says enough of it: a few words must be half of it."""
    return text.words <= 2 * held.short.get(number, text.words)


def plain_words(text: str) -> list[str]:
    """The words that are compared: lower-cased, without the punctuation around them."""
    return [word.strip(_PUNCTUATION) or word for word in split_words(unicodedata.normalize("NFKC", text).lower())]


def _ngram_hashes(words: Sequence[str]) -> set[int]:
    return {hash_words(words[start : start + NGRAM]) for start in range(len(words) - NGRAM + 1)}


def hash_words(words: Sequence[str]) -> int:
    """64 bits that stand for these words."""
    text = " ".join(words).encode("utf-8", "surrogatepass")
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "big")


def _overlap(index: int, by: Literal["task_key", "input_key", "ngram"], row: HeldOut, share: float = 1.0) -> Overlap:
    return Overlap(index, by, row.file, row.line, share)
