"""The mask engine with every chat template of TRL: what is trained is, character for character, what the policy said.

How each template spells a turn is written by hand in `spellings.py`.
"""

from __future__ import annotations

import copy
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
from gymtrl.rollouts.record import Message
from spellings import SPACED, SPELLINGS, Spelling

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
