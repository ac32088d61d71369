from __future__ import annotations

from typing import Any

import pytest

from gymtrl.rollouts.items import Refused
from gymtrl.rollouts.loose import read_conversation
from gymtrl.rollouts.messages import Conversation, rebuild_items

QUESTION = [{"role": "user", "content": "What is 6 x 7?"}]


def say(text: str, **more: Any) -> dict[str, Any]:
    return {"type": "message", "role": "assistant", "content": [{"type": "output_text", "text": text}], **more}


def think(*texts: str) -> dict[str, Any]:
    return {"type": "reasoning", "summary": [{"type": "summary_text", "text": text} for text in texts]}


def call(call_id: str, arguments: str = '{"x": 1}', name: str = "f") -> dict[str, Any]:
    return {"type": "function_call", "call_id": call_id, "name": name, "arguments": arguments}


def answer(call_id: str, output: Any = "done") -> dict[str, Any]:
    return {"type": "function_call_output", "call_id": call_id, "output": output}


def chat(output: Any, given: Any = QUESTION, **request: Any) -> Conversation:
    return read_conversation({"input": given, **request}, {"output": output})


def refusal(output: Any, given: Any = QUESTION, **request: Any) -> str:
    with pytest.raises(Refused) as caught:
        chat(output, given, **request)
    return caught.value.reason


def test_string_input_and_instructions_become_the_prompt() -> None:
    prompt = chat([say("42")], "What?", instructions="Be brief.").prompt
    assert [(m.role, m.content) for m in prompt] == [("system", "Be brief."), ("user", "What?")]


def test_one_turn_gathers_reasoning_text_and_parallel_calls() -> None:
    output = [
        think("a", "b"),
        say("Let "),
        call("1"),
        say("me."),
        call("2"),
        answer("1"),
        answer("2", "two"),
        say("42"),
    ]
    first, one, two, last = chat(output).completion
    assert first.reasoning_content == "a\n\nb"
    assert first.content == "Let me."
    assert [c.id for c in first.tool_calls] == ["1", "2"]
    assert (one.role, one.tool_call_id, one.name, one.content) == ("tool", "1", "f", "done")
    assert (two.tool_call_id, two.content) == ("2", "two")
    assert last.content == "42"


def test_arguments_are_parsed_and_kept_as_written() -> None:
    written = '{ "n": 123456789012345678901234567890, "x": 1.10 }'
    (message,) = chat([call("1", written)]).completion
    assert message.tool_calls[0].arguments == {"n": 123456789012345678901234567890, "x": 1.1}
    assert message.tool_calls[0].arguments_json == written


def test_leading_user_items_of_the_output_belong_to_the_prompt() -> None:
    read = chat([{"role": "user", "content": "Hi"}, say("Hello"), {"role": "user", "content": "Bye"}, say("Bye")], [])
    assert [m.role for m in read.prompt] == ["user"]
    assert [m.role for m in read.completion] == ["assistant", "user", "assistant"]


def test_cumulative_transitions_give_the_last_and_others_are_refused() -> None:
    first = [*QUESTION, call("1"), answer("1")]
    assert chat([first, [*first, say("42")]], []).completion[-1].content == "42"
    assert refusal([first, [*QUESTION, say("42")]], []) == "noncumulative_transitions"
    assert refusal([first, say("42")]) == "noncumulative_transitions"
    assert refusal([[]]) == "empty_output"


def test_images_keep_their_place_in_the_text() -> None:
    image = {"type": "input_image", "image_url": "data:image/png;base64,AA=="}
    text = {"type": "input_text", "text": "look"}
    before = chat([say("ok")], [{"role": "user", "content": [image, text]}]).prompt[0]
    after = chat([say("ok")], [{"role": "user", "content": [text, image]}]).prompt[0]
    assert before.images == after.images == (image["image_url"],)
    assert (before.image_offsets, after.image_offsets) == ((), (4,))
    assert rebuild_items([after])[0]["content"] == [text, image]


def test_hidden_reasoning_and_developer_role_are_flagged() -> None:
    hidden = {"type": "reasoning", "summary": [], "encrypted_content": "xyz"}
    read = chat([hidden, say("42")], [{"role": "developer", "content": "Be brief."}])
    assert read.flags == {"reasoning_hidden", "developer_role"}
    assert read.prompt[0].role == "developer"
    assert read.completion[0].reasoning_content is None


