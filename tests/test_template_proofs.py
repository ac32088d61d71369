"""The mask engine with every chat template of TRL: what is trained is, character for character, what the policy said.

How each template spells a turn is written here once more, by hand, apart from the templates and from the engine.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from functools import cache
from typing import Any

import pytest

from conversations import CONVERSATIONS, INST, UNKNOWN, trl_sources, with_source, word_tokenizer
from gymtrl.formats.checks import IGNORED, Refusal, Tokenized
from gymtrl.formats.example import Example, replace_reasoning, whole, without_reasoning
from gymtrl.formats.masks import tokenize
from gymtrl.formats.rows import rows_of
from gymtrl.formats.templates import ModelTemplate
from gymtrl.rollouts.record import Message, ToolCall

Spelling = Callable[[Message, bool], str]
"""A turn, and whether the prompt switched thinking off → what the model has to produce."""


def dumped(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)


def as_said(text: str) -> str:
    return text


def scalar(value: Any) -> str:
    """Containers as JSON, all else as Python prints it."""
    return dumped(value) if isinstance(value, dict | list) else str(value)


def bare(value: Any) -> str:
    return value if isinstance(value, str) else dumped(value)


def plain(end: str, content: Callable[[str], str] = as_said) -> Spelling:
    return lambda turn, off: content(turn.content) + end


def hermes(thoughts: bool = False, content: Callable[[str], str] = as_said) -> Spelling:
    def spelled(turn: Message, off: bool) -> str:
        thought = f"<think>\n{turn.reasoning_content}\n</think>\n\n" if thoughts and turn.reasoning_content else ""
        calls = [
            f'<tool_call>\n{{"name": "{call.name}", "arguments": {dumped(call.arguments)}}}\n</tool_call>'
            for call in turn.tool_calls
        ]
        return thought + "\n".join([content(turn.content)] * bool(turn.content) + calls) + "<|im_end|>"

    return spelled


def function_tags(call: ToolCall, value: Callable[[Any], str]) -> str:
    arguments = "".join(f"<parameter={k}>\n{value(v)}\n</parameter>\n" for k, v in call.arguments.items())
    return f"<tool_call>\n<function={call.name}>\n{arguments}</function>\n</tool_call>"


def qwen_tags(value: Callable[[Any], str], *, always_thinks: bool = False) -> Spelling:
    def spelled(turn: Message, off: bool) -> str:
        thinks = always_thinks or turn.reasoning_content
        thought = f"{turn.reasoning_content or ''}\n</think>\n\n" if thinks else ""
        calls = "\n".join(function_tags(call, value) for call in turn.tool_calls)
        return thought + "\n\n".join(filter(None, [turn.content.strip(), calls])) + "<|im_end|>"

    return spelled


def nemotron(after_thought: str) -> Spelling:
    def spelled(turn: Message, off: bool) -> str:
        said = f"{turn.reasoning_content}{after_thought}" if turn.reasoning_content else ""
        said = (said + turn.content).rstrip()
        calls = "".join(function_tags(call, scalar) + "\n" for call in turn.tool_calls)
        return said + ("\n" + calls if calls else "") + "<|im_end|>"

    return spelled


def glm(turn: Message, off: bool) -> str:
    said = f"\n<think>{turn.reasoning_content or ''}</think>" + ("\n" + turn.content.strip() if turn.content else "")
    for call in turn.tool_calls:
        pairs = (f"<arg_key>{k}</arg_key>\n<arg_value>{bare(v)}</arg_value>\n" for k, v in call.arguments.items())
        said += f"\n<tool_call>{call.name}\n{''.join(pairs)}</tool_call>"
    return said + ("<|observation|>" if turn.tool_calls else "<|user|>")


def pythonic(value: Callable[[Any], str]) -> Spelling:
    def spelled(turn: Message, off: bool) -> str:
        said = f"<think>{turn.reasoning_content}</think>" if turn.reasoning_content else ""
        calls = [
            f"{call.name}({', '.join(f'{k}={value(v)}' for k, v in call.arguments.items())})"
            for call in turn.tool_calls
        ]
        said += turn.content + (f"<|tool_call_start|>[{', '.join(calls)}]<|tool_call_end|>" if calls else "")
        return said + "<|im_end|>"

    return spelled


def between_quotes(value: Any) -> str:
    return f"'{value}'" if isinstance(value, str) else dumped(value) if isinstance(value, dict) else str(value)


def escaped(value: Any) -> str:
    if not isinstance(value, str):
        return scalar(value)
    return "'" + value.replace("\\", "\\\\").replace("'", "\\'").replace("\n", "\\n") + "'"


def gemma(none: str, call_end: str) -> Spelling:
    def value(of: Any) -> str:
        if isinstance(of, str):
            return f'<|"|>{of}<|"|>'
        if isinstance(of, dict):
            return "{" + ",".join(f"{k}:{value(v)}" for k, v in sorted(of.items())) + "}"
        if isinstance(of, list):
            return "[" + ",".join(map(value, of)) + "]"
        return none if of is None else dumped(of)

    def spelled(turn: Message, off: bool) -> str:
        said = f"<|channel>thought\n{turn.reasoning_content}\n<channel|>" if turn.reasoning_content else ""
        said += "".join(f"<|tool_call>call:{c.name}{value(c.arguments)}<tool_call|>" for c in turn.tool_calls)
        return said + turn.content.strip() + (call_end if turn.tool_calls else "<turn|>")

    return spelled


def gptoss(turn: Message, off: bool) -> str:
    thought = turn.reasoning_content
    said = f"<|channel|>analysis<|message|>{thought}<|end|><|start|>assistant" if thought else ""
    if not turn.tool_calls:
        return said + f"<|channel|>final<|message|>{turn.content}<|return|>"
    (call,) = turn.tool_calls
    assert not turn.content
    return said + f" to=functions.{call.name}<|channel|>commentary json<|message|>{dumped(call.arguments)}<|call|>"


def muse(turn: Message, off: bool) -> str:
    said = [f" to=self<|message|>{turn.reasoning_content}"] if turn.reasoning_content else []
    for call in turn.tool_calls:
        pairs = (f'<atem:parameter name="{k}">{bare(v)}</atem:parameter>\n' for k, v in call.arguments.items())
        inner = f'<atem:function_calls>\n<atem:invoke name="{call.name}">\n{"".join(pairs)}</atem:invoke>\n'
        said.append(f" to={call.name}<|message|>{inner}</atem:function_calls>")
    if not turn.tool_calls:
        said.append(f" to=user<|message|>{turn.content}")
    return "<|eom|><|start|>assistant".join(said) + "<|eot|>"


def llama(turn: Message, off: bool) -> str:
    if not turn.tool_calls:
        return turn.content.strip() + "<|eot_id|>"
    (call,) = turn.tool_calls
    return f'{{"name": "{call.name}", "parameters": {dumped(call.arguments)}}}<|eot_id|>'


def unknown(turn: Message, off: bool) -> str:
    said = f"({turn.reasoning_content}) " if turn.reasoning_content else ""
    calls = (f" !{call.name} {dumped(call.arguments)}" for call in turn.tool_calls)
    return said + turn.content + "".join(calls) + "<|im_end|>"


SPELLINGS: dict[str, Spelling] = {
    "SmolLM2": plain("<|im_end|>"),
    "unknown": unknown,
    "inst": lambda turn, off: f" {turn.content} <|im_end|>",
    "cohere": plain("<|END_OF_TURN_TOKEN|>", str.strip),
    "cohere2": plain("<|END_RESPONSE|><|END_OF_TURN_TOKEN|>"),
    "gemma": plain("<end_of_turn>", str.strip),
    "gemma3": plain("<end_of_turn>", str.strip),
    "gemma4": gemma("None", "<|tool_response>"),
    "gemma4_v2": gemma("None", "<turn|>"),
    "gemma4_v3": gemma("None", "<|tool_response>"),
    "gemma4_v4": gemma("None", "<|tool_response>"),
    "gemma4_v5": gemma("null", "<|tool_response>"),
    "diffusion_gemma": gemma("null", "<|tool_response>"),
    "glm4moe": glm,
    "gptoss": gptoss,
    "lfm2": plain("<|im_end|>"),
    "lfm2_v2": pythonic(escaped),
    "lfm2_2_5": pythonic(between_quotes),
    "lfm2_2_5_v2": pythonic(between_quotes),
    "lfm2_2_5_vl": pythonic(escaped),
    "llama3": plain("<|eot_id|>", str.strip),
    "llama3_1": llama,
    "llama3_2": llama,
    "muse_glimmer": muse,
    "nemotron_3_nano": nemotron("\n</think>\n"),
    "nemotron_3_super": nemotron("\n</think>\n"),
    "nemotron_3_ultra": nemotron("</think>"),
    "nemotron_3_5_lightning": nemotron("</think>"),
    "phi3": plain("<|end|>"),
    "phi3_5": plain("<|end|>"),
    "qwen2_5": hermes(),
    "qwen2_5_vl": plain("<|im_end|>"),
    "qwen3": hermes(thoughts=True, content=lambda text: text.lstrip("\n")),
    "qwen3_instruct_2507": hermes(),
    "qwen3_vl": hermes(),
    "qwen3_5_think": qwen_tags(scalar),
    "qwen3_5_nothink": qwen_tags(scalar),
    "qwen3_6": qwen_tags(bare),
    "qwen3_8": qwen_tags(bare, always_thinks=True),
}
"""How templates spell turns; those that are not here can hold no conversation at all."""

SPACED = " with a space before every text"
for _name in ("unknown", "inst"):
    SPELLINGS[_name + SPACED] = lambda turn, off, one=SPELLINGS[_name]: one(turn, off).replace("<|im_end|>", "</s>")

FOREIGN = ("Asked", "Ruled", "Got", "Old", "Declared")
"""Words of users, system messages, tools, earlier turns and declarations."""


@pytest.fixture(scope="session")
def template_of(smollm2_dir: Any) -> Callable[[str], ModelTemplate]:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(smollm2_dir)
    sources = {"SmolLM2": tokenizer.chat_template, "unknown": UNKNOWN, "inst": INST, **trl_sources()}
    words = cache(word_tokenizer)
    return cache(
        lambda name: with_source(words() if name.endswith(SPACED) else tokenizer, sources[name.removesuffix(SPACED)])
    )


def to_dicts(messages: tuple[Message, ...], *, developer: str) -> list[dict[str, Any]]:
    chat = []
    for message in messages:
        role = developer if message.role == "developer" else message.role
        entry: dict[str, Any] = {"role": role, "content": message.content}
        if message.reasoning_content is not None:
            entry["reasoning_content"] = message.reasoning_content
        if message.tool_calls:
            entry["tool_calls"] = [
                {"id": c.id, "type": "function", "function": {"name": c.name, "arguments": c.arguments}}
                for c in message.tool_calls
            ]
        if message.role == "tool":
            entry |= {"tool_call_id": message.tool_call_id, "name": message.name}
        chat.append(entry)
    return chat


def server_prompts(example: Example, position: int, tokens: Tokenized, template: ModelTemplate) -> list[list[int]]:
    """What a server may have sent before a turn: as usual, and where the row says so with thinking switched off."""
    developer = "system" if "developer_as_system" in tokens.flags else "developer"
    chat = to_dicts(example.messages[:position], developer=developer)
    ways: list[dict[str, bool]] = [{}, {"enable_thinking": False}] if "thinking_off" in tokens.flags else [{}]
    return [
        list(
            template.tokenizer.apply_chat_template(
                chat, tools=list(example.tools) or None, add_generation_prompt=True, return_dict=False, **way
            )
        )
        for way in ways
    ]


def prove(
    tokens: Tokenized, example: Example, template: ModelTemplate, spelling: Spelling, *, loses_reasoning: bool = False
) -> None:
    """Every turn of the completion is trained once, as the template spells it, after what a server sends."""
    ids = tokens.input_ids
    assert len(tokens.labels) == len(ids) and len(tokens.spans) == len(example.turns) > 0
    trained = [i for i, label in enumerate(tokens.labels) if label != IGNORED]
    assert trained == [i for start, end in tokens.spans for i in range(start, end)]
    assert all(tokens.labels[i] == ids[i] for i in trained)
    for (start, end), position in zip(tokens.spans, example.turn_positions(), strict=True):
        prompts = server_prompts(example, position, tokens, template)
        assert ids[:start] in prompts
        turn = example.messages[position]
        off = ids[:start] != prompts[0]
        assert not (off and turn.reasoning_content), "thinking was switched off before a thought"
        before, after = (template.decode(ids[:stop], skip_special=False) for stop in (start, end))
        said = after.removeprefix(before)
        assert said in [spelling(one, off) for one in (turn, *([replace_reasoning(turn)] if loses_reasoning else []))]
        assert not any(word in said for word in FOREIGN)


def is_true(reason: str, example: Example, template: ModelTemplate) -> bool:
    """Whether a refusal is warranted: told from what the template renders up to each turn, and from nothing else."""
    if reason == "truncated":
        return example.truncated
    if reason == "images_in_text_model":
        return any(message.images for message in example.messages)
    tools, render = list(example.tools) or None, template.tokenizer.apply_chat_template
    turns: list[tuple[Message, list[str], str]] = []
    for position in example.turn_positions():
        chat = to_dicts(example.messages[: position + 1], developer="developer" if template.developer else "system")
        ways: list[dict[str, bool]] = [{}, {"enable_thinking": False}]
        try:
            prompts = [render(chat[:-1], tools=tools, tokenize=False, add_generation_prompt=True, **w) for w in ways]
            turns.append((example.messages[position], prompts, str(render(chat, tools=tools, tokenize=False))))
        except Exception:
            if reason in ("template_error", "template_without_tools"):
                return True
    spoken = [
        all(word in text[len(prompts[0]) - 1 :] for word in (turn.content.strip(), *(c.name for c in turn.tool_calls)))
        for turn, prompts, text in turns
    ]
    if reason == "template_without_tools":
        words = [tool["function"]["name"] for tool in example.tools]
        words += [message.content for message in example.messages if message.role == "tool"]
        return not all(spoken) or not all(word in turns[-1][2] for word in words)
    if reason == "reasoning_lost":
        return any((turn.reasoning_content or "") not in text for turn, _, text in turns)
    if reason in ("loss_text_differs", "turn_end_missing"):
        return not all(spoken)
    # A prompt that the text up to the turn does not begin with, or a header that the prompt should have held.
    return reason == "template_not_prefix_preserving" and any(
        not any(text.startswith(prompt) and not text[len(prompt) :].startswith("<|turn>model") for prompt in prompts)
        for _, prompts, text in turns
    )


@pytest.mark.parametrize("conversation", CONVERSATIONS)
@pytest.mark.parametrize("name", [*SPELLINGS, *sorted(trl_sources().keys() - SPELLINGS)])
def test_what_is_trained_is_what_the_policy_said(
    name: str, conversation: str, template_of: Callable[[str], ModelTemplate]
) -> None:
    template, rollout = template_of(name), CONVERSATIONS[conversation]
    (rows,) = rows_of([rollout], template)
    example = whole(rollout)
    assert isinstance(rows, Refusal) or conversation not in ("truncated", "image")
    at_once = tokenize(example, template)
    if isinstance(at_once, Tokenized):
        prove(at_once, example, template, SPELLINGS[name])
    if isinstance(rows, Refusal):
        assert isinstance(at_once, Refusal)
        assert is_true(rows.reason, example, template), rows
        return
    for row in rows:
        prove(row.tokens, row.example, template, SPELLINGS[name])
    turns = [turn for row in rows for turn in row.example.turns]
    assert turns == [message for message in rollout.completion if message.role == "assistant"]
    for row in rows:
        assert row.example.messages == example.messages[: len(row.example.messages)]
    # The same example gives the same tokens to every objective.
    for row in rows:
        alone = tokenize(row.example, template)
        assert alone == row.tokens
    if len(rows) == 1 and isinstance(at_once, Tokenized):
        assert at_once == rows[0].tokens


@pytest.mark.parametrize(
    ("name", "ends"),
    [
        ("qwen3", set()),
        ("cohere2", {"<|END_RESPONSE|>", "<|END_OF_TURN_TOKEN|>"}),
        ("gptoss", {"<|return|>", "<|call|>"}),
        ("glm4moe", {"<|user|>", "<|observation|>"}),
        ("gemma4", {"<turn|>", "<|tool_response>"}),
        ("muse_glimmer", {"<|eot|>"}),
        ("smolvlm", set()),
    ],
)
def test_tokens_that_end_a_turn(name: str, ends: set[str], template_of: Callable[[str], ModelTemplate]) -> None:
    assert set(template_of(name).end_marks) == ends | {"<|im_end|>"}


@pytest.mark.parametrize("reasoning", ["drop", "template"])
@pytest.mark.parametrize("conversation", [name for name in CONVERSATIONS if "reasoning" in name])
@pytest.mark.parametrize("name", SPELLINGS)
def test_reasoning_that_goes_leaves_the_rest_as_it_is(
    name: str, conversation: str, reasoning: Any, template_of: Callable[[str], ModelTemplate]
) -> None:
    template, rollout = template_of(name), CONVERSATIONS[conversation]
    (rows,) = rows_of([rollout], template, reasoning=reasoning)
    if isinstance(rows, Refusal):
        bare = without_reasoning(whole(rollout)) if reasoning == "drop" else whole(rollout)
        assert is_true(rows.reason, bare, template), rows
        return
    for row in rows:
        example = without_reasoning(row.example) if reasoning == "drop" else row.example
        prove(row.tokens, example, template, SPELLINGS[name], loses_reasoning=reasoning == "template")
    assert sum(len(row.example.turns) for row in rows) == len(whole(rollout).turns)


ANSWERED = (
    "{% if tools %}{{ tools | tojson }}{% endif %}{% for m in messages %}{% if m.role == 'user' %}"
    "<|im_start|>user\n{{ m.content }}<|im_end|>\n{% elif m.role == 'assistant' %}<|im_start|>assistant\n"
    "{% generation %}{{ m.content }}{% for c in m.tool_calls or [] %} !{{ c.function.name }} "
    "{{ c.function.arguments | tojson }}{% endfor %}{% if loop.nextitem is defined and loop.nextitem.role == 'tool' %}"
    " = {{ loop.nextitem.content }}{% endif %}<|im_end|>{% endgeneration %}\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
"""Writes a tool's answer into the turn that called it, and marks all of that as the assistant's."""


def test_a_tool_s_answer_within_a_marked_turn_is_not_trained(template_of: Callable[[str], ModelTemplate]) -> None:
    template = with_source(template_of("SmolLM2").tokenizer, ANSWERED)
    assert template.marked == ANSWERED and template.tools
    (rows,) = rows_of([CONVERSATIONS["tool loop of three turns"]], template)
    assert isinstance(rows, Refusal) and rows.reason == "loss_text_differs"
    (rows,) = rows_of([CONVERSATIONS["simulated user"]], template)
    assert isinstance(rows, list) and len(rows) == 2


def test_prompts_that_are_other_tokens_once_words_follow(template_of: Callable[[str], ModelTemplate]) -> None:
    from tokenizers import pre_tokenizers

    tokenizer = copy.deepcopy(template_of("SmolLM2").tokenizer)
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    example = whole(CONVERSATIONS["single turn"])
    # One line break before the answer is one token in any case; of two, the last goes with the words.
    one = with_source(tokenizer, template_of("SmolLM2").stock)
    made = tokenize(example, one)
    assert not one.piecewise and isinstance(made, Tokenized)
    assert made.input_ids[: made.spans[0][0]] in server_prompts(example, 1, made, one)
    two = tokenize(example, with_source(tokenizer, template_of("llama3").stock))
    assert isinstance(two, Refusal) and two.reason == "template_not_prefix_preserving"
