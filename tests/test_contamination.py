from __future__ import annotations

import json
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gymtrl.errors import UserError
from gymtrl.rollouts.keys import input_key
from gymtrl.rollouts.reader import read_lines
from gymtrl.rollouts.record import Message
from gymtrl.selection.contamination import Overlap, Prompt, find_overlaps
from gymtrl.selection.held_out import HeldOut, held_out_texts, prompt_text
from rows import row, write_rows

TWELVE = "alpha beta gamma delta epsilon zeta eta theta iota kappa lambda mu"
THIRTEEN = f"{TWELVE} nu"
QUESTION = (
    "A farmer has three fields of equal size and plants wheat on half of the first one, so how much of all his land "
    "is left for potatoes?"
)
SHORT = "What is 3 times 23 plus 3?"


def held(*texts: str) -> list[HeldOut]:
    return [HeldOut("bench.jsonl", number, text, None, None) for number, text in enumerate(texts, 1)]


def asked(*texts: str) -> list[Prompt]:
    return [Prompt(f"task {number}", None, None, text) for number, text in enumerate(texts)]


def other(seed: int, words: int = 40) -> str:
    draw = random.Random(seed)
    return " ".join(f"w{draw.randrange(10**6)}" for _ in range(words))


def prompts_of(path: Path) -> list[Prompt]:
    rollouts = [line.rollout for line in read_lines([path]) if line.rollout]
    return [Prompt(it.task_key, it.input_key, it.environment or it.agent, prompt_text(it.prompt)) for it in rollouts]


def test_thirteen_words_in_common_are_found_and_twelve_are_not() -> None:
    assert find_overlaps(asked(f"Solve {THIRTEEN} please"), held(THIRTEEN)) == {
        0: Overlap(0, "ngram", "bench.jsonl", 1, 1.0)
    }
    assert find_overlaps(asked(f"Solve {THIRTEEN}"), held(f"Find {THIRTEEN}")).keys() == {0}
    assert find_overlaps(asked(f"Solve {TWELVE}"), held(f"Find {TWELVE}")) == {}


@pytest.mark.parametrize("words", range(1, 13))
def test_a_text_of_five_to_twelve_words_is_looked_for_inside(words: int) -> None:
    text = " ".join(TWELVE.split()[:words])
    found = find_overlaps(asked(f"Solve: {text} please", f"{text}!", other(1), text[:-1]), held(text))
    assert found.keys() == ({0, 1} if words >= 5 else {1})


def test_a_short_question_is_found_in_a_template() -> None:
    template = "Solve the following problem and put the final answer in a box. {} Think before you answer."
    found = find_overlaps(asked(template.format(SHORT), template.format("What is 3 times 23 plus 4?")), held(SHORT))
    assert found == {0: Overlap(0, "ngram", "bench.jsonl", 1, 1.0)}


def test_a_few_words_that_many_tasks_say_must_be_half_of_the_prompt() -> None:
    find_x = "Find the value of x."
    many = asked(*(f"{other(seed)} {find_x}" for seed in range(20)), f"{find_x} [1:12]")
    assert find_overlaps(many, held(find_x)).keys() == {20}


REPEATS = {
    "other system prompts": [Prompt(f"t{k}", None, "env", QUESTION) for k in range(12)],
    "a mark in the text": [Prompt(f"t{k}", None, "env", f"{QUESTION} [12:{k}]") for k in range(12)],
    "a mark, one input row": [Prompt(f"t{k}", "i", "env", f"[12:{k}] {QUESTION}") for k in range(12)],
    "other agents": [Prompt(f"t{k}", None, f"agent {k}", QUESTION) for k in range(11)],
}


@pytest.mark.parametrize("repeats", REPEATS.values(), ids=REPEATS)
@pytest.mark.parametrize("others", [0, 5, 100])
def test_a_question_does_not_hide_itself_by_repetition(repeats: list[Prompt], others: int) -> None:
    prompts = [*repeats, *asked(*(other(seed) for seed in range(others)))]
    assert find_overlaps(prompts, held(QUESTION)).keys() == set(range(len(repeats)))


