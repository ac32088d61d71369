"""The page of a comparison: what it says, that nothing in a rollout acts in it, and that a browser can use it."""

from __future__ import annotations

import dataclasses
import json
import random
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

from chromium import chromium
from gymtrl.comparison.compare import compare_candidates
from gymtrl.comparison.distribution import shared_bins
from gymtrl.comparison.record import Comparison, SharedBin, TaskDifference
from gymtrl.comparison.settings import CompareSettings
from gymtrl.doctor.worse import diagnose_comparison
from gymtrl.errors import UserError
from gymtrl.pipeline.steps import validate_step
from gymtrl.reports.comparison_charts import effect_plot, scatter
from gymtrl.reports.comparison_page import comparison_page, shown_flips, write_page
from gymtrl.reports.trajectory import trajectory
from gymtrl.rollouts.reader import read_lines
from gymtrl.validation.settings import ValidateSettings
from gymtrl.validation.validate import compare_rollouts, relocated
from pages import HOSTILE, Page
from rows import row, write_rows

SECTIONS = ["verdict", "effects", "worse", "tasks", "flips", "distributions", "costs", "lines"]
AGENTS = ("math", "tools")


def with_call(question: str, answer: str, reward: float, **more: Any) -> dict[str, Any]:
    """A rollout that thinks, calls, and answers."""
    made = row(question, answer, reward, **more)
    made["responses_create_params"]["tools"] = [
        {"type": "function", "name": "look_up", "description": "", "parameters": {}}
    ]
    made["response"]["output"][:0] = [
        {"type": "reasoning", "summary": [{"type": "summary_text", "text": f"thinking of {answer}"}]},
        {"type": "function_call", "call_id": "c1", "name": "look_up", "arguments": json.dumps({"q": answer})},
        {"type": "function_call_output", "call_id": "c1", "output": f"found {answer}"},
    ]
    return made


def side(folder: Path, name: str, passes: dict[int, int], *, tasks: int = 20, repeats: int = 2, text: str = "") -> Path:
    """Two environments; each task passes once unless `passes` says how often."""
    rows = [
        with_call(
            f"question {t} {text}",
            f"{name} {t} {r} {text}",
            float(r < passes.get(t, 1)),
            index=t,
            repeat=r,
            agent_ref={"name": AGENTS[t % 2] + text},
        )
        for t in range(tasks)
        for r in range(repeats)
    ]
    return write_rows(folder / f"{name}.jsonl", rows)


def three(folder: Path, text: str = "", **more: Any) -> Comparison:
    """Before, and two candidates: of the first 3 tasks are fixed and 1 is broken, of the second 2 are broken."""
    before = side(folder, "before", {0: 2, 2: 2}, text=text)
    better = side(folder, "better", {0: 0, 1: 2, 3: 2, 5: 2, 2: 2}, text=text)
    worse = side(folder, "worse", {0: 0, 2: 0}, text=text)
    return compare_candidates([before], [[better], [worse]], **more)


def shown(comparison: Comparison) -> Page:
    return Page(comparison_page(comparison))


def flips(page: Page) -> list[dict[str, str]]:
    return [found for tag, found in page.elements if tag == "details" and found["class"] == "rollout flip"]


def test_every_section_has_its_figures(tmp_path: Path) -> None:
    comparison = three(tmp_path, min_effect=0.01)
    page = shown(comparison)
    assert list(page.sections) == SECTIONS
    first, second = comparison.candidates
    verdict = page.text("verdict")
    assert first.verdict in verdict and second.verdict in verdict
    assert "better.jsonl" in verdict and "worse.jsonl" in verdict and str(tmp_path) not in verdict
    d = first.overall.difference
    effects = page.text("effects")
    signed = f"+{d.mean * 100:.1f} [{d.low * 100:+.1f}, +{d.high * 100:.1f}]".replace("-", "−")
    assert signed in effects and "pass@2" in effects and "a difference counts from 1.0 points" in effects
    assert len(re.findall('class="effect (good|bad|context)( all)?"', comparison_page(comparison))) == 6
    assert "Nothing suspicious was found." in page.text("worse")
    assert "3 tasks: 0.5 → 1" in page.text("tasks") and "1 task: 1 → 0" in page.text("tasks")
    assert "Rollouts by reward 0 18 → 17 1 22 → 23" in page.text("distributions")
    assert "Rollouts by characters" in page.text("distributions")
    assert "tool calls 20 1 1 +0 +0 to +0" in page.text("costs")
    assert page.text("lines").count("Every task has a partner.") == 2
    assert "rollouts with a valid value 40" in page.text("lines")


