"""What training made worse: each rule on rollouts that provoke it, and silence on healthy ones."""

from __future__ import annotations

import io
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from typer.testing import CliRunner

from gymtrl.cli.main import app
from gymtrl.comparison.compare import compare_candidates, compare_files
from gymtrl.comparison.measures import MEASURES, measures
from gymtrl.comparison.record import Comparison
from gymtrl.doctor.finding import Finding
from gymtrl.doctor.worse import CHANGE_RULES, diagnose_comparison
from gymtrl.errors import UserError
from gymtrl.reports.comparison import render_comparison
from gymtrl.rollouts.reader import read_lines
from rows import row, write_rows

Row = dict[str, Any]
Rows = list[Row]
TASKS, REPEATS = 24, 2
TOOL = {"type": "function", "name": "look_up", "parameters": {"type": "object"}, "strict": True}


def scored(n: int) -> float:
    return float(n % 3 > 0)


def rows(answer: Callable[[int], str], reward: Callable[[int], float] = scored, **more: Any) -> Rows:
    """Rollouts of some tasks; the functions are given the number of the rollout."""
    return [
        row(f"question {t}", answer(n), reward(n), index=t, repeat=r, **more)
        for t in range(TASKS)
        for r in range(REPEATS)
        for n in [t * REPEATS + r]
    ]


def healthy(n: int = 0) -> str:
    return f"I count the apples one by one, which makes {n % 17} of them."


def calling(*calls: str, arguments: str = '{"q": "%d"}', answer: str = "ok", said: str = "Found.", n: int = 0) -> Rows:
    """Output items: calls with their answers, then words."""
    items: Rows = []
    for place, name in enumerate(calls):
        written = arguments % place if "%d" in arguments else arguments
        items.append({"type": "function_call", "call_id": f"c{place}", "name": name, "arguments": written})
        items.append({"type": "function_call_output", "call_id": f"c{place}", "output": answer})
    text = {"type": "output_text", "text": f"{said} {n}"}
    return [*items, {"type": "message", "role": "assistant", "content": [text]}]


def with_tools(output: Callable[[int], Rows]) -> Rows:
    found = rows(healthy)
    for n, one in enumerate(found):
        one["responses_create_params"]["tools"] = [TOOL]
        one["response"]["output"] = output(n)
    return found


def changed(made: Rows, change: Callable[[int, Row], None]) -> Rows:
    for n, one in enumerate(made):
        change(n, one)
    return made


def cut(n: int, one: Row) -> None:
    one["response"] |= {"status": "incomplete", "incomplete_details": {"reason": "max_output_tokens"}}


def cut_some(n: int, one: Row) -> None:
    if n % 3 == 0:
        cut(n, one)


def without_temperature(n: int, one: Row) -> None:
    del one["responses_create_params"]["temperature"]


def two_temperatures(n: int, one: Row) -> None:
    one["responses_create_params"]["temperature"] = n % 2 / 2


def by_template(n: int, one: Row) -> None:
    one["template"] = f"t{n % (TASKS * REPEATS) // REPEATS % 2}"


def reasoned(n: int, one: Row) -> None:
    thought = {"type": "reasoning", "summary": [{"type": "summary_text", "text": f"I think {n}"}]}
    one["response"]["output"].insert(0, thought)


def reasoned_only(n: int, one: Row) -> None:
    reasoned(n, one)
    one["response"]["output"] = one["response"]["output"][:1]


def counting(n: int) -> Rows:
    return calling("look_up", n=n)


def looping(n: int) -> Rows:
    return calling(*["look_up"] * 4, arguments='{"q": "same"}', n=n)


def seldom(n: int) -> Rows:
    return calling("look_up", n=n) if n % 5 == 0 else calling(n=n)


def fails(n: int) -> Rows:
    return calling("look_up", answer="Error: no such table", n=n)


