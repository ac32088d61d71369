"""A large rollout file made of the rollout files that nemo-gym ships.

Run as: python benchmarks/corpus.py SITE_PACKAGES OUT.jsonl [--size 0.6e9]

Every line of every `*rollout*.jsonl` is repeated, in an order that is drawn anew for each repetition, until the size is
reached. So that the file is no more repetitive than a collection is, eight successive repetitions of a line are the
eight rollouts of a task of their own: the first user message ends in the number of the task, ` [17]`, the last text of
the policy begins with that of the repetition, `[17.3] `, and the two indexes, where the line has them, say the same.
A line that is no rollout stays as it is. Lines are written as their source was: escapes and separators are kept.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

REPEATS = 8
# Stand-ins that are replaced in the encoded line; each is plain ASCII, so that it looks the same however it is encoded.
_TASK, _REPEAT = "qzTASKzq", "qzREPEATzq"
_INDEXES = {"_ng_task_index": "qzTASKINDEXzq", "_ng_rollout_index": "qzREPEATINDEXzq"}
_TEXT_PARTS = ("input_text", "output_text", "text", "summary_text", "reasoning_text")

Edit = Callable[[str], str]


def source_lines(site_packages: Path) -> list[bytes]:
    """Lines of all shipped rollout files that are not blank, in the order of their paths."""
    files = sorted(site_packages.rglob("*rollout*.jsonl"), key=lambda path: path.relative_to(site_packages).as_posix())
    lines = [line.rstrip(b"\r\n") for file in files for line in file.read_bytes().split(b"\n")]
    return [line for line in lines if line.strip()]


def source_digest(sources: list[bytes]) -> str:
    """16 hex digits that are the same for the same source lines."""
    return hashlib.sha256(b"\n".join(sources)).hexdigest()[:16]


def build_corpus(site_packages: Path, out: Path, size: float) -> Path:
    """Writes the corpus, the same for the same arguments.

    Args:
        site_packages (`Path`): Folder below which nemo-gym is installed.
        out (`Path`): File to write; absent until it is whole.
        size (`float`): Bytes to reach.

    Returns:
        `Path`: `out`.
    """
    out.parent.mkdir(parents=True, exist_ok=True)
    partial = out.with_name(f".{out.name}.partial")
    written = 0
    with partial.open("wb") as target:
        for line in corpus_lines(source_lines(site_packages)):
            written += target.write(line + b"\n")
            if written >= size:
                break
    partial.rename(out)
    return out


def corpus_lines(sources: list[bytes]) -> Iterator[bytes]:
    """Lines of the corpus, without end."""
    if not sources:
        raise SystemExit("no *rollout*.jsonl was found")
    templates = [template(line) for line in sources]
    order = list(range(len(templates)))
    draw = random.Random(0)
    repetition = 0
    while True:
        draw.shuffle(order)
        task, repeat = divmod(repetition, REPEATS)
        for number in order:
            yield fill(templates[number], task, repeat, index=task * len(order) + number)
        repetition += 1


def template(line: bytes) -> bytes:
    """A line with stand-ins for what tells its repetitions apart; a line that is no rollout as it is."""
    try:
        row = json.loads(line)
    except ValueError:
        return line
    if not isinstance(row, dict) or row.get("_ng_failure_class") is not None:
        return line
    request, response = row.get("responses_create_params"), row.get("response")
    if not isinstance(request, dict) or not isinstance(response, dict):
        return line
    encode = _encoder(line, row)
    _mark_prompt(request, response)
    _mark_completion(response)
    for key, stand_in in _INDEXES.items():
        if type(row.get(key)) is int:
            row[key] = stand_in
    return encode(row)


def fill(line: bytes, task: int, repeat: int, *, index: int) -> bytes:
    """A line of the corpus."""
    line = line.replace(_TASK.encode(), b"%d" % task).replace(_REPEAT.encode(), b"%d" % repeat)
    for stand_in, number in zip(_INDEXES.values(), (index, repeat), strict=True):
        line = line.replace(b'"%s"' % stand_in.encode(), b"%d" % number)
    return line


def _encoder(line: bytes, row: Any) -> Callable[[Any], bytes]:
    """The encoder that gives the line back, or comes as close to it as can be."""

    def encoder(ascii_only: bool, separators: tuple[str, str]) -> Callable[[Any], bytes]:
        return lambda value: json.dumps(value, ensure_ascii=ascii_only, separators=separators).encode(
            "utf-8", "surrogatepass"
        )

    spaced, compact = (", ", ": "), (",", ":")
    for ascii_only in (True, False):
        for separators in (spaced, compact):
            if encoder(ascii_only, separators)(row) == line:
                return encoder(ascii_only, separators)
    return encoder(line.isascii(), spaced if b'": ' in line[:1000] else compact)


def _mark_prompt(request: dict[str, Any], response: dict[str, Any]) -> None:
    def edit(text: str) -> str:
        return f"{text} [{_TASK}]"

    given = request.get("input")
    if isinstance(given, str):
        request["input"] = edit(given)
    elif not any(_edit_item(item, edit, "user") for item in (given if isinstance(given, list) else ())):
        _edit_output(response, edit, "user", last=False)


def _mark_completion(response: dict[str, Any]) -> None:
    def edit(text: str) -> str:
        return f"[{_TASK}.{_REPEAT}] {text}"

    if not _edit_output(response, edit, "assistant", last=True):
        _edit_output(response, edit, "", last=True)  # there is reasoning only


def _edit_output(response: dict[str, Any], edit: Edit, role: str, *, last: bool) -> bool:
    """Edits the first or last text of a speaker; in cumulative transitions wherever the item is repeated."""
    output = response.get("output")
    if not isinstance(output, list) or not output:
        return False
    nested = all(isinstance(item, list) for item in output)
    items = output[-1] if nested else output
    for place in sorted(range(len(items)), reverse=last):
        before = json.dumps(items[place])
        if _edit_item(items[place], edit, role):
            for earlier in output[:-1] if nested else ():
                if len(earlier) > place and json.dumps(earlier[place]) == before:
                    earlier[place] = items[place]
            return True
    return False


def _edit_item(item: Any, edit: Edit, role: str) -> bool:
    """Edits the text of a message of that role, or, without a role, of a reasoning; whether there was one."""
    if not isinstance(item, dict):
        return False
    if role:
        fields = ("content",) if item.get("type", "message") == "message" and item.get("role") == role else ()
    else:
        fields = ("content", "summary") if item.get("type") == "reasoning" else ()
    for field in fields:
        content = item.get(field)
        if isinstance(content, str) and content.strip():
            item[field] = edit(content)
            return True
        for part in content if isinstance(content, list) else ():
            text = part.get("text") if isinstance(part, dict) and part.get("type") in _TEXT_PARTS else None
            if isinstance(text, str) and text.strip():
                part["text"] = edit(text)
                return True
    return False


def main() -> None:
    """Writes one corpus."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("site_packages", type=Path, help="folder below which nemo-gym is installed")
    parser.add_argument("out", type=Path, help="file to write")
    parser.add_argument("--size", type=float, default=0.6e9, help="bytes (default: 0.6e9)")
    options = parser.parse_args()
    print(build_corpus(options.site_packages, options.out, options.size))


if __name__ == "__main__":
    main()
