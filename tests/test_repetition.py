from __future__ import annotations

import base64
import json
import random
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gymtrl.selection.repetition import repetition


def by_hand(text: str, n: int) -> float:
    """The same share, counted one n-gram after the other, for texts without long stretches."""
    words = text.split()
    grams = [tuple(words[i : i + n]) for i in range(len(words) - n + 1)]
    inside = {i + k for i, gram in enumerate(grams) if gram in grams[:i] for k in range(n)}
    return sum(len(words[i]) for i in inside) / sum(map(len, words)) if words else 0.0


def test_texts_without_repetition_have_none() -> None:
    assert repetition("") == repetition(" \n ") == repetition("yes") == 0.0
    assert repetition(" ".join(f"word{i}" for i in range(500))) == 0.0


def test_an_ngram_must_occur_twice() -> None:
    assert repetition("no " * 10) == 0.0
    assert repetition("no " * 11) == pytest.approx(10 / 11)
    ten = "one two three four five six seven eight nine ten"
    assert repetition(f"{ten} and {ten}") == pytest.approx(39 / (2 * 39 + 3))
    assert repetition(f"{ten} and {ten.removesuffix(' ten')}") == 0.0


def test_the_share_is_of_characters_each_counted_once() -> None:
    assert repetition("a b c a b c xxxx", n=2) == pytest.approx(3 / 10)
    assert repetition("a a a a bb", n=3) == pytest.approx(3 / 6)


@given(st.lists(st.sampled_from(["a", "bb", "ccc"]), max_size=40), st.integers(1, 4))
def test_it_is_what_counting_by_hand_gives(words: list[str], n: int) -> None:
    assert repetition(" ".join(words), n) == pytest.approx(by_hand(" ".join(words), n))


@pytest.mark.parametrize("loop", ["a", "ab", "哈", "<tok>", "这是一个重复的句子。", "🤖", "\ud800"])
def test_loops_without_spaces_are_noticed(loop: str) -> None:
    assert repetition(loop * (2000 // len(loop))) > 0.97


def test_what_is_said_twice_is_half() -> None:
    text = " ".join(f"word{i}" for i in range(300))
    assert repetition(f"{text}\n\n{text}") == 0.5
    assert repetition("\n\n".join([text] * 10)) == pytest.approx(0.9)


def test_a_loop_after_a_normal_text_counts_by_its_length() -> None:
    text = " ".join(f"word{i}" for i in range(100))
    whole = repetition(f"{text} {'a' * 5000}")
    assert whole == pytest.approx(4999 / (5000 + len(text.replace(" ", ""))))


def test_long_stretches_that_do_not_repeat_are_no_loops() -> None:
    draw = random.Random(0)
    assert repetition(base64.b64encode(draw.randbytes(3000)).decode()) == 0.0
    assert repetition("".join(chr(draw.randrange(0x4E00, 0x9FFF)) for _ in range(2000))) == 0.0
    assert repetition(json.dumps({f"key{i}": i for i in range(200)}, separators=(",", ":"))) < 0.1
    assert repetition("a" * 50) == 0.0
    assert repetition("a" * 51) == pytest.approx(50 / 51)


@given(st.text(max_size=300))
def test_it_is_a_share(text: str) -> None:
    assert 0.0 <= repetition(text) <= 1.0 and repetition(text) == repetition(text)


def test_time_grows_with_the_length_alone() -> None:
    for unit in ("the same ten words again and again and again so ", "ab"):
        text = unit * (2_000_000 // len(unit))
        start = time.perf_counter()
        assert repetition(text) > 0.99
        assert time.perf_counter() - start < 5  # ours take a tenth of a second
