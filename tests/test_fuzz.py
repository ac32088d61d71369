"""Rows from a generator and shipped rows with broken bytes: every line gets one verdict, and what is read is right."""

from __future__ import annotations

import copy
import json
import os
import random
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from gymtrl.rollouts import convert
from gymtrl.rollouts.codec import decode_json
from gymtrl.rollouts.reader import read_at, read_bytes, read_lines
from gymtrl.rollouts.reasons import remedy_for
from gymtrl.rollouts.record import Line, Origin
from gymtrl.rollouts.sidecars import Sidecar
from test_hostile_lines import LINES
from test_lossless import check_items, check_row

MUTATIONS = int(os.environ.get("GYMTRL_FUZZ", "2000"))
BATCH = 200
TOO_DEEP = "nested too deeply"

repeatable = settings(
    max_examples=150, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck)
)
texts = st.text(max_size=6)
said = st.text(min_size=1, max_size=6)
scalars = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | texts
    | st.sampled_from(["\ud800", 10**400, "message", "user", "assistant", "function_call", "input_image", "<think>"])
)
junk = st.recursive(scalars, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=3))
objects = st.dictionaries(texts, st.recursive(st.none() | st.integers() | texts, st.lists, max_leaves=4), max_size=3)
images = st.sampled_from(["data:image/png;base64,AA==", "https://example.org/a.png"]).flatmap(
    lambda url: st.sampled_from([url, {"url": url}])
)
ids = st.integers(0, 10**6).map("call-{}".format)


def text_part(kind: str, text: st.SearchStrategy[str]) -> st.SearchStrategy[dict[str, Any]]:
    return st.builds(lambda text: {"type": kind, "text": text, "annotations": []}, text)


@st.composite
def asked_messages(draw: st.DrawFn) -> dict[str, Any]:
    image = st.builds(lambda url: {"type": "input_image", "image_url": url}, images)
    content = texts | st.lists(text_part("input_text", texts) | image, max_size=3)
    message = {"role": draw(st.sampled_from(["system", "developer", "user"])), "content": draw(content)}
    return draw(st.sampled_from([message, message | {"type": "message", "status": None}]))


@st.composite
def turns(draw: st.DrawFn, last: bool = False) -> list[dict[str, Any]]:
    """What the policy says in one turn, with the answers to its calls; the last turn's may be missing."""
    thoughts = draw(st.lists(texts, max_size=2))
    items: list[dict[str, Any]] = [
        {"type": "reasoning", "id": draw(texts), "summary": [{"type": "summary_text", "text": t} for t in thoughts]}
        for _ in range(draw(st.integers(0, 1)))
    ]
    content = st.lists(text_part("output_text", said), min_size=1, max_size=2) | said
    items.append({"type": "message", "role": "assistant", "content": draw(content), "status": "completed"})
    names = draw(st.lists(ids, max_size=3, unique=True))
    arguments = [draw(objects.map(json.dumps)) for _ in names]
    calls = [
        {"type": "function_call", "call_id": i, "name": "f", "arguments": a}
        for i, a in zip(names, arguments, strict=True)
    ]
    output = texts | st.lists(text_part("input_text", texts), max_size=2) | st.none()
    answers = [
        {"type": "function_call_output", "call_id": i, "output": draw(output)} for i in draw(st.permutations(names))
    ]
    if last and draw(st.booleans()):
        return [*items, *calls]
    return [*items, *calls, *answers, *([] if answers else [draw(asked_messages())])]


@st.composite
def rollouts(draw: st.DrawFn) -> dict[str, Any]:
    """A row that is a conversation."""
    prompt = draw(st.lists(asked_messages(), min_size=1, max_size=3))
    chats = [*draw(st.lists(turns(), max_size=3)), draw(turns(last=True))]
    output = [item | {"id": str(at)} for at, item in enumerate(item for turn in chats for item in turn)]
    for at, item in enumerate(output):  # calls of different turns must differ as well
        if "call_id" in item:
            turn = next(n for n, chat in enumerate(chats) if at < sum(map(len, chats[: n + 1])))
            item["call_id"] = f"{turn}-{item['call_id']}"
    tool = {"type": "function", "name": "f", "parameters": draw(objects), "strict": draw(st.booleans())}
    request: dict[str, Any] = {"input": prompt, "tools": [tool]}
    form = draw(st.sampled_from(["input", "string", "instructions", "head", "transitions"]))
    if form == "string":
        request["input"] = draw(said)
    elif form == "instructions":
        request["instructions"] = draw(texts)
    elif form == "head":
        request["input"], output = [], prompt + output
    elif form == "transitions":
        request["input"], output = [], [[*prompt, *output[:at]] for at in range(len(output) + 1)]
    response = {"output": output, "model": draw(texts), "usage": {"input_tokens": draw(st.integers(0, 500))}}
    more = draw(st.dictionaries(said.map("env_{}".format), junk, max_size=3))
    return more | {"responses_create_params": request, "response": response, "reward": draw(scalars)}


