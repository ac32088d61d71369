"""The report of a training run: what it says of real runs, that nothing foreign acts in it, and its size."""

from __future__ import annotations

import dataclasses
import io
import math
import random
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from gymtrl.doctor.finding import Finding
from gymtrl.errors import UserError
from gymtrl.reports.curves import BINS, HEIGHT, WIDTH, chart, curve, events, speed, thinned, trend
from gymtrl.reports.training import TrainingRun, gather_run, read_run, render_run
from gymtrl.reports.training_page import training_page, write_page
from tiny_runs import rows, tiny_model, train_run

VOID = {"meta", "path", "line"}


class Page(HTMLParser):
    """Reads a page; fails where tags do not match or an attribute stands twice."""

    def __init__(self, source: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.elements: list[tuple[str, dict[str, str]]] = []
        self.sections: dict[str, str] = {}
        self.section = ""
        self.feed(source)
        self.close()
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = {name: value or "" for name, value in attrs}
        assert len(found) == len(attrs), f"{tag} {attrs}"
        self.elements.append((tag, found))
        self.open.append(tag)
        if tag == "section":
            self.section = found["id"]
            self.sections[self.section] = ""

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, {name: value or "" for name, value in attrs}))

    def handle_endtag(self, tag: str) -> None:
        while self.open[-1] != tag:
            assert self.open.pop() in VOID, tag
        self.open.pop()
        if self.section:
            self.sections[self.section] += " "
        if tag == "section":
            self.section = ""

    def handle_data(self, data: str) -> None:
        if self.section:
            self.sections[self.section] += data

    def text(self, section: str) -> str:
        return " ".join(self.sections[section].split())

    def plots(self) -> list[str]:
        return [found["aria-label"].split(", steps")[0] for tag, found in self.elements if tag == "svg"]

    def drawn(self, title: str) -> str:
        """The path of the first curve in a chart."""
        start = next(
            at
            for at, (tag, found) in enumerate(self.elements)
            if tag == "svg" and found["aria-label"].startswith(title)
        )
        return next(found["d"] for tag, found in self.elements[start:] if tag == "path")

    def all(self, tag: str, kind: str) -> list[dict[str, str]]:
        return [found for name, found in self.elements if name == tag and found.get("class") == kind]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, smollm2_dir: Path) -> dict[str, Path]:
    """Folders of a real SFT and a real DPO run."""
    folder = tmp_path_factory.mktemp("runs")
    model = tiny_model(folder / "model", smollm2_dir)
    return {
        name: train_run(name, model, folder / name, rows(name, 8), eval_strategy="steps", eval_steps=2)
        for name in ("sft", "dpo")
    }


def made_run(metrics: list[dict[str, Any]], **fields: Any) -> TrainingRun:
    return dataclasses.replace(TrainingRun("run", {}, {}, metrics, []), **fields)


def long_run(steps: int) -> list[dict[str, Any]]:
    draw = random.Random(0)
    return [
        {"step": n, "loss": 2 + draw.random(), "lr": 1e-4, "grad_norm": 1 + draw.random(), "tokens": 100 * n}
        | {"seconds": n / 10, "entropy": draw.random(), "mean_token_accuracy": draw.random(), "peak_memory": 10**9}
        for n in range(1, steps + 1)
    ]


@pytest.mark.parametrize("objective", ["sft", "dpo"])
def test_the_page_of_a_real_run(runs: dict[str, Path], objective: str) -> None:
    run = read_run(runs[objective])
    write_page(run, runs[objective] / "report.html")
    source = (runs[objective] / "report.html").read_text()
    page = Page(source)
    assert list(page.sections) == ["outcome", "findings", "curves", "plan", "data", "settings"]
    always = ["Loss", "Learning rate", "Norm of the gradient", "Speed", "Peak memory", "Entropy"]
    assert page.plots()[0] == "Loss" and set(page.plots()) >= {*always, "Tokens that the model would have chosen"}
    preference = ["Rewards of the two sides", "Margin between the two", "Pairs told apart"]
    assert (set(preference) <= set(page.plots())) == (objective == "dpo")
    results = run.extra["results"]
    assert f"{results['eval_before']:.4g} → {results['eval_after']:.4g}" in page.text("outcome")
    assert "micro-batch 2 → 1 (after step 2: out of memory)" in page.text("outcome")
    assert page.text("findings").startswith("Findings warning: only 8 rows")  # the note comes after it
    assert "gymtrl filter … --reward-threshold 0.5" in page.text("findings")
    assert "step 2: micro-batch halved" in page.text("curves")
    assert len(page.all("line", "event")) == len(page.plots())
    assert "learning rate 0.001 default (TRL)" in page.text("plan")
    assert "train · rows 8" in page.text("data") and "ab" * 32 in page.text("data")
    assert "method full" in page.text("settings") and "trl " in page.text("settings")
    # Before, twice during training, and after: the last two at the same step.
    assert page.all("path", "dots")[0]["d"].count("M") == 4
    assert not list(runs[objective].glob(".*"))