@pytest.mark.parametrize("text", HOSTILE)
def test_what_became_worse_may_have_any_name(tmp_path: Path, text: str) -> None:
    broken = {task: 0 for task in range(0, 20, 2)}
    pages = []
    for name in ("", text):
        folder = tmp_path / str(len(pages))
        files = [side(folder, "before", {}, text=name), side(folder, "after", broken, text=name)]
        pages.append(shown(compare_candidates(files[:1], [files[1:]])))
    harmless, hostile = pages
    assert "environment_broke" in hostile.text("worse")
    assert hostile.scripts == harmless.scripts
    assert {tag for tag, _ in hostile.elements} <= {tag for tag, _ in harmless.elements}


def test_what_became_worse_stands_with_its_remedy(tmp_path: Path) -> None:
    before = side(tmp_path, "before", {})
    after = side(tmp_path, "after", {task: 0 for task in range(0, 20, 2)})
    comparison = compare_candidates([before], [[after]])
    findings = diagnose_comparison(comparison)
    assert "environment_broke" in {finding.rule for finding in findings}
    worse = shown(comparison).text("worse")
    assert all(finding.title in worse and finding.evidence in worse for finding in findings)
    assert all(finding.remedy in worse for finding in findings)


def test_flips_show_both_rollouts_side_by_side(tmp_path: Path) -> None:
    page = shown(three(tmp_path))
    found = [(flip["data-candidate"], flip["data-kind"], flip["data-environment"]) for flip in flips(page)]
    assert sorted(found) == [
        ("0", "broken", "0"),
        ("0", "fixed", "1"),
        ("0", "fixed", "1"),
        ("0", "fixed", "1"),
        ("1", "broken", "0"),
        ("1", "broken", "0"),
    ]
    text = page.text("flips")
    broken = text[text.index("broken better.jsonl · math · 1 → 0 · 2 and 2 rollouts question 0") :]
    expected = [
        "user question 0",
        "before · reward 1 · 2 turns · 1 tool call",
        "policy · turn 1",
        "thinking of before 0",
    ]
    expected += [
        'look_up { "q": "before 0 0 " }',
        "tool result · look_up found before 0 0",
        "policy · turn 2 before 0 0",
    ]
    expected += [f"{tmp_path}/before.jsonl:1", "after · reward 0", "thinking of better 0", "policy · turn 2 better 0"]
    expected += [f"{tmp_path}/better.jsonl:1"]
    places = [broken.index(words) for words in expected]
    assert places == sorted(places)
    assert "are shown" not in text


def test_what_flips_are_chosen(tmp_path: Path) -> None:
    comparison = three(tmp_path)
    chosen = [(f.candidate, f.flip.kind, f.flip.environment) for f in shown_flips(comparison, most=4)]
    assert chosen == [(0, "broken", "math"), (0, "fixed", "tools"), (1, "broken", "math"), (1, "broken", "math")]
    assert len(list(shown_flips(comparison))) == 6


def test_a_prompt_that_differs_stands_on_its_side(tmp_path: Path) -> None:
    """A harness that tells the time asks every rollout of a task in another way."""
    numbers = [(t, r) for t in range(2) for r in range(2)]
    inputs = [
        {"responses_create_params": {"input": f"question {t}"}, "_ng_task_index": t, "_ng_rollout_index": r}
        for t, r in numbers
    ]
    files = []
    for name, reward in (("six", 0.0), ("seven", 1.0)):
        rows = [row(f"question {t}", "a", reward, index=t, repeat=r) for t, r in numbers]
        for (t, r), made in zip(numbers, rows, strict=True):
            made["responses_create_params"]["input"].insert(0, {"role": "system", "content": f"at {name} {t} {r}"})
        files.append(write_rows(tmp_path / f"{name}.jsonl", rows))
        write_rows(tmp_path / f"{name}_materialized_inputs.jsonl", inputs)
    text = shown(compare_candidates(files[:1], [files[1:]])).text("flips")
    expected = ["before · reward 0", "at six 0 0", "question 0", "after · reward 1", "at seven 0 0", "question 0"]
    assert re.search(".*".join(expected), text)