@pytest.mark.parametrize(
    ("output", "reason"),
    [
        ([], "empty_output"),
        ("text", "empty_output"),
        ([{"role": "user", "content": "Hi"}], "no_assistant_turn"),
        ([say("a"), {"type": "web_search_call"}], "unsupported_item_type:web_search_call"),
        ([say("a"), {"type": "message", "role": ["user"]}], "unsupported_item_type:__user__"),
        ([{"role": "assistant", "content": [{"type": {}, "text": "a"}]}], "unsupported_content_part"),
        ([say("a"), "text"], "unsupported_item_type:str"),
        ([say("a"), {"type": "message", "role": "critic", "content": "b"}], "unsupported_item_type:critic"),
        ([{"type": "message", "role": "assistant", "content": [{"type": "file"}]}], "unsupported_content_part"),
        ([{"type": "message", "role": "assistant", "content": [{"type": "refusal"}]}], "refusal_part"),
        ([{"type": "function_call", "name": "f", "arguments": "{}"}], "missing_call_id"),
        ([call("1"), call("1")], "duplicate_call_id"),
        ([call("1", "[1]")], "bad_tool_arguments"),
        ([call("1", '{"x": NaN}')], "bad_tool_arguments"),
        ([call("1", '{"x": 1e999}')], "bad_tool_arguments"),
        ([call("1", '{"a":' * 150 + "1" + "}" * 150)], "bad_tool_arguments"),
        ([call("1", "{")], "bad_tool_arguments"),
        ([answer("9"), say("a")], "orphan_tool_output"),
        ([call("1"), answer("1"), answer("1")], "duplicate_tool_output"),
        ([call("1"), say("a")], "missing_tool_output"),
        ([call("1"), call("2"), answer("1")], "missing_tool_output"),
        ([say("a"), say("b")], "ambiguous_turns"),
        ([think("a"), say("b"), think("c"), say("d")], "ambiguous_turns"),
        ([say("")], "empty_assistant"),
        ([say("a"), {"role": "user", "content": "b"}, say("")], "empty_assistant"),
        ([say("\ud800")], "roundtrip_mismatch"),
        ([call("1", '{"x": "\\ud800"}')], "roundtrip_mismatch"),
        ([call("\ud800")], "roundtrip_mismatch"),
        ([call("\ud800"), answer("\ud800"), say("a")], "roundtrip_mismatch"),
    ],
)
def test_refusals(output: Any, reason: str) -> None:
    assert refusal(output) == reason


def test_refusals_of_the_prompt() -> None:
    assert refusal([say("a")], []) == "no_prompt"
    assert refusal([say("a")], QUESTION, metadata={"audio_path": "a.wav"}) == "unsupported_modality_audio"


def test_the_first_reason_wins() -> None:
    assert refusal([say("a"), say("b"), call("1", "no"), {"type": "x"}]) == "unsupported_item_type:x"
    assert refusal([say("a"), say("b"), call("1", "no")]) == "bad_tool_arguments"


def test_while_a_call_is_unanswered_more_text_belongs_to_the_turn() -> None:
    output = [say("a"), call("1"), say("b"), think("c"), answer("1"), say("d")]
    first, _, last = chat(output).completion
    assert (first.content, first.reasoning_content, last.content) == ("ab", "c", "d")


def test_an_episode_may_end_with_calls() -> None:
    assert chat([say("a"), call("1"), call("2")]).completion[0].tool_calls[1].id == "2"


def test_what_was_sent_is_no_part_of_what_the_policy_said() -> None:
    """Of an answer that was begun for it, the policy said only the rest; the model server opens a new turn for it."""
    read = chat([say(" is 42.")], [*QUESTION, say("The answer")])
    assert [(m.role, m.content) for m in read.prompt[1:]] == [("assistant", "The answer")]
    assert [(m.role, m.content) for m in read.completion] == [("assistant", " is 42.")]


def test_token_ids_are_recorded_for_all_turns_or_none() -> None:
    tokens = {"prompt_token_ids": [1, 2], "generation_token_ids": [3, 4], "generation_log_probs": [-0.5, -1]}
    more = {"role": "user", "content": "more"}
    (turn,) = chat([say("a", **tokens)]).recorded
    assert (turn.prompt_token_ids, turn.generation_token_ids, turn.generation_log_probs) == ((1, 2), (3, 4), (-0.5, -1))
    assert len(chat([say("a", **tokens), more, say("b", **tokens)]).recorded) == 2
    assert chat([say("a", **tokens), more, say("b")]).recorded == ()
    assert chat([say("a", **{**tokens, "generation_log_probs": [-0.5]})]).recorded == ()
    assert chat([say("a", **{**tokens, "generation_token_ids": []})]).recorded == ()
    (turn,) = chat([say("a", **{**tokens, "generation_log_probs": [-0.5, -(10**399)]})]).recorded
    assert turn.generation_log_probs == (-0.5, float("-inf"))