def test_the_terminal_tells_a_real_run(runs: dict[str, Path]) -> None:
    out = io.StringIO()
    run = read_run(runs["dpo"])
    render_run(run, runs["dpo"], Console(file=out, width=100))
    told = out.getvalue()
    results = run.extra["results"]
    assert told.startswith("DPO of ") and "every weight" in told.splitlines()[0]
    for part in (
        "steps 4 · rows a step 2 (1 at once, 2 times)",
        f"tokens {results['tokens']:,}",
        "tokens/s",
        "peak memory",
        f"training loss: {results['first_loss']:.4g} → {results['last_loss']:.4g}",
        f"validation loss: {results['eval_before']:.4g} → {results['eval_after']:.4g}",
        "changed to fit into memory: micro-batch 2 → 1",
        "warning: only 8 rows (tiny_data)",
        "remedy: gymtrl filter",
    ):
        assert part in told, part
    assert told.splitlines()[-1] == f"→ {runs['dpo']}"


def test_a_folder_without_a_run_is_refused(runs: dict[str, Path], tmp_path: Path) -> None:
    (tmp_path / "manifest.json").write_bytes((runs["sft"] / "manifest.json").read_bytes())
    with pytest.raises(UserError, match=r"no metrics\.jsonl"):
        read_run(tmp_path)


def test_foreign_text_cannot_act(tmp_path: Path) -> None:
    bad = '"><script>alert(1)</script><img src="http://evil.example/x" onerror=x>\x1b[2J{{ 7*7 }}'
    metrics = [{"step": n, "loss": 1.0 / n, "lr": 0.1, f"custom/{bad}": 1.0, "tokens": n, "seconds": n} for n in (1, 2)]
    finding = Finding(severity="error", **dict.fromkeys(("rule", "title", "evidence", "cause", "remedy"), bad))
    run = made_run(
        [*metrics, {"step": 1, "event": bad}],
        name=bad,
        findings=[finding],
        settings={bad: bad, "trl": {bad: [bad]}},
        versions={bad: bad},
        extra={"objective": bad, "model": bad, "plan": {bad: bad, "method": bad}, "data": {bad: {bad: bad}}}
        | {"changes": [bad], "origins": {bad: bad}, "dataset_inputs": [{"path": bad, "sha256": bad}]}
        | {"fingerprint": {bad: bad}, "results": {"first_loss": 1.0, "last_loss": 0.5}},
    )
    source = training_page(run)
    page = Page(source)
    assert not {tag for tag, _ in page.elements} & {"script", "img", "link", "iframe", "object", "form", "base"}
    assert not [
        name for _, found in page.elements for name in found if name.startswith("on") or name in ("src", "style")
    ]
    assert {found["href"] for tag, found in page.elements if tag == "a"} <= {f"#{name}" for name in page.sections}
    assert (
        "\x1b" not in source and "49" not in page.text("findings") and "url(" not in source and "@import" not in source
    )
    policy = next(found["content"] for tag, found in page.elements if found.get("http-equiv"))
    assert policy.startswith("default-src 'none'; style-src 'unsafe-inline'") and "script" not in policy
    out = io.StringIO()
    render_run(run, tmp_path, Console(file=out, force_terminal=True, width=400))
    assert "\x1b[2J" not in out.getvalue() and "{{ 7*7 }}" in out.getvalue()


def test_steps_that_were_made_are_told_and_why_they_ended(tmp_path: Path) -> None:
    plan = {"steps": 40, "epochs": 2.0}
    run = made_run(long_run(10), extra={"plan": plan, "stopped": "the policy is \x1b far"})
    out = io.StringIO()
    render_run(run, tmp_path, Console(file=out, width=100))
    page = Page(training_page(run)).text("outcome")
    for told in (out.getvalue(), page):
        assert "steps 10 of 40" in told and "epochs 0.5" in told and "topped early: the policy is" in told
        assert "\x1b" not in told
    whole = Page(training_page(made_run(long_run(40), extra={"plan": plan, "stopped": None}))).text("outcome")
    assert "steps 40 epochs 2" in whole and "topped early" not in whole


