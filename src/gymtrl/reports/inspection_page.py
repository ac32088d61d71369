"""The summary of rollouts and some of the rollouts themselves as one HTML page that needs nothing else."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import polars as pl

from gymtrl.rollouts.examples import choose_examples
from gymtrl.rollouts.outputs import check_output
from gymtrl.rollouts.reader import read_at
from gymtrl.rollouts.reasons import remedy_for
from gymtrl.rollouts.record import Line, Message
from gymtrl.rollouts.summary import Bin, GoodFor, Summary

from .page import figure, page_environment, page_script, write_whole
from .rollout import raw_excerpt, reward_text, shortened

EXAMPLES = 60


def write_page(
    summary: Summary, table: Path, html: Path, *, examples: int = EXAMPLES, cluster: str | None = None
) -> None:
    """Writes the page of rollout files, whole or not at all.

    Args:
        summary (`Summary`): What `inspect_rollouts` found.
        table (`Path`): The rollout table that it wrote; the files that it names are still there.
        html (`Path`): The page to write; one of that name is replaced.
        examples (`int`, *optional*, defaults to 60): How many rollouts one can read in it.
        cluster (`str`, *optional*): As in `inspect_rollouts`.

    Raises:
        `UserError`: If one of the files is gone, or has changed since the table was made; if the page cannot be written
            or would overwrite one of them.
    """
    check_output(html, [table, *map(Path, summary.files)])
    lines = [
        read_at(origin, cluster=cluster) for origin in choose_examples(pl.scan_parquet(table, glob=False), examples)
    ]
    names = [Path(file).name for file in summary.files]
    title = names[0] if len(names) == 1 else f"{len(names)} rollout files"
    write_whole(inspection_page(summary, lines, title=title), html)


def inspection_page(summary: Summary, lines: Sequence[Line], *, title: str) -> str:
    """Renders a summary and the lines that the reader can look into.

    Args:
        summary (`Summary`): What `inspect_rollouts` found.
        lines (`Sequence[Line]`): Rollouts and rejected lines, in the order in which they are listed.
        title (`str`): The page's heading.

    Returns:
        `str`: A whole HTML document without any reference to another one.

    Raises:
        `UserError`: If the file of a rejected line is gone, or has changed since.
    """
    environment = page_environment()
    environment.filters["bin_label"] = _bin_label
    return environment.get_template("inspection.html.j2").render(
        summary=summary,
        problems=[finding for finding in summary.findings if finding.verdict != "ok"],
        readable=summary.verdicts["ok"] + summary.verdicts["context"],
        examples=[_example(line, summary.good_for) for line in lines],
        title=title,
        **page_script(environment, "inspection.js"),
    )


def _example(line: Line, good: GoodFor) -> dict[str, Any]:
    rollout = line.rollout
    shown = {
        "line": line,
        "remedy": remedy_for(line.verdict, line.reason),
    }
    if rollout is None:
        return shown | {"raw": raw_excerpt(line.origin)}
    valid = rollout.reward is not None and math.isfinite(rollout.reward) and not rollout.masked
    threshold = good.threshold_of(rollout.environment, rollout.agent)
    judged = valid and threshold is not None
    return shown | {
        "reward": reward_text(rollout.reward),
        "outcome": ("good" if rollout.reward >= threshold else "bad") if judged else "",  # type: ignore[operator]
        "task": _task(rollout.prompt),
    }


def _task(prompt: Sequence[Message]) -> str:
    """The words that tell a task from others: those of the last message that has any."""
    texts = [message.content for message in prompt if message.content.strip()]
    asked = [message.content for message in prompt if message.role == "user" and message.content.strip()]
    return shortened((asked or texts or [""])[-1], 140)


def _bin_label(bin: Bin) -> str:
    return figure(bin.low) if bin.low == bin.high else f"{figure(bin.low)} … {figure(bin.high)}"
