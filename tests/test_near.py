from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gymtrl.rollouts.record import Message, ToolCall
from gymtrl.selection.near import completion_text, near_duplicates
from gymtrl.selection.words import ngrams, split_words


def numbered(start: int, stop: int) -> str:
    return " ".join(f"w{i}" for i in range(start, stop))


def brute_force(texts: list[str], threshold: float) -> list[int | None]:
    sets = [set(ngrams(split_words(text), 5)) for text in texts]
    kept: list[int] = []
    found: list[int | None] = []
    for i, own in enumerate(sets):
        match = next((j for j in kept if own == sets[j] or len(own & sets[j]) / len(own | sets[j]) >= threshold), None)
        found.append(match)
        if match is None:
            kept.append(i)
    return found


def test_the_threshold_belongs_to_the_duplicates() -> None:
    # 20 words have 16 shingles. A text of which the last four words are cut shares 12 of 16, with three cut 13 of 16.
    whole = numbered(0, 20)
    assert near_duplicates([whole, numbered(0, 17)], 0.8125) == [None, 0]
    assert near_duplicates([whole, numbered(0, 17)], 0.8126) == [None, None]
    assert near_duplicates([whole, numbered(0, 17)]) == [None, 0]
    assert near_duplicates([whole, numbered(0, 16)]) == [None, None]
    assert near_duplicates([numbered(0, 9), numbered(0, 8)]) == [None, 0]  # exactly 4 of 5
    assert near_duplicates([numbered(0, 24), numbered(0, 15)], 0.55) == [None, 0]  # exactly 11 of 20


def test_a_text_repeats_the_first_that_was_kept() -> None:
    a, b, c = numbered(0, 40), numbered(3, 43), numbered(6, 46)
    # b repeats a; c resembles b, which was not kept, and not a.
    assert near_duplicates([a, b, c]) == [None, 0, None]
    assert near_duplicates([b, a, c]) == [None, 0, 0]


def test_short_texts_repeat_only_what_equals_them() -> None:
    assert near_duplicates(["1 2", "2 1", "1  2", "", " ", "3"]) == [None, None, 0, None, 3, None]
    assert near_duplicates([]) == []


def test_scripts_without_spaces_have_shingles_too() -> None:
    text = "因为每个苹果的价格是三元所以五个苹果一共需要十五元这就是问题的答案"
    assert near_duplicates([text, text[:-1], text[::-1]]) == [None, 0, None]


def test_many_texts_give_what_comparing_all_pairs_gives() -> None:
    draw = random.Random(0)
    words = [f"v{i}" for i in range(400)]
    texts: list[str] = []
    for _ in range(60):
        base = [draw.choice(words) for _ in range(120)]
        for edits in (0, 1, 2, 4, 12):
            copy = list(base)
            for place in draw.sample(range(120), edits):
                copy[place] = draw.choice(words)
            texts.append(" ".join(copy))
    texts += ["", "short", "short"]
    draw.shuffle(texts)
    expected = brute_force(texts, 0.8)
    assert 60 < sum(match is not None for match in expected) < 240
    assert near_duplicates(texts) == expected == near_duplicates(texts)


@pytest.mark.parametrize("threshold", [0.3, 0.95, 1.0])
def test_many_texts_at_other_thresholds(threshold: float) -> None:
    texts = [numbered(start, start + 60) for start in range(0, 400, 4)] + [numbered(0, 60)]
    assert near_duplicates(texts, threshold) == brute_force(texts, threshold)


@given(st.lists(st.text(alphabet="ab \n", max_size=30), max_size=8))
def test_what_is_kept_repeats_nothing_and_what_is_not_repeats_something_kept(texts: list[str]) -> None:
    found = near_duplicates(texts)
    assert found == brute_force(texts, 0.8)
    assert all(match is None or (match < i and found[match] is None) for i, match in enumerate(found))


def test_ngrams_of_short_texts() -> None:
    assert list(ngrams([], 3)) == []
    assert list(ngrams(["a", "b"], 3)) == ["a b"]
    assert list(ngrams(["a", "b", "c"], 3)) == ["a b c"]
    assert list(ngrams(["a", "b", "c", "d"], 3)) == ["a b c", "b c d"]


def test_the_text_of_a_completion_is_what_the_policy_said() -> None:
    arguments = {"code": "x = 1\nprint(x)", "options": {"tries": [2, None, True]}}
    completion = [
        Message(role="assistant", reasoning_content="let me see", tool_calls=(ToolCall("1", "run", arguments, "{}"),)),
        Message(role="tool", content="TOOL", tool_call_id="1", name="run"),
        Message(role="user", content="USER"),
        Message(role="assistant", content="It is 1."),
    ]
    assert completion_text(completion) == (
        "let me see\nrun\ncode\nx = 1\nprint(x)\noptions\ntries\n2\nnull\ntrue\nIt is 1."
    )
    assert completion_text([]) == ""