BY_TEMPLATE = {"cluster": "template"}
WORSE: dict[str, tuple[Rows, Rows, dict[str, Any]]] = {
    "environment_broke": (rows(healthy, lambda n: 1.0), rows(healthy, lambda n: float(n % 3 == 0)), {}),
    "kind_broke": (
        changed(rows(healthy, lambda n: 1.0), by_template),
        changed(rows(healthy, lambda n: float(n // REPEATS % 2 or n % 3 == 0)), by_template),
        BY_TEMPLATE,
    ),
    "sampling_mixed": (changed(rows(healthy), two_temperatures), changed(rows(healthy), two_temperatures), {}),
    "sampling_unset": (changed(rows(healthy), without_temperature), changed(rows(healthy), without_temperature), {}),
    "answers_unsound": (with_tools(counting), with_tools(lambda n: calling("look_up", arguments="[1]", n=n)), {}),
    "answers_missing": (changed(rows(healthy), reasoned), changed(rows(healthy), reasoned_only), {}),
    "format_drift": (rows(lambda n: f"It is \\boxed{{{n}}}."), rows(healthy), {}),
    "answers_longer": (rows(healthy), rows(lambda n: healthy(n) + " I am sure of it, and can count them again."), {}),
    "answers_shorter": (rows(healthy), rows(lambda n: str(n)), {}),
    "answers_cut": (rows(healthy), changed(rows(healthy), cut_some), {}),
    "turn_ends_missing": (rows(healthy), rows(lambda n: healthy(n) + "\nuser\nAnd pears?"), {}),
    "loops": (rows(healthy), rows(lambda n: healthy(n) + " and again and again" * 30), {}),
    "calls_fail": (with_tools(counting), with_tools(fails), {}),
    "unknown_tools": (with_tools(counting), with_tools(lambda n: calling("look_down", n=n)), {}),
    "calls_as_text": (
        with_tools(counting),
        with_tools(lambda n: calling(said='<tool_call>{"name": "look_up", "arguments": {}}', n=n)),
        {},
    ),
    "tools_unused": (
        with_tools(counting),
        with_tools(seldom),
        {},
    ),
}


def compared(folder: Path, before: Rows, after: Rows, **more: Any) -> Comparison:
    paths = [write_rows(folder / f"{name}.jsonl", made) for name, made in (("before", before), ("after", after))]
    return compare_files(paths[:1], paths[1:], **more)


def codes(findings: list[Finding]) -> set[str]:
    return {finding.rule for finding in findings}


@pytest.mark.parametrize("code", sorted(WORSE))
def test_each_rule_is_provoked_and_tells_what_was_seen(tmp_path: Path, code: str) -> None:
    before, after, more = WORSE[code]
    found = diagnose_comparison(compared(tmp_path, before, after, **more))
    (finding,) = [finding for finding in found if finding.rule == code]
    assert re.search(r"\d", finding.evidence) or code == "sampling_unset"
    assert finding.evidence.startswith(("agent", "requests of agent"))
    assert finding.cause
    assert finding.remedy


def test_every_rule_is_tested() -> None:
    assert {rule.code for rule in CHANGE_RULES} == WORSE.keys() | {"tasks_learned_by_heart"}


@pytest.mark.parametrize("code", sorted(WORSE.keys() - {"sampling_mixed", "sampling_unset"}))
def test_nothing_is_told_where_both_sides_do_the_same_or_training_mended_it(tmp_path: Path, code: str) -> None:
    before, after, more = WORSE[code]
    assert not diagnose_comparison(compared(tmp_path, after, after, **more))
    assert code not in codes(diagnose_comparison(compared(tmp_path, after, before, **more))) - {"format_drift"}


def test_a_healthy_gain_is_left_alone(tmp_path: Path) -> None:
    better = compared(tmp_path, rows(healthy), rows(lambda n: healthy(n) + " Yes.", lambda n: float(n % 5 > 0)))
    assert not diagnose_comparison(better)
    tools = compared(tmp_path, with_tools(counting), with_tools(lambda n: calling("look_up", said="I see.", n=n)))
    assert not diagnose_comparison(tools)


def test_another_form_or_fewer_calls_in_a_gain_are_left_alone(tmp_path: Path) -> None:
    boxed = "I count the apples one by one, which makes \\boxed{{{}}} of them."
    learned = rows(lambda n: boxed.format(n % 17), lambda n: 1.0)
    assert not diagnose_comparison(compared(tmp_path, rows(healthy, lambda n: float(n % 3 == 0)), learned))
    fewer = with_tools(seldom)
    for one in fewer:
        one["reward"] = 1.0
    assert "tools_unused" not in codes(diagnose_comparison(compared(tmp_path, with_tools(counting), fewer)))


def test_a_rollout_that_is_named_has_lost_the_form(tmp_path: Path) -> None:
    before = rows(lambda n: f"It is \\boxed{{{n}}}.")
    after = rows(lambda n: f"It is \\boxed{{{n}}}." if n < 6 else f"It is {n}, no.")
    found = diagnose_comparison(compared(tmp_path, before, after))
    (evidence,) = [finding.evidence for finding in found if finding.rule == "format_drift"]
    assert evidence.endswith(f"such as {tmp_path / 'after.jsonl'}:7")


@pytest.mark.parametrize("used", [0, 3])
def test_calls_of_a_policy_that_hardly_called_before_are_looked_at(tmp_path: Path, used: int) -> None:
    before = with_tools(lambda n: calling(*["look_up"] * (n < used), n=n))
    after = with_tools(lambda n: calling("look_down", answer="Error: no such tool", n=n))
    found = {finding.rule: finding.evidence for finding in diagnose_comparison(compared(tmp_path, before, after))}
    assert found.keys() >= {"calls_fail", "unknown_tools"}
    assert found["calls_fail"].endswith("1 after, of which 100.0% fail")
    sound = with_tools(lambda n: calling("look_up", n=n))
    assert not diagnose_comparison(compared(tmp_path, before, sound))


def test_the_sampling_of_what_is_not_compared_is_passed_over(tmp_path: Path) -> None:
    alone = {"agent_ref": {"name": "alone"}}
    after = rows(healthy) + changed(rows(lambda n: "x", **alone), two_temperatures)
    assert not diagnose_comparison(compared(tmp_path, rows(healthy), after))


def test_a_kind_must_be_worse_by_what_counts(tmp_path: Path) -> None:
    def kinds(value: Callable[[int], float]) -> Rows:
        return changed(rows(healthy, value), by_template)

    def small(n: int) -> float:
        return 0.9 if n // REPEATS % 2 else 0.84 - 0.001 * (n % 3)

    before, after = kinds(lambda n: 0.9), kinds(small)
    told = [
        codes(diagnose_comparison(compared(tmp_path, before, after, min_effect=least, **BY_TEMPLATE)))
        for least in (0.0, 0.2)
    ]
    assert ["kind_broke" in one for one in told] == [True, False]


def test_few_rollouts_that_went_wrong_are_noise(tmp_path: Path) -> None:
    after = rows(lambda n: healthy(n) + ("\nuser\nAnd pears?" if n in (3, 17) else ""))
    assert not diagnose_comparison(compared(tmp_path, rows(healthy), after))
    few = [made[: 4 * REPEATS] for made in WORSE["loops"][:2]]
    assert not diagnose_comparison(compared(tmp_path, *few))


def test_nearly_all_answers_cut_are_turns_without_an_end(tmp_path: Path) -> None:
    found = codes(diagnose_comparison(compared(tmp_path, rows(healthy), changed(rows(healthy), cut))))
    assert found == {"turn_ends_missing"}


def test_calls_that_repeat_are_loops(tmp_path: Path) -> None:
    before = with_tools(lambda n: calling(*["look_up"] * 4, n=n))
    assert codes(diagnose_comparison(compared(tmp_path, before, with_tools(looping)))) == {"loops"}


def test_reasons_and_places_are_named(tmp_path: Path) -> None:
    def told(code: str) -> str:
        before, after, _ = WORSE[code]
        found = diagnose_comparison(compared(tmp_path, before, after))
        return next(finding.evidence for finding in found if finding.rule == code)

    assert told("answers_unsound").endswith("(bad_tool_arguments 0 before and 48 after)")
    assert f"such as {tmp_path / 'after.jsonl'}:1" in told("loops")
    assert told("calls_fail").startswith("agent: failed calls in 0.0% of the calls before, 100.0% after")


def test_only_the_environment_that_broke_is_named(tmp_path: Path) -> None:
    other = {"agent_ref": {"name": "other"}}
    before = rows(healthy, lambda n: 1.0) + rows(healthy, lambda n: 1.0, **other)
    after = rows(healthy, lambda n: 1.0) + rows(lambda n: healthy(n) + "</s>" * 2, lambda n: float(n % 3 == 0), **other)
    found = diagnose_comparison(compared(tmp_path, before, after))
    assert codes(found) == {"environment_broke", "turn_ends_missing"}
    assert found[0].severity == "error"
    assert all(finding.evidence.startswith("other: ") for finding in found)


def test_candidates_are_told_apart(tmp_path: Path) -> None:
    before, sound, looped = (
        write_rows(tmp_path / f"{name}.jsonl", made)
        for name, made in (("b", rows(healthy)), ("sound", rows(healthy)), ("looped", WORSE["loops"][1]))
    )
    found = diagnose_comparison(compare_candidates([before], [[sound], [looped]]))
    assert {finding.evidence.partition(": ")[0] for finding in found} == {str(looped)}


def test_a_gain_on_training_tasks_alone_is_learned_by_heart(tmp_path: Path) -> None:
    was, better = rows(healthy), rows(healthy, lambda n: 1.0)
    same, gain = compared(tmp_path / "same", was, was), compared(tmp_path / "gain", was, better)
    (finding,) = diagnose_comparison(same, gain)
    assert finding.rule == "tasks_learned_by_heart"
    assert finding.evidence.startswith("+33.3 points [")
    assert not diagnose_comparison(gain, gain)
    assert not diagnose_comparison(gain, same)
    other = compared(tmp_path / "other", was, better, metric="reward>=0.5")
    with pytest.raises(UserError, match="training tasks of reward"):
        diagnose_comparison(same, other)


def test_what_is_measured_of_a_rollout(tmp_path: Path) -> None:
    def measured(one: Row) -> dict[str, float]:
        (line,) = read_lines([write_rows(tmp_path / "one.jsonl", [one])])
        assert line.rollout is not None
        return dict(zip(MEASURES, measures(line.rollout), strict=True))

    def said(text: str) -> set[str]:
        of_text = ("repeated text", "chat markers", "boxed answers", "code blocks", "JSON answers", "answer tags")
        return {name for name in of_text if measured(row("q", text, 1.0))[name]}

    assert said("Plain words, 1 < 2, and a \\frac{1}{2}.") == set()
    assert said("so \\boxed{3}") == {"boxed answers"}
    assert said("```python\nprint(1)\n```") == {"code blocks"}
    assert said(' {"a": 1}') == {"JSON answers"}
    assert said("<answer>3</answer>") == {"answer tags"}
    assert said("3<|im_end|>") == said("3\nUser: and 4?") == said("3<end_of_turn>") == {"chat markers"}
    assert said("start " + "ha " * 60) == said("start" + "\n" * 300) == {"repeated text"}
    assert said(" ".join(f"{n} times {n}" for n in range(100))) == set()
    # The forms count after the reasoning, and calls as text only where there are tools.
    assert said("<think>\\boxed{1}?</think>It is 3.") == set()
    tagged = row("q", '<tool_call>{"name": "f"}', 1.0)
    assert measured(tagged)["calls as text"] != measured(tagged)["calls as text"]
    half = with_tools(lambda n: calling("look_up", "look_down", n=n))[0]
    assert measured(half)["unknown tools"] == 0.5
    twice = with_tools(lambda n: calling("look_up", "look_up", arguments="{}", n=n))[0]
    assert not measured(twice)["repeated turns"]
    assert measured(with_tools(looping)[0])["repeated turns"]


def kept(folder: Path, before: Rows, after: Rows) -> Path:
    paths = [write_rows(folder / f"{name}.jsonl", made) for name, made in (("before", before), ("after", after))]
    out = folder / "compared"
    told = CliRunner().invoke(app, ["compare", *map(str, paths), "-o", str(out)])
    assert told.exit_code == 0, told.output
    return out


def test_compare_tells_after_its_verdict_and_doctor_tells_again(tmp_path: Path) -> None:
    before, after, _ = WORSE["loops"]
    paths = [str(write_rows(tmp_path / name, made)) for name, made in (("b.jsonl", before), ("a.jsonl", after))]
    folder = str(tmp_path / "compared")
    told = CliRunner().invoke(app, ["compare", *paths, "-o", folder])
    assert told.exit_code == 0
    assert told.output.index("Not shown: ") < told.output.index("warning: More rollouts end in loops (loops)")
    as_json = json.loads(CliRunner().invoke(app, ["compare", *paths, "--json"]).output)
    assert {"loops"} <= {finding["rule"] for finding in as_json["findings"]}
    again = CliRunner().invoke(app, ["doctor", folder, "--fail-on", "warning"])
    assert again.exit_code == 1
    assert "warning: More rollouts end in loops (loops)" in again.output
    assert CliRunner().invoke(app, ["doctor", folder, "--fail-on", "error"]).exit_code == 0
    found = json.loads(CliRunner().invoke(app, ["doctor", folder, "--json"]).output)
    assert found == as_json["findings"]


def test_doctor_sets_held_out_against_training_tasks(tmp_path: Path) -> None:
    was, better = rows(healthy), rows(healthy, lambda n: 1.0)
    same, gain = kept(tmp_path / "same", was, was), kept(tmp_path / "gain", was, better)
    assert "nothing found" in CliRunner().invoke(app, ["doctor", str(same)]).output
    told = CliRunner().invoke(app, ["doctor", str(same), "--train-tasks", str(gain), "--json"])
    assert [finding["rule"] for finding in json.loads(told.output)] == ["tasks_learned_by_heart"]
    refused = CliRunner().invoke(app, ["doctor", str(same), "--train-tasks", str(tmp_path)])
    assert isinstance(refused.exception, UserError)
    assert "holds no comparison" in str(refused.exception)


def test_foreign_text_in_findings_is_shown_as_text(tmp_path: Path) -> None:
    named = {"agent_ref": {"name": "a\x1b[31m[red]b"}}
    result = compared(tmp_path, rows(healthy, **named), rows(lambda n: "ha " * 300, **named))
    assert codes(diagnose_comparison(result)) >= {"loops"}
    stream = io.StringIO()
    render_comparison(result, Console(file=stream, width=200))
    assert "\x1b" not in stream.getvalue()
    assert "[red]b: repeated text in 0.0%" in stream.getvalue()


def test_remedies_name_real_flags() -> None:
    from gymtrl.comparison.settings import CompareSettings
    from gymtrl.formats.settings import FormatDpoSettings
    from gymtrl.gym.settings import CollectSettings
    from gymtrl.selection.settings import FilterSettings
    from gymtrl.training.settings import TrainDpoSettings

    models = (CompareSettings, FormatDpoSettings, CollectSettings, FilterSettings, TrainDpoSettings)
    known = {f"--{name.replace('_', '-')}" for model in models for name in model.model_fields} | {"--show"}
    vllm = {"--enable-auto-tool-choice", "--tool-call-parser"}
    flags = {flag for rule in CHANGE_RULES for flag in re.findall(r"--[a-z][a-z-]+", f"{rule.cause} {rule.remedy}")}
    assert flags <= known | vllm