@st.composite
def broken_rollouts(draw: st.DrawFn) -> dict[str, Any]:
    """A row with a few places replaced, taken out or doubled."""
    row = draw(rollouts())
    chance = draw(st.randoms(use_true_random=False))
    for _ in range(draw(st.integers(1, 3))):
        owner, key = chance.choice(list(places(row)))
        action = draw(st.sampled_from(["replace", "nest", "drop", "double"]))
        if action == "replace":
            owner[key] = draw(junk)
        elif action == "nest":
            owner[key] = draw(st.sampled_from([[owner[key]], {"text": owner[key]}, str(owner[key])]))
        elif action == "drop":
            del owner[key]
        elif action == "double" and isinstance(owner, list):
            owner.insert(draw(st.integers(0, len(owner))), owner[key])
    return row


def places(value: Any) -> Iterator[tuple[Any, Any]]:
    if isinstance(value, dict | list):
        for key, inner in list(value.items() if isinstance(value, dict) else enumerate(value)):
            yield value, key
            yield from places(inner)


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("fuzz") / "rollouts.jsonl"


def check_lines(path: Path, data: bytes, *, again: int = 1) -> list[Line]:
    """Reads bytes as a file: there is one known verdict for each line, and what is read is right."""
    path.write_bytes(data)
    lines = list(read_lines([path]))
    offset, physical = 0, []
    for number, raw in enumerate(data.split(b"\n"), 1):
        if raw.strip():
            physical.append((number, offset, raw.rstrip(b"\r")))
        offset += len(raw) + 1
    assert [(line.origin.line, line.origin.offset, line.origin.length) for line in lines] == [
        (number, start, len(raw)) for number, start, raw in physical
    ]
    for at, (line, (_, _, raw)) in enumerate(zip(lines, physical, strict=True)):
        assert bool(remedy_for(line.verdict, line.reason)) == (line.verdict != "ok"), line
        assert (line.rollout is not None) == (line.verdict in ("ok", "context")), line
        line.detail.encode()
        row = check_parsing(line, raw)
        if line.rollout is not None:
            check_items(row, line.rollout)
            check_row(row, line.rollout)
        if at % again == 0:
            assert read_bytes(line.origin) == raw
            assert repr(read_at(line.origin)) == repr(line)  # as text, since NaN is not itself
    return lines


def check_parsing(line: Line, raw: bytes) -> Any:
    """The row as Python's parser reads it: what that cannot read is malformed, and nothing else but the too deep."""
    try:
        row = json.loads(raw)
    except RecursionError:
        return None  # where the two parsers stop differs
    except ValueError:
        assert line.reason == "malformed_json", raw
        return None
    if line.reason == "malformed_json":
        assert line.detail == TOO_DEEP, raw
    else:
        assert (line.reason == "not_object") == (not isinstance(row, dict)), raw
    return row


@repeatable
@given(row=rollouts())
def test_a_generated_conversation_is_read(path: Path, row: dict[str, Any]) -> None:
    (line,) = check_lines(path, json.dumps(row).encode())
    assert line.verdict == "ok", (line, row)


@repeatable
@given(
    rows=st.lists(broken_rollouts() | junk, max_size=3),
    ascii=st.booleans(),
    end=st.sampled_from(["\n", "\r\n", "\n \n"]),
)
def test_a_generated_row_with_faults_gets_a_verdict(path: Path, rows: list[Any], ascii: bool, end: str) -> None:
    texts = [json.dumps(row, ensure_ascii=ascii) for row in rows]
    data = end.join(texts).encode("utf-8", "surrogatepass")
    lines = check_lines(path, data)
    assert len(lines) == len(rows)
    assert repr(list(read_lines([path]))) == repr(lines)


