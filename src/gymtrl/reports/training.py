"""A finished training run on a terminal: what was trained, from what, how it went, and what is wrong with it."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.text import Text

from gymtrl.doctor.finding import SEVERITIES, Finding, read_findings
from gymtrl.errors import UserError
from gymtrl.reports.finding import finding_text
from gymtrl.text import plain
from gymtrl.workspace.artefact import read_manifest
from gymtrl.workspace.metrics import METRICS, read_metrics


@dataclass(frozen=True)
class TrainingRun:
    """What a run folder holds for people to read.

    Attributes:
        name (`str`): Of the folder.
        settings (`dict[str, Any]`): Resolved settings.
        extra (`dict[str, Any]`): `extra` of the manifest: `objective`, `model`, `plan`, `data`, `results`, `changes`,
            `dataset_inputs`, `stopped` (why it ended before its last step), and `origins` (where each value of the plan
            comes from).
        metrics (`list[dict[str, Any]]`): Lines of `metrics.jsonl`.
        findings (`list[Finding]`): What the doctor found, the worst first.
        versions (`dict[str, str]`): Of the packages that trained.
    """

    name: str
    settings: dict[str, Any]
    extra: dict[str, Any]
    metrics: list[dict[str, Any]]
    findings: list[Finding]
    versions: dict[str, str] = field(default_factory=dict)

    def facts(self, name: str) -> dict[str, Any]:
        """One of the mappings in `extra`; empty where it is missing."""
        found = self.extra.get(name)
        return found if isinstance(found, dict) else {}


def read_run(folder: Path) -> TrainingRun:
    """Reads a finished run.

    Args:
        folder (`Path`): Folder that `gymtrl train` wrote.

    Raises:
        UserError: No such folder, or no run of ours.
    """
    manifest = read_manifest(folder)
    if not (folder / METRICS).is_file():
        raise UserError(
            f"{folder} holds no training run: it has no {METRICS}", remedy="give a folder of 'gymtrl train'"
        )
    return gather_run(
        folder,
        name=folder.resolve().name,
        settings=manifest.settings,
        extra=manifest.extra,
        versions=manifest.versions,
    )


def gather_run(
    folder: Path,
    *,
    name: str,
    settings: Mapping[str, Any],
    extra: Mapping[str, Any],
    versions: Mapping[str, str] | None = None,
) -> TrainingRun:
    """Puts a run together whose folder has no manifest yet.

    Args:
        folder (`Path`): With `metrics.jsonl` and, where the doctor has seen it, `findings.json`.
        name (`str`): The run's name.
        settings, extra, versions (`Mapping`): As the manifest will have them.
    """
    return TrainingRun(
        name=name,
        settings=dict(settings),
        extra=dict(extra),
        metrics=read_metrics(folder / METRICS),
        findings=sorted(read_findings(folder / "findings.json"), key=lambda found: SEVERITIES.index(found.severity)),
        versions=dict(versions or {}),
    )


def render_run(run: TrainingRun, folder: Path, console: Console | None = None) -> None:
    """Prints a run in about a screen.

    Args:
        run (`TrainingRun`): The run.
        folder (`Path`): Where it is, for the last line.
        console (`rich.console.Console`, *optional*): Where to; standard output unless given.
    """
    console = console or Console()
    for line in (*_outcome(run), *_changes(run), *map(finding_text, run.findings)):
        console.print(line, soft_wrap=True)
    if not run.findings:
        console.print(Text("nothing suspicious was found", "green"))
    console.print(Text.assemble(("→ ", "green"), plain(str(folder))), soft_wrap=True)


def headline(run: TrainingRun) -> str:
    """What was trained, in a sentence."""
    plan = run.facts("plan")
    method = str(plan.get("method") or run.settings.get("method") or "")
    way = {"lora": "an adapter (LoRA)", "qlora": "an adapter on 4 bits (QLoRA)", "full": "every weight"}.get(
        method, method
    )
    objective = str(run.extra.get("objective") or plan.get("objective") or "training").upper()
    return f"{objective} of {run.extra.get('model', 'a model')}{': ' if way else ''}{way}"


def effort(run: TrainingRun) -> list[tuple[str, str]]:
    """What the run did and what it took, by name."""
    results = run.facts("results")
    told = planned(run.facts("plan"), made=steps_made(run))
    seconds, tokens = results.get("seconds"), results.get("tokens")
    if seconds:
        told.append(("time", duration(seconds)))
    if tokens:
        told.append(("tokens", f"{tokens:,}"))
    if seconds and tokens:
        told.append(("tokens/s", f"{tokens / seconds:,.0f}"))
    if results.get("peak_memory"):
        told.append(("peak memory", size(results["peak_memory"])))
    return told


def planned(plan: Mapping[str, Any], made: int | None = None) -> list[tuple[str, str]]:
    """What a plan comes to, by name; where fewer steps were made, of the epochs only their share."""
    told = []
    if "steps" in plan:
        short = made is not None and made < plan["steps"]
        told.append(("steps", f"{made:,} of {plan['steps']:,}" if short else f"{plan['steps']:,}"))
    if "effective_batch" in plan:
        told.append(("rows a step", f"{plan['effective_batch']:,}{_division(plan)}"))
    if "rows" in plan:
        told.append(("training rows", f"{plan['rows']:,}"))
    if "epochs" in plan:
        share = made / plan["steps"] if made is not None and plan.get("steps") else 1
        told.append(("epochs", f"{plan['epochs'] * share:.3g}"))
    return told


def steps_made(run: TrainingRun) -> int | None:
    """Optimizer steps that were made; `None` where none was recorded."""
    return max((entry["step"] for entry in run.metrics if "loss" in entry), default=None)


def stopped(run: TrainingRun) -> str:
    """Why training ended before its last step; empty where it did not."""
    return str(run.extra.get("stopped") or "")


def outcome(run: TrainingRun) -> list[tuple[str, float | None, float | None]]:
    """Losses: what they are of, first and last value."""
    results = run.facts("results")
    pairs = [
        ("training loss", results.get("first_loss"), results.get("last_loss")),
        ("validation loss", results.get("eval_before"), results.get("eval_after")),
    ]
    return [pair for pair in pairs if pair[1] is not None or pair[2] is not None]


def provenance(run: TrainingRun) -> list[tuple[str, str]]:
    """The data and the files that it was made from, by name."""
    told = list(flat(run.facts("data")))
    inputs = run.extra.get("dataset_inputs")
    for item in inputs if isinstance(inputs, list) else []:
        told.append((str(item.get("path", "")), f"SHA-256 {item.get('sha256', '')}"))
    return told


def changes(run: TrainingRun) -> list[str]:
    """Measures that were taken for memory, in words."""
    taken = run.extra.get("changes")
    return [_change(change) for change in taken] if isinstance(taken, list) else []


def flat(facts: Mapping[str, Any], above: str = "") -> Iterator[tuple[str, str]]:
    """The leaves of nested facts, each under a name in words; what is empty or unset is left out."""
    for key, value in facts.items():
        name = f"{above}{str(key).replace('_', ' ')}"
        if isinstance(value, dict):
            yield from flat(value, f"{name} · ")
        elif value is not None and value != []:
            yield name, words(value)


def words(value: object) -> str:
    """A value of a manifest, for people."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, float):
        return figure(value)
    if isinstance(value, Mapping):
        return ", ".join(f"{str(key).replace('_', ' ')} {words(item)}" for key, item in value.items())
    if isinstance(value, Sequence) and not isinstance(value, str):
        return ", ".join(words(item) for item in value)
    return str(value)


