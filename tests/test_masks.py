"""Which tokens carry loss: expected ids are put together by hand from the pieces that the model has to produce."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import pytest

from conversations import assistant, call, rollout, user
from gymtrl.formats.checks import Refusal, Tokenized, check_row
from gymtrl.formats.example import whole
from gymtrl.formats.masks import tokenize as tokenize_example
from gymtrl.formats.rows import rows_of
from gymtrl.formats.templates import ModelTemplate, model_template
from gymtrl.rollouts.record import Message, RecordedTurn, Rollout

TOOLS = ({"type": "function", "function": {"name": "add", "description": "Adds.", "parameters": {"type": "object"}}},)


def tokenize(row: Rollout, template: ModelTemplate, **how: Any) -> Tokenized | Refusal:
    return tokenize_example(whole(row), template, **how)


def tool(text: str, call_id: str = "c1") -> Message:
    return Message("tool", text, tool_call_id=call_id, name="add")


@pytest.fixture(scope="session")
def own(smollm2_dir: Path) -> ModelTemplate:
    from transformers import AutoTokenizer

    return model_template(AutoTokenizer.from_pretrained(smollm2_dir))


def with_template(own: ModelTemplate, name: str) -> ModelTemplate:
    import copy

    import trl

    tokenizer = copy.deepcopy(own.tokenizer)
    tokenizer.chat_template = (Path(trl.__file__).parent / "chat_templates" / f"{name}.jinja").read_text("utf-8")
    return model_template(tokenizer)


@pytest.fixture(scope="session")
def qwen(own: ModelTemplate) -> ModelTemplate:
    return with_template(own, "qwen2_5")


def loss_parts(row: Tokenized | Refusal, template: ModelTemplate) -> list[str]:
    assert isinstance(row, Tokenized), row
    assert len(row.labels) == len(row.input_ids)
    parts, previous = [], False
    for token, label in zip(row.input_ids, row.labels, strict=True):
        assert label in (token, -100)
        if label != -100 and not previous:
            parts.append([])
        if label != -100:
            parts[-1].append(token)
        previous = label != -100
    return [template.decode(part, skip_special=False) for part in parts]


def by_hand(pieces: list[tuple[str, bool]], template: ModelTemplate) -> tuple[list[int], list[int]]:
    ids, labels = [], []
    for text, trained in pieces:
        piece = template.encode(text)
        ids += piece
        labels += piece if trained else [-100] * len(piece)
    return ids, labels


SMOL_HEAD = "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"
QWEN_HEAD = "<|im_start|>system\nYou are Qwen, created by Alibaba Cloud. You are a helpful assistant.<|im_end|>\n"


def test_single_turn_own_template(own: ModelTemplate) -> None:
    row = tokenize(rollout([user("5 + 7 =")], [assistant("5 + 7 = 12 <answer>12</answer>")]), own)
    head = SMOL_HEAD + "<|im_start|>user\n5 + 7 =<|im_end|>\n<|im_start|>assistant\n"
    expected = by_hand([(head, False), ("5 + 7 = 12 <answer>12</answer><|im_end|>", True), ("\n", False)], own)
    assert isinstance(row, Tokenized)
    assert (row.input_ids, row.labels, row.route) == (*expected, "prefixes")


def test_single_turn_marked_template(qwen: ModelTemplate) -> None:
    row = tokenize(rollout([user("5 + 7 =")], [assistant("12")]), qwen)
    head = QWEN_HEAD + "<|im_start|>user\n5 + 7 =<|im_end|>\n<|im_start|>assistant\n"
    expected = by_hand([(head, False), ("12<|im_end|>", True), ("\n", False)], qwen)
    assert isinstance(row, Tokenized)
    assert (row.input_ids, row.labels, row.route) == (*expected, "template")


@pytest.mark.parametrize("name", ["own", "qwen"])
def test_history_and_simulated_user_carry_no_loss(name: str, own: ModelTemplate, qwen: ModelTemplate) -> None:
    template = {"own": own, "qwen": qwen}[name]
    row = tokenize(
        rollout(
            [Message("system", "Be brief."), user("a?"), assistant("old answer"), user("b?")],
            [assistant("first"), user("and then?"), assistant("second")],
        ),
        template,
    )
    assert loss_parts(row, template) == ["first<|im_end|>", "second<|im_end|>"]


def tool_loop() -> Rollout:
    return rollout(
        [user("What is 1 + 2 + 3?")],
        [
            assistant("Adding.", call("add", {"a": 1, "b": 2})),
            tool("3"),
            assistant("", call("add", {"a": 3, "b": 3}, "c2")),
            tool("6", "c2"),
            assistant("It is 6."),
        ],
        tools=TOOLS,
    )


def test_three_turn_tool_loop(qwen: ModelTemplate) -> None:
    row = tokenize(tool_loop(), qwen)
    assert loss_parts(row, qwen) == [
        'Adding.\n<tool_call>\n{"name": "add", "arguments": {"a": 1, "b": 2}}\n</tool_call><|im_end|>',
        '<tool_call>\n{"name": "add", "arguments": {"a": 3, "b": 3}}\n</tool_call><|im_end|>',
        "It is 6.<|im_end|>",
    ]


def test_parallel_calls(qwen: ModelTemplate) -> None:
    calls = (call("add", {"a": "é<b>", "b": 0.1}), call("add", {"a": 1e-12, "b": [2]}, "c2"))
    row = tokenize(
        rollout(
            [user("Both.")], [assistant("", *calls), tool("1"), tool("2", "c2"), assistant("1 and 2")], tools=TOOLS
        ),
        qwen,
    )
    first, second = loss_parts(row, qwen)
    assert first.count("<tool_call>") == 2 and first.endswith("</tool_call><|im_end|>")
    assert "tool_response" not in first + second and second == "1 and 2<|im_end|>"


def test_tools_need_a_template_that_knows_them(own: ModelTemplate) -> None:
    for row in (tool_loop(), rollout([user("x")], [assistant("y")], tools=TOOLS)):
        refusal = tokenize(row, own)
        assert isinstance(refusal, Refusal) and refusal.reason == "template_without_tools"


def test_reasoning_is_kept_or_refused(own: ModelTemplate, qwen: ModelTemplate) -> None:
    row = rollout([user("2 + 2?")], [assistant("4", reasoning="two and two")])
    for template in (own, qwen):
        refusal = tokenize(row, template)
        assert isinstance(refusal, Refusal) and refusal.reason == "reasoning_lost"
    qwen3 = with_template(own, "qwen3")
    assert loss_parts(tokenize(row, qwen3), qwen3) == ["<think>\ntwo and two\n</think>\n\n4<|im_end|>"]


def test_empty_think_tags_are_context_where_the_policy_did_not_think(own: ModelTemplate) -> None:
    qwen3 = with_template(own, "qwen3")
    row = tokenize(rollout([user("q?")], [assistant("a")]), qwen3)
    assert loss_parts(row, qwen3) == ["a<|im_end|>"]
    assert isinstance(row, Tokenized) and row.flags == ("thinking_off",)
    prompt = qwen3.decode(row.input_ids[: row.spans[0][0]], skip_special=False)
    assert prompt.endswith("assistant\n<think>\n\n</think>\n\n")


def test_one_row_a_query_and_one_a_call_where_the_template_rewrites_turns(own: ModelTemplate) -> None:
    qwen3 = with_template(own, "qwen3")
    thinking = rollout(
        [user("q?")],
        [assistant("a1", reasoning="r1"), user("more?"), assistant("a2", reasoning="r2")],
    )
    (rows,) = rows_of([thinking], qwen3)
    assert isinstance(rows, list)
    assert [loss_parts(row.tokens, qwen3) for row in rows] == [
        ["<think>\nr1\n</think>\n\na1<|im_end|>"],
        ["<think>\nr2\n</think>\n\na2<|im_end|>"],
    ]
    assert [len(row.example.prompt) for row in rows] == [1, 3]
    # As the server sends it: the reasoning of the earlier query is gone from the second prompt.
    assert "r1" not in qwen3.decode(rows[1].tokens.input_ids)
    counting = with_template(own, "qwen2_5")
    counting.tokenizer.chat_template = "turns: {{ messages | length }}\n" + counting.stock
    counting = model_template(counting.tokenizer)
    (rows,) = rows_of([tool_loop()], counting)
    assert isinstance(rows, Refusal) and rows.reason == "template_not_prefix_preserving"
    forgetful = with_template(own, "qwen2_5")
    forgetful.tokenizer.chat_template = FORGETFUL
    forgetful = model_template(forgetful.tokenizer)
    (rows,) = rows_of([tool_loop_with_reasoning()], forgetful)
    assert isinstance(rows, list), rows
    assert [loss_parts(row.tokens, forgetful) for row in rows] == [
        ['<think>think 0</think>Adding.{"a": 1, "b": 2} add<|im_end|>'],
        ['<think>think 2</think>{"a": 3, "b": 3} add<|im_end|>'],
        ["<think>think 4</think>It is 6.<|im_end|>"],
    ]
    assert "think 0" not in forgetful.decode(rows[1].tokens.input_ids)


# Shows the reasoning of the last message only, so that no row can hold several calls of the model.
FORGETFUL = (
    "{% if tools %}{{ tools | tojson }}{% endif %}{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.reasoning_content and loop.last %}<think>{{ m.reasoning_content }}</think>{% endif %}{{ m.content }}"
    "{% for c in m.tool_calls or [] %}{{ c.function.arguments | tojson }} {{ c.function.name }}{% endfor %}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def tool_loop_with_reasoning() -> Rollout:
    loop = tool_loop()
    turns = [
        msgspec.structs.replace(m, reasoning_content=f"think {i}") if m.role == "assistant" else m
        for i, m in enumerate(loop.completion)
    ]
    return msgspec.structs.replace(loop, completion=tuple(turns))


def test_answer_that_begins_with_line_breaks(qwen: ModelTemplate) -> None:
    row = tokenize(rollout([user("hi")], [assistant("\n\nhello")]), qwen)
    assert loss_parts(row, qwen) == ["\n\nhello<|im_end|>"]
    assert isinstance(row, Tokenized)
    start = row.spans[0][0]
    prompt = QWEN_HEAD + "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
    assert row.input_ids[:start] == qwen.encode(prompt)


def test_what_cannot_be_held_is_refused(own: ModelTemplate, qwen: ModelTemplate) -> None:
    base = rollout([user("x")], [assistant("y")])
    image = msgspec.structs.replace(base, prompt=(Message("user", "x", images=("data:image/png;base64,",)),))
    cut = msgspec.structs.replace(base, truncated=True)
    fake = rollout([user("x")], [assistant("y<|im_end|>\n<|im_start|>user\nz")])
    for row, reason in ((image, "images_in_text_model"), (cut, "truncated"), (fake, "turn_end_inside")):
        refusal = tokenize(row, own)
        assert isinstance(refusal, Refusal) and refusal.reason == reason
    developer = rollout([Message("developer", "Be terse."), user("x")], [assistant("y")])
    found = tokenize(developer, qwen)
    assert isinstance(found, Tokenized) and found.flags == ("developer_as_system",)
    assert "system\nBe terse." in qwen.decode(found.input_ids)


def test_text_that_the_template_drops_is_noticed(own: ModelTemplate) -> None:
    import copy

    tokenizer = copy.deepcopy(own.tokenizer)
    tokenizer.chat_template = tokenizer.chat_template.replace(
        "{% for message in messages %}", "{% for message in messages if message['role'] != 'system' %}"
    )
    refusal = tokenize(
        rollout([Message("system", "Speak Latin."), user("x")], [assistant("y")]), model_template(tokenizer)
    )
    assert isinstance(refusal, Refusal) and refusal.reason == "text_lost"


def test_unknown_template_that_rewrites_history_is_refused(own: ModelTemplate) -> None:
    import copy

    tokenizer = copy.deepcopy(own.tokenizer)
    tokenizer.chat_template = "turns: {{ messages | length }}\n" + tokenizer.chat_template
    refusal = tokenize(rollout([user("x")], [assistant("y")]), model_template(tokenizer))
    assert isinstance(refusal, Refusal) and refusal.reason == "template_not_prefix_preserving"


def recorded_from(row: Rollout, template: ModelTemplate, *, strip_end: bool = False) -> Rollout:
    rendered = tokenize(row, template)
    assert isinstance(rendered, Tokenized)
    calls = []
    for number, (start, end) in enumerate(rendered.spans):
        cut = end - 1 if strip_end and number < len(rendered.spans) - 1 else end
        ids = rendered.input_ids
        calls.append(RecordedTurn(tuple(ids[:start]), tuple(ids[start:cut]), (0.0,) * (cut - start)))
    return msgspec.structs.replace(row, recorded=tuple(calls))


def test_recorded_ids_agree_with_rendering(qwen: ModelTemplate) -> None:
    rendered = tokenize(tool_loop(), qwen)
    recorded = tokenize(recorded_from(tool_loop(), qwen), qwen)
    assert isinstance(rendered, Tokenized) and isinstance(recorded, Tokenized)
    assert recorded.route == "recorded" and recorded.spans == rendered.spans
    end = rendered.spans[-1][1]  # the line break after the last turn was never part of a model call
    assert (recorded.input_ids, recorded.labels) == (rendered.input_ids[:end], rendered.labels[:end])


def test_an_end_that_the_policy_did_not_write_is_not_trained(qwen: ModelTemplate) -> None:
    # A template ends turns that hit a limit as well: the next prompt does not tell whether the policy did.
    found = tokenize(recorded_from(tool_loop(), qwen, strip_end=True), qwen)
    assert isinstance(found, Tokenized) and found.route == "template"
    assert found.flags == ("recorded_ids_unused:recorded_turn_end_missing",)


def test_dropped_reasoning_keeps_the_recorded_ids_of_those_who_did_not_think(qwen: ModelTemplate) -> None:
    plain = tokenize(recorded_from(tool_loop(), qwen), qwen, reasoning="drop")
    assert isinstance(plain, Tokenized) and (plain.route, plain.flags) == ("recorded", ())
    thought = rollout([user("2 + 2?")], [assistant("<think>two and two</think>4")])
    assert loss_parts(tokenize(thought, qwen, reasoning="drop"), qwen) == ["4<|im_end|>"]


def test_foreign_recorded_ids_fall_back_to_rendering(qwen: ModelTemplate) -> None:
    row = recorded_from(rollout([user("x")], [assistant("yes")]), qwen)
    turn = row.recorded[0]
    prompt, generation, logprobs = turn.prompt_token_ids, turn.generation_token_ids, turn.generation_log_probs
    other_words = (*qwen.encode("no"), *generation[-1:])
    broken = {
        "recorded_foreign_ids": RecordedTurn(prompt, (10**6, *generation[1:]), logprobs),
        "recorded_text_differs": RecordedTurn(prompt, other_words, logprobs),
        "recorded_turn_end_missing": RecordedTurn(prompt, generation[:-1], logprobs[:-1]),
    }
    for reason, recorded in broken.items():
        found = tokenize(msgspec.structs.replace(row, recorded=(recorded,)), qwen)
        assert isinstance(found, Tokenized)
        assert found.route == "template" and found.flags == (f"recorded_ids_unused:{reason}",)
    unused = tokenize(row, qwen, recorded="never")
    assert isinstance(unused, Tokenized) and unused.route == "template" and unused.flags == ()


def test_checks_catch_a_shifted_mask(qwen: ModelTemplate) -> None:
    row = rollout([user("What is it?")], [assistant("It is six.")])
    good = tokenize(row, qwen)
    assert isinstance(good, Tokenized) and check_row(good, whole(row), qwen, "keep") is None
    start, end = good.spans[0]

    def moved(begin: int, stop: int) -> Tokenized:
        labels = [token if begin <= i < stop else -100 for i, token in enumerate(good.input_ids)]
        return replace(good, labels=labels, spans=((begin, stop),))

    for begin, stop, reason in (
        (start - 3, end, "loss_text_differs"),
        (start + 1, end, "loss_text_differs"),
        (start, end - 1, "turn_end_missing"),
        (start, end + 1, "turn_end_missing"),
    ):
        refusal = check_row(moved(begin, stop), whole(row), qwen, "keep")
        assert refusal is not None and refusal.reason == reason
    assert check_row(replace(good, labels=good.labels[:-1]), whole(row), qwen, "keep") is not None
