"""Tool calls read from replies: each family by hand, from what real chat templates write, and from hostile text."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest
import trl
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from gymtrl.serving.chat import call_family
from gymtrl.serving.tool_calls import FAMILIES, ToolCall, read_calls

TEMPLATES = Path(trl.__file__).parent / "chat_templates"
BY_NAME = {family.name: family for family in FAMILIES}
HERMES, QWEN3, MISTRAL, LLAMA = (BY_NAME[name] for name in ("hermes", "qwen3_coder", "mistral", "llama3_json"))
MISTRAL_TEMPLATE = (
    "{% for m in messages %}{% if m.tool_calls %}[TOOL_CALLS] [{% for c in m.tool_calls %}"
    "{% if c.id | length != 9 %}{{ raise_exception('an id has nine characters') }}{% endif %}"
    '{{ c.function | tojson | replace("}}", "}, ") }}"id": "{{ c.id }}"}{{ "" if loop.last else ", " }}{% endfor %}]'
    "{% else %}[INST] {{ m.content }}[/INST]{% endif %}{% endfor %}{{ 'T' if tools }}"
)
NEW_MISTRAL_TEMPLATE = (
    "{% for m in messages %}{{ m.content }}{% for c in m.tool_calls or [] %}"
    "[TOOL_CALLS]{{ c.function.name }}[CALL_ID]{{ c.id }}[ARGS]{{ c.function.arguments | tojson }}"
    "{% endfor %}{% endfor %}</s>"
)
WEATHER: dict[str, Any] = {
    "type": "function",
    "function": {
        "name": "weather",
        "parameters": {
            "type": "object",
            "properties": {
                "city": {"type": "string"},
                "days": {"type": "integer"},
                "parts": {"type": "array"},
                "wind": {"type": "boolean"},
                "unit": {"anyOf": [{"type": "string"}, {"type": "null"}]},
                "share": {"type": ["number", "null"]},
                "any": True,
                "place": {"type": "object"},
            },
        },
    },
}


def template_tokenizer(template: str) -> PreTrainedTokenizerFast:
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(WordLevel({"<unk>": 0}, unk_token="<unk>")), unk_token="<unk>", bos_token="<s>"
    )
    tokenizer.chat_template = template
    return tokenizer


@pytest.mark.parametrize(
    ("family", "text", "before", "calls"),
    [
        (
            HERMES,
            'Two:\n<tool_call>\n{"name": "a", "arguments": {"é": 1}}\n</tool_call>\n'
            '<tool_call>{"name": "b", "arguments": {}}</tool_call> dropped',
            "Two:",
            [("a", {"é": 1}), ("b", {})],
        ),
        (HERMES, '<tool_call>{"name": "a", "arguments": {}}', "", [("a", {})]),
        (LLAMA, '<|python_tag|>{"name": "a", "parameters": {"q": {"r": "{"}}}', "", [("a", {"q": {"r": "{"}})]),
        (LLAMA, '{"name": "a", "arguments": {}}; {"name": "b", "parameters": {}}', "", [("a", {}), ("b", {})]),
        (
            MISTRAL,
            'So: [TOOL_CALLS] [{"name": "a", "arguments": {"x": [1]}, "id": "abcdefghi"}, {"name": "b"}]',
            "So:",
            [("a", {"x": [1]}), ("b", {})],
        ),
        (MISTRAL, '[TOOL_CALLS]a[ARGS]{"x": 1}[TOOL_CALLS]b{"y": {}}', "", [("a", {"x": 1}), ("b", {"y": {}})]),
        (
            QWEN3,
            "Well.\n<tool_call>\n<function=weather>\n<parameter=city>\nBad\nEms\n</parameter>\n<parameter=days>\n3\n"
            "</parameter>\n<parameter=parts>\n[1, 2]\n</parameter>\n<parameter=wind>\nTrue\n</parameter>\n"
            "<parameter=unit>\nNone\n</parameter>\n<parameter=share>\nnull\n</parameter>\n<parameter=any>\n1\n"
            "</parameter>\n</function>\n</tool_call>",
            "Well.",
            [
                (
                    "weather",
                    {
                        "city": "Bad\nEms",
                        "days": 3,
                        "parts": [1, 2],
                        "wind": True,
                        "unit": None,
                        "share": None,
                        "any": "1",
                    },
                )
            ],
        ),
        (
            QWEN3,
            "<tool_call><function=weather><parameter=city>3</parameter><parameter=days>three</parameter>"
            "</function></tool_call><tool_call><function=other></function></tool_call>",
            "",
            [("weather", {"city": "3", "days": "three"}), ("other", {})],
        ),
        (
            QWEN3,
            "<tool_call><function=weather><parameter=city>None</parameter><parameter=days>None</parameter>"
            "<parameter=parts>['a', None]</parameter><parameter=place>{'é': True}</parameter></function></tool_call>"
            "<tool_call><function=weather><parameter=parts>{1, 2}</parameter><parameter=place>f(1)</parameter>"
            "</function></tool_call>",
            "",
            [
                ("weather", {"city": "None", "days": None, "parts": ["a", None], "place": {"é": True}}),
                ("weather", {"parts": "{1, 2}", "place": "f(1)"}),
            ],
        ),
    ],
)
def test_calls_are_read(family: Any, text: str, before: str, calls: list[tuple[str, Any]]) -> None:
    wanted = [ToolCall(name, json.dumps(arguments, ensure_ascii=False)) for name, arguments in calls]
    assert read_calls(text, family, [WEATHER]) == (before, wanted)


@pytest.mark.parametrize(
    ("family", "text"),
    [
        (HERMES, "plain "),
        (HERMES, "<tool_call>[1]</tool_call>"),
        (HERMES, '<tool_call>{"name": 1, "arguments": {}}</tool_call>'),
        (HERMES, '<tool_call>{"name": "a"}</tool_call>'),
        (HERMES, '<tool_call>{"name": "a", "arguments": "{}"}</tool_call>'),
        (HERMES, '<tool_call>{"name": "a", "arguments": {'),
        (HERMES, '<tool_call>{"name": "a", "arguments": {}}</tool_call><tool_call>no</tool_call>'),
        (LLAMA, 'the set {1} of {"name": "a", "parameters": {}}'),
        (LLAMA, '{"name": "a", "parameters": {}}; {"colour": "red"}'),
        (LLAMA, '{"name": "a", "parameters": 3}'),
        (MISTRAL, '[TOOL_CALLS] [{"name": "a", "arguments"'),
        (MISTRAL, '[TOOL_CALLS] ["a"]'),
        (MISTRAL, '[TOOL_CALLS]a{"x": 1}[TOOL_CALLS]b'),
        (MISTRAL, '[TOOL_CALLS]{"x": 1}'),
        (QWEN3, '<tool_call>{"name": "weather", "arguments": {}}</tool_call>'),
        (QWEN3, "<tool_call><function=weather><parameter=city>Ems</function></tool_call>"),
        (QWEN3, "<tool_call><function=weather><parameter=city>Ems</parameter></tool_call>"),
    ],
)
def test_what_is_malformed_stays_text(family: Any, text: str) -> None:
    assert read_calls(text, family, [WEATHER]) == (text, [])


@pytest.mark.parametrize(
    "arguments",
    [
        '{"a": "\\ud800"}',
        '{"a": NaN}',
        '{"a": 1e999}',
        '{"a": -Infinity}',
        '{"a": ' + "[" * 100_000 + "]" * 100_000 + "}",
    ],
    ids=["surrogate", "nan", "overflow", "infinity", "depth"],
)
@pytest.mark.parametrize("family", [HERMES, MISTRAL, LLAMA], ids=lambda family: family.name)
def test_calls_that_cannot_be_sent_on_stay_text(family: Any, arguments: str) -> None:
    call = f'{{"name": "a", "arguments": {arguments}}}'
    text = {"hermes": f"<tool_call>{call}</tool_call>", "mistral": f"[TOOL_CALLS][{call}]", "llama3_json": call}
    assert read_calls(text[family.name], family) == (text[family.name], [])


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
def test_hostile_replies_are_read_in_linear_time(family: Any) -> None:
    parts = ("<tool_call>", "<tool_call> \n", "[TOOL_CALLS]", "{", '{"a":', "<function=", "<tool_call><function=a>")
    start = time.process_time()
    for part in (*parts, "<tool_call><function=a><parameter=b>"):
        text = part * 10_000
        assert read_calls(text, family) == (text, [])
    assert time.process_time() - start < 2


def test_arguments_that_nest_too_deep_for_python_stay_text() -> None:
    value = "{'a': " + "[" * 100_000 + "]" * 100_000 + "}"
    text = f"<tool_call><function=weather><parameter=place>{value}</parameter></function></tool_call>"
    (call,) = read_calls(text, QWEN3, [WEATHER])[1]
    assert json.loads(call.arguments) == {"place": value}


TRL_TEMPLATES = {
    "qwen2_5": HERMES,
    "qwen3": HERMES,
    "qwen3_instruct_2507": HERMES,
    "qwen3_vl": HERMES,
    "llama3_1": LLAMA,
    "llama3_2": LLAMA,
    "qwen3_5_think": QWEN3,
    "qwen3_6": QWEN3,
    "nemotron_3_nano": QWEN3,
    "nemotron_3_super": QWEN3,
    # No tools at all; calls in ways of their own.
    "gemma": None,
    "llama3": None,
    "gptoss": None,
    "glm4moe": None,
    "deepseekv3": None,
}


@pytest.mark.parametrize("name", TRL_TEMPLATES)
def test_the_template_tells_the_family(name: str) -> None:
    template = (TEMPLATES / f"{name}.jinja").read_text()
    assert call_family(template_tokenizer(template)) is TRL_TEMPLATES[name]


def test_mistrals_templates_tell_the_family() -> None:
    for template in (MISTRAL_TEMPLATE, NEW_MISTRAL_TEMPLATE):
        assert call_family(template_tokenizer(template)) is MISTRAL


def test_the_small_models_families(smollm2_dir: Path, smollm2_tools_dir: Path) -> None:
    assert call_family(AutoTokenizer.from_pretrained(smollm2_dir)) is None
    assert call_family(AutoTokenizer.from_pretrained(smollm2_tools_dir)) is HERMES


@pytest.mark.parametrize("name", [name for name, family in TRL_TEMPLATES.items() if family])
def test_what_a_template_writes_comes_back(name: str) -> None:
    family = TRL_TEMPLATES[name]
    assert family is not None
    tokenizer = template_tokenizer((TEMPLATES / f"{name}.jinja").read_text())
    arguments = {"city": 'Saint "X"\n{é} </b>', "days": 3, "parts": [1, {"a": None}], "wind": False}
    call = {"id": family.call_id(), "type": "function", "function": {"name": "weather", "arguments": arguments}}
    turn = {"role": "assistant", "content": "", "tool_calls": [call]}
    text = tokenizer.apply_chat_template([{"role": "user", "content": "q"}, turn], tools=[WEATHER], tokenize=False)
    reply = text[text.rindex('{"name": "weather"' if family is LLAMA else "<tool_call>") :]
    assert read_calls(reply, family, [WEATHER])[1] == [ToolCall("weather", json.dumps(arguments, ensure_ascii=False))]


def test_ids_are_what_the_templates_take() -> None:
    assert len({family.call_id() for family in FAMILIES for _ in range(50)}) == 50 * len(FAMILIES)
    made = MISTRAL.call_id()
    assert len(made) == 9 and made.isalnum()