def figure(value: float | None) -> str:
    """A number in as many digits as are read; `not finite` for none."""
    if value is None or not math.isfinite(value):
        return "not finite"
    return f"{value:,.0f}" if 10_000 <= abs(value) < 1e15 else f"{value:.4g}"


def duration(seconds: float) -> str:
    """A time in its two largest units."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s"


def size(count: int) -> str:
    """Bytes in a unit that fits."""
    return f"{count / 2**30:.1f} GiB" if count >= 2**30 else f"{count / 2**20:.0f} MiB"


def _outcome(run: TrainingRun) -> Iterator[Text]:
    yield Text(plain(headline(run)), "bold")
    yield _line(effort(run))
    if why := stopped(run):
        yield Text(plain(f"stopped early: {why}"), "yellow")
    for name, before, after in outcome(run):
        yield Text(f"{name}: {figure(before)} → {figure(after)}")
    data = [(name, value) for name, value in flat(run.facts("data")) if value != "0"]
    if data:
        yield Text(plain("data: " + ", ".join(f"{name} {value}" for name, value in data)), "dim")


def _change(change: object) -> str:
    if isinstance(change, Mapping) and "measure" in change:
        return (
            f"{words(change['measure'])} (after step {words(change.get('step', 0))}: {words(change.get('reason', ''))})"
        )
    return words(change)


def _line(told: Sequence[tuple[str, str]]) -> Text:
    return Text(plain(" · ".join(f"{name} {value}" for name, value in told)))


def _changes(run: TrainingRun) -> Iterator[Text]:
    for change in changes(run):
        yield Text(plain(f"changed to fit into memory: {change}"), "yellow")


def _division(plan: Mapping[str, Any]) -> str:
    """How the rows of a step are computed, where not all at once."""
    parts = [(plan.get(name), word) for name, word in (("micro_batch", "at once"), ("accumulation", "times"))]
    told = [f"{number} {word}" for number, word in parts if number]
    processes = plan.get("processes") or 1
    return f" ({', '.join([*told, *([f'{processes} processes'] if processes > 1 else [])])})" if told else ""