def mutated(line: bytes, chance: random.Random) -> bytes:
    data = bytearray(line)
    for _ in range(chance.choice((1, 1, 1, 2, 4))):
        start, other = sorted(chance.randrange(len(data) + 1) for _ in range(2))
        length = min(chance.choice((1, 1, 4, 30, 300)), len(data) - start)
        action = chance.choice(("flip", "set", "insert", "token", "delete", "repeat", "swap", "cut"))
        if action == "flip" and start < len(data):
            data[start] ^= 1 << chance.randrange(8)
        elif action == "set" and start < len(data):
            data[start] = chance.randrange(256)
        elif action == "insert":
            data[start:start] = chance.randbytes(length)
        elif action == "token":
            data[start : start + chance.randrange(3)] = chance.choice(TOKENS)
        elif action == "delete":
            del data[start : start + length]
        elif action == "repeat":
            data[other:other] = data[start : start + length]
        elif action == "swap" and start + length <= other:
            data[start : start + length], data[other : other + length] = (
                data[other : other + length],
                data[start : start + length],
            )
        elif action == "cut" and chance.random() < 0.3:
            del data[other:]
        if not data:
            break
    return bytes(data)


TOKENS = [*b'{}[]",:\\\n\r\t \0-0', 0xEF, 0xFF]
TOKENS = [bytes([token]) for token in TOKENS] + [
    *(b"null", b"true", b"NaN", b"-Infinity", b"1e999", b"\\ud800", b"\\u0000", b"\r\n", b"{}", b"[]", b'""'),
    *(b'"role"', b'"type"', b'"user"', b'"text"', b"\xef\xbb\xbf", b"\xe2\x80\xa8", b"\xed\xa0\x80", b"[" * 150),
]


def test_shipped_rows_with_broken_bytes_get_their_verdicts(gym_site_packages: Path, path: Path) -> None:
    files = sorted(gym_site_packages.rglob("*rollout*.jsonl"))
    rows = [raw for file in files for raw in file.read_bytes().split(b"\n") if raw.strip() and len(raw) < 30_000]
    chance = random.Random(20_260_101)
    for start in range(0, MUTATIONS, BATCH):
        count = min(BATCH, MUTATIONS - start)
        data = b"\n".join(mutated(chance.choice(rows), chance) for _ in range(count))
        assert check_lines(path, data, again=10)


ODD: list[Any] = [
    *(None, True, 0, 10**400, 0.5, float("nan"), [], {}, [[]], "", "a", "\ud800", "user", "assistant", "message"),
    *("reasoning", "function_call", "function_call_output", "input_image", "input_audio", "refusal", "incomplete"),
    *([{"type": "input_audio"}], [{"type": "input_image", "image_url": "data:,"}], [{"type": "text", "text": "x"}]),
    *({"role": "user", "content": "x"}, {"role": "assistant", "content": "x"}, {"type": "reasoning"}, "{}"),
]
LOOKS: dict[str, Any] = {
    "audio in a call": {"type": "function_call", "call_id": "c", "name": "f", "arguments": "{}", "content": "AUDIO"},
    "audio in an answer's content": {"type": "function_call_output", "call_id": "c", "output": "x", "content": "AUDIO"},
    "audio in an answer": {"type": "function_call_output", "call_id": "c", "output": "AUDIO"},
    "audio in a message": {"role": "user", "content": "AUDIO"},
    "audio in reasoning": {"type": "reasoning", "summary": [], "content": "AUDIO"},
    "audio with a text in reasoning": {"type": "reasoning", "content": [{"type": "input_audio", "text": "x"}]},
    "an image in an answer of an assistant": {
        "type": "function_call_output",
        "call_id": "c",
        "role": "assistant",
        "output": [{"type": "input_image", "image_url": "data:,"}],
    },
}
EXPECTED_LOOKS = {
    "audio in a call": "",
    "audio in an answer's content": "",
    "audio in an answer": "unsupported_modality_audio",
    "audio in a message": "unsupported_modality_audio",
    "audio in reasoning": "unsupported_content_part",
    "audio with a text in reasoning": "",
    "an image in an answer of an assistant": "",
}