def test_a_long_run_makes_a_small_page_and_keeps_its_spikes() -> None:
    metrics = long_run(100_000)
    metrics[61_803]["grad_norm"] = 900.0
    metrics[27_182]["loss"] = 0.01
    source = training_page(made_run(metrics))
    assert len(source) < 600_000
    page = Page(source)
    x, y = _peak(page.drawn("Norm of the gradient"), top=True)
    assert y == 0.0 and x == pytest.approx(61_803 / 99_999 * WIDTH, abs=0.1)
    x, y = _peak(page.drawn("Loss"), top=False)
    assert y == HEIGHT and x == pytest.approx(27_182 / 99_999 * WIDTH, abs=0.1)


def _coordinates(path: str) -> list[tuple[float, float]]:
    pairs = path.replace("M", "L").split("L")[1:]
    return [(float(pair.split()[0]), float(pair.split()[1])) for pair in pairs]


def _ends(path: str) -> tuple[float, float]:
    heights = [y for _, y in _coordinates(path)]
    return min(heights), max(heights)


def _peak(path: str, *, top: bool) -> tuple[float, float]:
    choose = min if top else max
    return choose(_coordinates(path), key=lambda point: point[1])


def test_thinning_keeps_order_ends_and_every_bins_extremes() -> None:
    draw = random.Random(1)
    points = [(step, draw.gauss(0, 1)) for step in range(1, 12_346)]
    kept = thinned(points, 50)
    assert len(kept) <= 102 and kept == sorted(kept) and set(kept) <= set(points)
    assert kept[0] == points[0] and kept[-1] == points[-1]
    values = [value for _, value in points]
    assert {min(values), max(values)} <= {value for _, value in kept}
    assert thinned(points[: 2 * BINS]) == points[: 2 * BINS]
    smooth = trend(points)
    assert smooth and max(abs(value) for _, value in smooth) < 0.5 and trend(points[:59]) == []


def test_what_is_not_finite_is_marked_and_does_not_bend_the_axis() -> None:
    metrics: list[dict[str, Any]] = [{"step": n, "loss": 1.0 + n} for n in range(1, 5)]
    metrics[2]["loss"] = math.nan
    metrics[3]["loss"] = math.inf
    made = chart("Loss", [curve(metrics, "loss", "training")], [], (1, 4))
    assert made is not None and [step for _, step in made.broken] == [3, 4]
    assert (made.bottom, made.top) == (2.0, 3.0) and made.lines[0].path == "M0.0 240.0L333.3 0.0"
    page = Page(training_page(made_run(metrics)))
    assert len(page.all("line", "broken")) == 2
    every = [{"step": n, "loss": math.nan} for n in (1, 2)]
    assert "red: not finite" in Page(training_page(made_run(every))).text("curves")


def test_axes_of_strange_values() -> None:
    def drawn(*values: float) -> Any:
        return chart(
            "x", [curve([{"step": n, "v": v} for n, v in enumerate(values)], "v", "v")], [], (0, len(values) - 1)
        )

    assert drawn(5.0, 5.0).lines[0].path == f"M0.0 {HEIGHT / 2}L1000.0 {HEIGHT / 2}"
    assert drawn(0.0).lines[0].path == f"M0.0 {HEIGHT / 2}h0"
    assert drawn(1.0, 1.0, 1.0, 1e6).log and not drawn(1.0, 2.0, 3.0).log and not drawn(0.0, 1.0, 1.0, 1e6).log
    assert _ends(drawn(-1.7e308, 0.0, 1.7e308).lines[0].path) == (0.0, HEIGHT)
    assert chart("x", [curve([], "v", "v")], [], (0, 1)) is None


def test_speed_and_events() -> None:
    metrics: list[dict[str, Any]] = [
        {"step": 1, "tokens": 100, "seconds": 1.0},
        {"step": 2, "tokens": 300, "seconds": 2.0},
        {"step": 2, "event": "continued from step 2"},
        {"step": 3, "tokens": 300, "seconds": 3.0},
        {"step": 4, "tokens": 400, "seconds": 3.0},
    ]
    assert speed(metrics).points == [(2, 200.0)]
    assert events(metrics) == [(2, "continued from step 2")]


def test_a_run_that_has_hardly_begun_has_a_page(tmp_path: Path) -> None:
    run = gather_run(tmp_path, name="early", settings={}, extra={})
    page = Page(training_page(run))
    assert page.plots() == [] and "No step was recorded" in page.text("curves")
    render_run(run, tmp_path, Console(file=io.StringIO()))