def test_repeats_with_one_key_are_one_task_on_either_side() -> None:
    texts = [f"{QUESTION} {other(seed, 9)}" for seed in range(12)]
    longer = f"{QUESTION} {other(99, 9)}"
    rest = [other(seed) for seed in range(100, 130)]
    prompts = [Prompt(f"t{k}", "i", None, text) for k, text in enumerate(texts)]
    assert find_overlaps([*prompts, *asked(*rest)], held(longer)).keys() == set(range(12))
    assert find_overlaps([p._replace(input_key=None) for p in prompts] + asked(*rest), held(longer)) == {}
    rows = [row._replace(input_key="i") for row in held(*texts)] + [row._replace(file="b") for row in held(*rest)]
    assert find_overlaps(asked(longer), rows).keys() == {0}


@pytest.mark.parametrize("words", [6, 20, 40])
def test_what_an_environment_says_in_most_tasks_is_boilerplate(words: int) -> None:
    instruction = other(0, 60)
    own = [Prompt(f"t{k}", None, "mine", f"{instruction} {other(k, words)}") for k in range(1, 9)]
    rest = [prompt._replace(environment="theirs") for prompt in asked(*(other(seed) for seed in range(100, 130)))]
    benchmark = f"{instruction} {other(50, words)}"
    assert find_overlaps(own + rest, held(benchmark)) == {}
    assert find_overlaps(own + rest, held(benchmark, own[3].text)).keys() == {3}


def test_of_a_lone_benchmark_row_half_must_match() -> None:
    instruction = other(0, 60)
    rest = asked(*(other(seed) for seed in range(100, 130)))
    prompts = asked(*(f"{instruction} {other(seed, 80)}" for seed in range(1, 9))) + rest
    assert find_overlaps(prompts, held(f"{instruction} {other(50, 80)}")) == {}
    assert find_overlaps(prompts, held(f"{instruction} {other(50, 20)}")).keys() == set(range(8))


def test_the_texts_of_a_held_out_line_are_one_task() -> None:
    rows = [
        HeldOut("h", line, text, None, None)
        for line in range(1, 13)
        for text in (other(0, 30), other(line, 20), f"{other(0, 30)} {other(line, 20)}")
    ]
    assert find_overlaps(asked(f"{other(0, 30)} {other(99, 20)}"), rows) == {}
    assert find_overlaps(asked(f"{other(98, 30)} {other(4, 20)}"), rows)[0].line == 4


def test_shorter_texts_overlap_where_they_are_equal() -> None:
    found = find_overlaps(asked("what is “6 x 7”", "What is 6 x 8?", TWELVE), held("What  is 6 x 7?", TWELVE))
    assert {index: (overlap.line, overlap.share) for index, overlap in found.items()} == {0: (1, 1.0), 2: (2, 1.0)}


@pytest.mark.parametrize("sign", ["+", "-", "*", "/", "-5 +"])
def test_signs_are_no_punctuation(sign: str) -> None:
    signs = {"+", "-", "*", "/"} - {sign}
    assert find_overlaps(asked(*(f"5 {s} 3" for s in signs)), held(f"5 {sign} 3")) == {}


def test_case_punctuation_and_the_form_of_characters_do_not_matter() -> None:
    cafe = "Ist das Café nicht schön, sagte sie; und dann ging sie (langsam) nach Hause zurück."
    composed = cafe.upper().replace("É", "É").replace(",", "").replace("(", '"').replace(")", "…")
    assert find_overlaps(asked(composed), held(cafe))[0].share == 1.0


def test_a_script_without_spaces_is_compared_by_characters() -> None:
    question = "小明有五个苹果他给了小红两个苹果请问他还剩下几个苹果"
    assert find_overlaps(asked(f"请回答下面的问题:{question}"), held(question)).keys() == {0}
    assert find_overlaps(asked(question[::-1]), held(question)) == {}


def test_nothing_overlaps_nothing() -> None:
    assert find_overlaps(asked("", " ", "..."), held("", "?")) == {}
    assert find_overlaps([], held("a")) == find_overlaps(asked("a"), []) == {}


def test_keys_come_first() -> None:
    rows = [HeldOut("h", 1, "x", "t1", "i1"), HeldOut("h", 2, "y", "t2", "i2"), HeldOut("h", 3, "z", "t1", None)]
    prompts = [("t1", "i2", "y"), ("t9", "i2", "new"), ("t9", None, "new"), ("t8", "i9", "z")]
    assert find_overlaps([Prompt(task, asks, None, text) for task, asks, text in prompts], rows) == {
        0: Overlap(0, "task_key", "h", 1, 1.0),
        1: Overlap(1, "input_key", "h", 2, 1.0),
        3: Overlap(3, "ngram", "h", 3, 1.0),
    }