def look_row(item: dict[str, Any]) -> bytes:
    """A sound row with an item added, or put in the place of its call or answer."""
    said = {"type": "message", "role": "assistant", "content": "42"}
    called = {"type": "function_call", "call_id": "c", "name": "f", "arguments": "{}"}
    answered = {"type": "function_call_output", "call_id": "c", "output": "42"}
    kinds = ["function_call", "function_call_output"]
    at = kinds.index(item["type"]) if item.get("type") in kinds else 2
    output = [called, answered, said]
    output[at : at + (at < 2)] = [item]
    request = {"input": "6 x 7?", "tools": [{"type": "function", "name": "f"}]}
    row = {"responses_create_params": request, "response": {"output": output}, "reward": 1.0}
    return json.dumps(row).replace('"AUDIO"', '[{"type": "input_audio"}]').encode()


def judged(data: bytes, cluster: str | None = None) -> Line:
    return convert.judge(data, Origin("f", 1, 0, len(data), "id"), Sidecar(None, {}), cluster)


def assert_looks_agree(monkeypatch: pytest.MonkeyPatch, rows: Iterable[bytes]) -> None:
    """Both looks give the same line; a row of which only the first can decode what matters is left out."""
    compared = 0
    for data in rows:
        try:
            decode_json(data)
        except ValueError:
            continue
        for cluster in (None, "agent_ref.name"):
            first = judged(data, cluster)
            with monkeypatch.context() as patch:
                patch.setattr(convert, "decode_row", lambda data: None)
                second = judged(data, cluster)
            assert repr(first) == repr(second), data[:2000]  # as text, since NaN is not itself
        compared += 1
    assert compared


@pytest.mark.parametrize("name", LOOKS)
def test_both_looks_have_one_rule_for_what_a_chat_shows(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    data = look_row(LOOKS[name])
    assert judged(data).reason == EXPECTED_LOOKS[name]
    assert_looks_agree(monkeypatch, [data])


@pytest.mark.parametrize("instructions", [["x" * 5000], {"a": "x" * 5000}, 10**400])
def test_instructions_that_are_no_text_count_for_nothing(monkeypatch: pytest.MonkeyPatch, instructions: Any) -> None:
    row = {
        "responses_create_params": {"input": "6 x 7?", "instructions": instructions},
        "response": {"output": [{"role": "assistant", "content": "42"}], "usage": {"input_tokens": 3000}},
    }
    data = json.dumps(row).encode()
    assert judged(data).reason == "hidden_context"
    assert_looks_agree(monkeypatch, [data])


def test_both_looks_agree_on_shipped_and_hostile_lines(
    monkeypatch: pytest.MonkeyPatch, gym_site_packages: Path
) -> None:
    files = sorted(gym_site_packages.rglob("*rollout*.jsonl"))
    lines = [raw for file in files for raw in file.read_bytes().split(b"\n") if raw.strip()]
    assert_looks_agree(monkeypatch, [*lines, *(data for data, _ in LINES.values())])


def test_both_looks_agree_on_broken_lines(monkeypatch: pytest.MonkeyPatch, gym_site_packages: Path) -> None:
    files = sorted(gym_site_packages.rglob("*rollout*.jsonl"))
    rows = [raw for file in files for raw in file.read_bytes().split(b"\n") if raw.strip() and len(raw) < 30_000]
    sound = [raw for raw in rows if raw.startswith(b"{") and raw.endswith(b"}")]
    chance = random.Random(20_260_102)
    for _ in range(MUTATIONS):
        made = json.loads(chance.choice(sound))
        for _ in range(chance.choice((1, 1, 2))):
            owner, key = chance.choice(list(places(made)))
            # A copy: what is broken again must not break the next row.
            owner[key] = copy.deepcopy(chance.choice([*ODD, [owner[key]], {"text": owner[key]}]))
        assert_looks_agree(monkeypatch, [json.dumps(made).encode()])
    broken = (mutated(chance.choice(rows), chance) for _ in range(MUTATIONS))
    assert_looks_agree(monkeypatch, broken)


@repeatable
@given(row=rollouts() | broken_rollouts())
def test_both_looks_agree_on_generated_rows(row: dict[str, Any]) -> None:
    with pytest.MonkeyPatch.context() as monkeypatch:
        assert_looks_agree(monkeypatch, [json.dumps(row).encode()])
