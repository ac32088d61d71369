"""The summary of rollouts and some of the rollouts themselves as one HTML page that needs nothing else.

Rollouts are foreign text. Three things keep it from acting in the reader's browser: jinja2 escapes every value, each
text passes `plain` first, and the page's content security policy allows no script but its own and no address but those
of `data:` images.
"""

from __future__ import annotations

import base64
import hashlib
import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import polars as pl
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from gymtrl.rollouts.examples import choose_examples
from gymtrl.rollouts.outputs import check_output
from gymtrl.rollouts.reader import read_at
from gymtrl.rollouts.reasons import remedy_for
from gymtrl.rollouts.record import Line, Message
from gymtrl.rollouts.summary import Bin, GoodFor, Summary
from gymtrl.text import plain

from .rollout import facts, image_text, parts, pretty_json, raw_excerpt, reward_text, shortened

EXAMPLES = 60
_LONG_CHARS, _LONG_LINES = 1200, 24
_INLINE_IMAGE = re.compile(r"data:image/(?:png|jpeg|gif|webp);base64,[A-Za-z0-9+/]+={0,2}")


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
    draft = html.with_name(f".{html.name}.partial")
    draft.write_text(inspection_page(summary, lines, title=title), encoding="utf-8")
    draft.replace(html)


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
    environment = _environment()
    script = environment.from_string('{% include "inspection.js" %}').render()
    return environment.get_template("inspection.html.j2").render(
        summary=summary,
        problems=[finding for finding in summary.findings if finding.verdict != "ok"],
        readable=summary.verdicts["ok"] + summary.verdicts["context"],
        examples=[_example(line, summary.good_for) for line in lines],
        title=title,
        script=Markup(script),
        script_hash=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
    )


def _environment() -> Environment:
    environment = Environment(
        loader=PackageLoader("gymtrl.reports"),
        autoescape=True,
        undefined=StrictUndefined,
        finalize=_harmless,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters.update(
        count=lambda number: f"{number:,}",
        figure=_figure,
        bin_label=_bin_label,
        width=lambda share: f"{100 * share:.2f}%",
        facts=facts,
        parts=parts,
        pretty=pretty_json,
        image_text=image_text,
        shortened=shortened,
    )
    environment.tests.update(long=_is_long, inline_image=lambda uri: bool(_INLINE_IMAGE.fullmatch(uri)))
    return environment


def _harmless(value: object) -> str:
    """Every value on its way into the page; `Markup` is what the templates themselves made."""
    return value if isinstance(value, Markup) else plain(str(value))


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


def _is_long(text: str) -> bool:
    return len(text) > _LONG_CHARS or text.count("\n") > _LONG_LINES


def _figure(value: float) -> str:
    return f"{value:,.0f}" if 1000 <= abs(value) < 1e15 else f"{value:.4g}"


def _bin_label(bin: Bin) -> str:
    return _figure(bin.low) if bin.low == bin.high else f"{_figure(bin.low)} … {_figure(bin.high)}"