def test_a_question_is_found_in_a_template_and_the_closest_row_is_named() -> None:
    question, template = other(1, 30), other(2, 200)
    near_miss = f"{' '.join(question.split()[:20])} {other(3, 10)}"
    found = find_overlaps(asked(f"{template} {question}"), held(near_miss, question))
    assert found[0].line == 2 and found[0].share > 0.9


@pytest.mark.parametrize(("own", "found"), [(12, True), (14, False)])
def test_half_of_the_shorter_text_must_be_in_both(own: int, found: bool) -> None:
    passage = other(1, 25)  # 13 n-grams of 25 words
    prompt, row = f"{passage} {other(2, own)}", f"{passage} {other(3, 100)}"
    overlaps = find_overlaps(asked(prompt), held(row))
    assert [overlap.share for overlap in overlaps.values()] == ([13 / 25] if found else [])


@pytest.mark.parametrize(("sharing", "boilerplate"), [(10, False), (11, True)])
@pytest.mark.parametrize("side", ["prompts", "held_out"])
def test_what_more_than_ten_tasks_share_is_boilerplate(sharing: int, boilerplate: bool, side: str) -> None:
    shared = other(0)
    many = [f"{shared} {other(seed, 10)}" for seed in range(1, sharing + 1)] + [other(s) for s in range(100, 130)]
    if side == "prompts":
        found = find_overlaps(asked(*many), held(shared + " end"))
        assert found.keys() == (set() if boilerplate else set(range(sharing)))
    else:
        found = find_overlaps(asked(shared + " end"), held(*many))
        assert found.keys() == (set() if boilerplate else {0})


def test_in_few_tasks_what_most_of_them_share_is_boilerplate() -> None:
    shared = other(0)
    three, two = ([f"{shared} {other(seed, 5)}" for seed in range(1, n + 1)] for n in (3, 2))
    assert find_overlaps(asked(*three, other(9)), held(f"{shared} x")) == {}
    assert find_overlaps(asked(*two, other(9)), held(f"{shared} x")).keys() == {0, 1}


def test_boilerplate_does_not_hide_a_task_that_is_the_same() -> None:
    template = other(0, 100)
    questions = [f"{template} {other(seed, 6)}" for seed in range(1, 40)]
    found = find_overlaps(asked(*questions), held(*questions[:20]))
    assert found.keys() == set(range(20))
    assert all(overlap.share == 1.0 and overlap.line == index + 1 for index, overlap in found.items())


def test_repeats_of_a_task_are_one_task() -> None:
    repeats = [Prompt("one", None, None, other(1))] * 30 + asked(*(other(seed) for seed in range(2, 6)))
    assert find_overlaps(repeats, held(*[other(1)] * 20)).keys() == set(range(30))


@given(st.randoms(use_true_random=False))
def test_order_changes_nothing(draw: random.Random) -> None:
    shared, template = other(0), other(1, 20)
    texts = [f"{template} {other(seed, 20)}" for seed in range(2, 16)] + [f"{shared} {s}" for s in "abc"]
    rows = held(*(text + " x" for text in texts[5:]), shared, THIRTEEN, texts[0])
    prompts = asked(*texts, f"see {THIRTEEN}")
    places = list(range(len(prompts)))
    expected = find_overlaps(prompts, rows)
    assert len(expected) > 10
    draw.shuffle(places)
    draw.shuffle(rows)
    found = find_overlaps((prompts[place] for place in places), rows)
    assert {places[i]: replace(o, index=places[i]) for i, o in found.items()} == expected
    assert list(found) == sorted(found)


def test_a_prompt_is_its_user_turns() -> None:
    system, shot = Message(role="system", content="You are kind."), Message(role="assistant", content="SHOT")
    user = Message(role="user", content="Why?")
    assert prompt_text([system, user, shot, user]) == "Why?\nWhy?"
    assert prompt_text([system, shot]) == "You are kind.\nSHOT"
    assert prompt_text([]) == ""
    one, two = (prompt_text([Message(role="user", content="Look.", images=(url,))]) for url in ("data:a", "data:b"))
    assert one != two and len(one.split()) == len(two.split()) == 2