def test_a_long_rollout_is_cut_with_a_note(tmp_path: Path) -> None:
    made = with_call("q" * 50_000, "start " + "x" * 50_000 + " end", 1.0)
    calls = made["response"]["output"][1:3] * 30
    made["response"]["output"][1:3] = [
        item | {"call_id": f"c{n // 2}"} | ({"arguments": '{"q": "short"}'} if n % 2 == 0 else {"output": "short"})
        for n, item in enumerate(calls)
    ]
    (line,) = read_lines([write_rows(tmp_path / "rollouts.jsonl", [made])])
    found = trajectory(line, room=2000)
    texts = [text.text for step in (*found.asked, *found.steps) for text in step.texts]
    assert found.cut and sum(map(len, texts)) < 3500
    assert [step.heading for step in found.steps if not step.texts] == ["… 45 messages left out …"]
    assert "short" in " ".join(texts)
    assert texts[-1].startswith("start xxx") and texts[-1].endswith("xxx end")
    assert re.search(r"… \d\d,\d\d\d characters left out …", texts[-1])
    (line,) = read_lines([write_rows(tmp_path / "rollouts.jsonl", [with_call("q", "a", 1.0)])])
    assert not trajectory(line).cut


def test_long_given_text_is_folded_and_the_policys_answer_is_not(tmp_path: Path) -> None:
    files = [tmp_path / "before.jsonl", tmp_path / "after.jsonl"]
    for file, reward in zip(files, (0.0, 1.0), strict=True):
        rows = [with_call(f"asked {t} " * 200, "answer " * 200, reward, index=t, number=t) for t in range(2)]
        for made in rows:
            made["response"]["output"][2]["output"] = "result " * 300
        write_rows(file, rows)
    source = comparison_page(compare_candidates(files[:1], [files[1:]]))
    folded = re.findall(r'<details class="long "><summary>(\w+)', source)
    assert folded == ["asked", "result", "result"] * 2


def test_an_answer_that_is_no_chat_is_shown_raw(tmp_path: Path) -> None:
    before, after = side(tmp_path, "before", {0: 2}), side(tmp_path, "after", {})
    rows = [json.loads(text) for text in after.read_text().splitlines()]
    for spoilt in rows[:2]:
        spoilt |= {"reward": 0.0}
        spoilt["response"]["output"] = []
    comparison = compare_candidates([before], [[write_rows(after, rows)]])
    assert comparison.candidates[0].after.refused == 2
    text = shown(comparison).text("flips")
    (reason,) = {line.reason for line in read_lines([after]) if line.rollout is None}
    assert f"after · {reason}: " in text and '"reward": 0.0' in text
    assert "answers that are no sound chat; they count 2" in shown(comparison).text("lines")


@pytest.mark.parametrize("text", HOSTILE)
def test_hostile_text_stays_text_wherever_it_stands(tmp_path: Path, text: str) -> None:
    harmless = shown(three(tmp_path))
    folder = tmp_path / "".join(c for c in text if c not in "/\x00")
    comparison = three(folder, text)
    lost = msgspec.structs.replace(comparison.before, failed_attempts={text: 2})
    source = comparison_page(msgspec.structs.replace(comparison, before=lost, metric=text))
    page = Page(source)
    assert page.scripts == harmless.scripts
    assert {tag for tag, _ in page.elements} <= {tag for tag, _ in harmless.elements}
    known = {name for _, found in harmless.elements for name in found}
    for tag, found in page.elements:
        assert set(found) <= known and "src" not in found, (tag, found)
        assert found.get("href", "#").startswith(("#", "data:,"))
    assert not [character for character in source if not character.isprintable() and character != "\n"]
    if text.isprintable():
        assert page.text("flips").count(text) >= 12 and text in page.text("effects")
    assert "49" not in page.text("verdict")


def test_what_is_not_compared_is_told(tmp_path: Path) -> None:
    before = side(tmp_path, "before", {}, tasks=20)
    comparison = compare_candidates([before], [[side(tmp_path, "after", {0: 2}, tasks=16)]])
    lines = shown(comparison).text("lines")
    assert f"4 tasks only before {before}:33" in lines
    assert "4 tasks have no partner" in shown(comparison).text("verdict")


def test_without_flips_there_is_nothing_to_filter(tmp_path: Path) -> None:
    files = [side(tmp_path, name, {}) for name in ("before", "after")]
    page = shown(compare_candidates(files[:1], [files[1:]]))
    assert "No task was fixed or broken." in page.text("flips")
    assert "Not shown" in page.text("verdict")


def many(folder: Path, name: str, tasks: int, *, length: int) -> Path:
    random_ = random.Random(name)
    rows = (
        row(
            f"question {t}",
            '"<&' * (length // 3),
            random_.random() if t % 2 else float(random_.random() < 0.5),
            index=t,
        )
        for t in range(tasks)
    )
    return write_rows(folder / f"{name}.jsonl", rows)


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The page of 10,000 tasks, thousands of which flip."""
    folder = tmp_path_factory.mktemp("large")
    comparison = compare_candidates(
        [many(folder, "before", 10_000, length=300)], [[many(folder, "after", 10_000, length=300)]]
    )
    assert len(comparison.candidates[0].flips) > 2000
    write_page(comparison, folder / "report.html")
    return folder / "report.html"


def test_ten_thousand_tasks_stay_small(large: Path) -> None:
    assert large.stat().st_size < 2_000_000
    page = Page(large.read_text())
    assert len(flips(page)) == 50
    assert re.search(r"50 of \d,\d\d\d are shown, the largest of each kind", page.text("flips"))
    dots = [int(n.replace(",", "")) for n in re.findall(r"([\d,]+) tasks?: ", page.text("tasks"))]
    assert sum(dots) == 10_000 and len(dots) < 1300
    assert "tasks near each other share a dot" in page.text("tasks")


def test_the_worst_text_stays_below_ten_megabytes(tmp_path: Path) -> None:
    files = [tmp_path / "before.jsonl", tmp_path / "after.jsonl"]
    for file, reward in zip(files, (0.0, 1.0), strict=True):
        rows = [with_call('"' * 20_000, '"' * 40_000, reward, index=t, number=t) for t in range(60)]
        for t, made in enumerate(rows):
            made["responses_create_params"]["input"][0]["content"] += str(t)
        write_rows(file, rows)
    write_page(compare_candidates(files[:1], [files[1:]]), tmp_path / "report.html")
    assert (tmp_path / "report.html").stat().st_size < 10_000_000


def task(before: float, after: float) -> TaskDifference:
    return TaskDifference("k", "c", "e", "q", before, after, 1, 1)


def test_tasks_with_the_same_means_share_a_dot() -> None:
    found = scatter([task(0, 1)] * 4 + [task(1, 0), task(1, 1)], points=True)
    assert [(d.tasks, d.tone, d.x, d.y) for d in found.dots] == [
        (4, "good", 0, 0),
        *sorted([(1, "bad", 1000, 1000), (1, "same", 1000, 0)], key=lambda dot: -dot[3]),
    ]
    assert found.dots[0].radius == 2 * found.dots[1].radius and not found.gathered
    wide = scatter([task(-1e308, 1e308), task(5, 5)], points=False)
    assert (wide.low, wide.high) == (-1e308, 1e308)
    assert all(0 <= dot.x <= 1000 and 0 <= dot.y <= 1000 for dot in wide.dots)
    level = scatter([task(3, 3)], points=False)
    assert level.low < 3 < level.high and level.dots[0].x == pytest.approx(500)


def test_an_interval_wider_than_the_others_is_cut(tmp_path: Path) -> None:
    comparison = three(tmp_path)
    first = comparison.candidates[0]
    wide = msgspec.structs.replace(
        first.environments[0], difference=dataclasses.replace(first.environments[0].difference, low=-6, high=7)
    )
    first = msgspec.structs.replace(first, environments=(wide, *first.environments[1:]))
    plot = effect_plot(msgspec.structs.replace(comparison, candidates=(first,)))
    assert [strip.cut for strip in plot.strips] == [True, False, False]
    assert (plot.strips[0].low, plot.strips[0].high) == (0, 1000) and plot.reach <= 1
    d = first.overall.difference
    assert plot.strips[-1].at == pytest.approx(500 + 500 * d.mean / plot.reach)


def test_both_sides_are_counted_in_the_same_bins() -> None:
    assert shared_bins(np.array([0.0, 1.0, 1.0]), np.array([0.5])) == (
        SharedBin(0, 0, 1, 0),
        SharedBin(0.5, 0.5, 0, 1),
        SharedBin(1, 1, 2, 0),
    )
    values = np.arange(120.0)
    found = shared_bins(values, values[:30])
    assert [bin.before for bin in found] == [10] * 12 and sum(bin.after for bin in found) == 30
    assert (found[0].low, found[-1].high) == (0, 119)
    assert sum(bin.before for bin in shared_bins(values * 1e306, values)) == 120


def test_compare_writes_the_page(tmp_path: Path) -> None:
    comparison = three(tmp_path)
    files = [tmp_path / f"{name}.jsonl" for name in ("before", "better")]
    out, html = tmp_path / "compared", tmp_path / "page.html"

    def compare(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "gymtrl", "compare", *files, *arguments]
        return subprocess.run(list(map(str, command)), capture_output=True, text=True)

    done = compare("-o", out, "--html", html, "--json")
    assert done.returncode == 0 and json.loads(done.stdout)["outcome"] == "not shown"
    assert (out / "report.html").read_text() == html.read_text()
    assert f"→ {html}" in done.stderr
    held = files[1].read_bytes()
    refused = compare("--html", files[1])
    assert refused.returncode == 2 and "is an input" in refused.stderr
    with pytest.raises(UserError, match="is an input"):
        write_page(comparison, files[1])
    assert files[1].read_bytes() == held


def test_a_validation_gets_its_page(tmp_path: Path) -> None:
    partial, out = tmp_path / ".validation.partial", tmp_path / "validation"
    three(partial)
    settings = CompareSettings()
    found = compare_rollouts(partial / "before.jsonl", [partial / "better.jsonl"], settings)
    moved = relocated(found, partial, out)
    assert ".partial" not in json.dumps(msgspec.to_builtins(moved))
    partial.rename(out)
    (out / "comparison.json").write_bytes(msgspec.json.encode(moved))
    step = validate_step(tmp_path / "model", out, ValidateSettings(baseline="b", tasks=tmp_path / "t.jsonl"))
    step.finish()
    assert f"{out}/before.jsonl:1" in Page((out / "report.html").read_text()).text("flips")


@pytest.mark.slow
def test_a_browser_opens_it_and_its_flips(tmp_path: Path) -> None:
    text = "<script>alert(1)</script><img src=x onerror=alert(2)>"
    write_page(three(tmp_path, text), tmp_path / "report.html")
    visible = "Array.from(document.querySelectorAll('details.flip')).filter(e => e.checkVisibility()).length"
    choose = "(e => {{ e.value = {!r}; e.dispatchEvent(new Event('input', {{bubbles: true}})) }})(document.{}({!r}))"
    with chromium(tmp_path) as tab:
        for width, height in ((1200, 900), (390, 800)):
            tab.size(width, height)
            tab.open(tmp_path / "report.html")
            assert tab.value("document.documentElement.scrollWidth <= innerWidth")
            assert tab.value(visible) == 6
            for number in range(6):
                tab.click(f"details.flip:nth-of-type({number + 1}) summary")
            assert tab.value("document.querySelectorAll('details.flip[open]').length") == 6
            assert tab.value("document.documentElement.scrollWidth <= innerWidth")
            sides = "Array.from(document.querySelectorAll('.side')).slice(0, 2).map(e => e.getBoundingClientRect())"
            beside = tab.value(f"(([a, b]) => a.top === b.top)({sides})")
            assert beside == (width > 1000)
            assert text in tab.value(
                "document.querySelector('details.flip .policy .text').parentNode.parentNode.innerText"
            )
            assert tab.value("document.querySelectorAll('main img').length") == 0
            tab.click("#close")
            assert tab.value("document.querySelectorAll('details.flip[open]').length") == 0
            tab.value(choose.format("fixed", "querySelector", "[name=kind]"))
            assert (tab.value(visible), tab.value("shown.value")) == (3, "3 shown")
            tab.value(choose.format("0", "querySelector", "[name=environment]"))
            assert tab.value(visible) == 0
            tab.value(choose.format("", "querySelector", "[name=kind]"))
            assert tab.value(visible) == 3
            tab.value(choose.format("1", "querySelector", "[name=candidate]"))
            assert tab.value(visible) == 2
            tab.click("#words")
            tab.write("QUESTION 2 <SCRIPT")
            assert (tab.value(visible), tab.value("shown.value")) == (1, "1 shown")
        light = tab.value("getComputedStyle(document.body).backgroundColor")
        tab.dark()
        assert tab.value("getComputedStyle(document.body).backgroundColor") != light
        assert tab.complaints == []
        assert {url.partition(":")[0] for url in tab.requests} <= {"file", "data"}


@pytest.mark.slow
def test_a_browser_opens_ten_thousand_tasks(large: Path, tmp_path: Path) -> None:
    with chromium(tmp_path) as tab:
        tab.open(large)
        assert tab.value("shown.value") == "50 shown"
        tab.click("details.flip summary")
        assert tab.value("document.querySelector('details.flip').open")
        assert tab.complaints == []


@pytest.mark.slow
def test_a_browser_that_finds_an_error_says_so(tmp_path: Path) -> None:
    page = tmp_path / "bad.html"
    page.write_text("<img src='gone.png'><script>console.error('a'); throw new Error('b')</script>")
    with chromium(tmp_path) as tab:
        tab.open(page)
        assert len(tab.complaints) >= 3
        assert any(url.endswith("gone.png") for url in tab.requests)