def test_rollouts_and_input_rows_carry_keys(tmp_path: Path) -> None:
    source = {"responses_create_params": {"input": [{"role": "user", "content": "6 x 7?"}]}, "answer": 42}
    path = write_rows(tmp_path / "r.jsonl", [row("6 x 7?", "42", 1.0), source | {"_ng_rollout_index": 1}, source])
    write_rows(tmp_path / "r_materialized_inputs.jsonl", [source | {"_ng_task_index": 0, "_ng_rollout_index": 0}])
    rollout, materialized, task = held_out_texts(path)
    (prompt,) = prompts_of(path)
    assert (rollout.task_key, rollout.input_key, rollout.text) == (prompt.task_key, prompt.input_key, prompt.text)
    assert materialized[2:5] == task[2:5] == ("6 x 7?", None, input_key(source))
    assert rollout.input_key == task.input_key
    assert [found.line for found in (rollout, materialized, task)] == [1, 2, 3]


def test_a_rollout_that_cannot_be_trained_on_still_names_its_task(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "r.jsonl", [row("6 x 7?", "42", 1.0) | {"response": {"output": []}}])
    assert held_out_texts(path) == [HeldOut(str(path), 1, "6 x 7?", None, None, "", "agent")]


@pytest.mark.parametrize(
    ("source", "texts"),
    [
        ({"question": "Q?", "answer": "A"}, ["Q?"]),
        ({"prompt": "Template Q?", "question": "Q?", "input": 3, "text": " "}, ["Template Q?", "Q?"]),
        ({"problem": "Q?"}, ["Q?"]),
        ({"instruction": "Do.", "input": "This."}, ["This.", "Do."]),
        ({"messages": [{"role": "system", "content": "S"}, {"role": "user", "content": "Q?"}]}, ["Q?"]),
        ({"prompt": [{"role": "user", "content": [{"type": "text", "text": "Q"}, {"text": "?"}, {}]}]}, ["Q?"]),
        ({"responses_create_params": {"instructions": "S", "input": "Q?"}}, ["Q?"]),
    ],
)
def test_rows_of_other_kinds(tmp_path: Path, source: dict[str, Any], texts: list[str]) -> None:
    path = write_rows(tmp_path / "b.jsonl", [source])
    assert [found.text for found in held_out_texts(path)] == texts


@pytest.mark.parametrize(
    ("line", "named"),
    [
        ('{"id": 1, "answer\\u001b[2J": "x"}', r"b\.jsonl:2 .*keys: id, answer�\[2J$"),
        ("{}", r"b\.jsonl:2 .*keys: none"),
        ('{"messages": [1, {"role": "user"}], "question": null}', r"b\.jsonl:2 .*messages, question"),
        ("{nonsense", r"b\.jsonl:2 "),
        ("[]", r"b\.jsonl:2 "),
        (json.dumps({"responses_create_params": {"input": []}}), r"b\.jsonl:2 .*no prompt"),
        ('{"responses_create_params": {"x": ' + "[" * 990 + "]" * 990 + "}}", r"b\.jsonl:2 .*deep"),
    ],
)
def test_a_line_that_names_no_task_is_refused(tmp_path: Path, line: str, named: str) -> None:
    path = tmp_path / "b.jsonl"
    path.write_text('{"question": "Q?"}\n' + line + "\n")
    with pytest.raises(UserError, match=named):
        held_out_texts(path)


def test_a_file_without_rows_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "b.jsonl"
    path.write_text("\n")
    with pytest.raises(UserError, match="no rows"):
        held_out_texts(path)
    with pytest.raises(UserError, match="does not exist"):
        held_out_texts(tmp_path / "other.jsonl")


@pytest.mark.parametrize("name", ["reasoning_gym/data/example_rollouts.jsonl", "mcqa/data/example_rollouts.jsonl"])
def test_shipped_files_overlap_themselves_and_no_other_task(gym_site_packages: Path, name: str) -> None:
    path = gym_site_packages / "resources_servers" / name
    prompts, rows = prompts_of(path), held_out_texts(path)
    assert find_overlaps(prompts, rows).keys() == set(range(len(prompts)))
    nameless = [held._replace(task_key=None, input_key=None) for held in rows]
    by_text = find_overlaps(prompts, nameless)
    assert [(overlap.index + 1, overlap.share) for overlap in by_text.values()] == [(held.line, 1.0) for held in rows]
    for task in rows:
        others = [prompt for prompt in prompts if prompt.task_key != task.task_key]
        assert len(others) == len(prompts) - 1 and find_overlaps(others, [task]) == {}
