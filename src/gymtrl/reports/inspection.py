"""The terminal view of a summary of rollouts."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Mapping, Sequence

import msgspec
from rich.console import Console, Group
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from gymtrl.rollouts.summary import Bin, Component, Finding, Rewards, Spread, Summary, Suspicion
from gymtrl.text import plain

from .rollout import VERDICT_STYLES, fact_table

_BAR = 40
_LEVELS = " ▁▂▃▄▅▆▇█"
_TOP = 8
_UNKNOWN = "not known: pass --reward-threshold"


def render(summary: Summary, console: Console) -> None:
    """Prints a summary, readable from about 80 columns on.

    The first example of everything that was found is a whole place, to be copied; the paths of others are shown below
    the folder that all files have in common, and long ones without their middle.

    Args:
        summary (`Summary`): What `summarize` found.
        console (`Console`): Where to print. Nothing of the file is taken for markup.
    """
    room = max(24, console.width - 26)
    parent = _parent(list(summary.files))
    console.print(_panel("Lines", _lines(summary, parent, room)))
    problems = [
        _remark(f"{found.verdict}:{plain(found.reason)}", VERDICT_STYLES[found.verdict], found, parent, room)
        for found in summary.findings
        if found.verdict != "ok"
    ]
    if problems:
        console.print(_panel("What stands in the way", *problems))
    doubts = [_remark(doubt.kind.replace("_", " "), "yellow", doubt, parent, room) for doubt in summary.suspicions]
    if doubts:
        console.print(_panel("Look twice", *doubts, border="yellow"))
    if summary.verdicts["ok"] + summary.verdicts["context"]:
        console.print(_panel("Rewards", *_rewards(summary.rewards)))
        console.print(_panel("Tasks", *_tasks(summary)))
        console.print(_panel("Shape", *_shape(summary)))
        console.print(_panel("Good for", _good_for(summary)))


def summary_json(summary: Summary) -> str:
    """A summary as one JSON document, indented, with a final line break."""
    return msgspec.json.format(msgspec.json.encode(summary), indent=2).decode() + "\n"


def _panel(title: str, *parts: Table | Text, border: str = "none") -> Panel:
    return Panel(Group(*parts), title=title, title_align="left", border_style=border)


def _parent(files: Sequence[str]) -> str:
    """The folder that all files lie in, with its separator; `""` where there is none."""
    try:
        folder = os.path.commonpath([os.path.dirname(file) for file in files])
    except ValueError:  # no files, or absolute and relative ones
        return ""
    return os.path.join(folder, "")


def _shown(path: str, parent: str, room: int) -> str:
    """A path as seen from `parent`, without its middle where it has more than `room` characters."""
    path = plain(path.removeprefix(parent))
    if len(path) <= room:
        return path
    head = room // 2
    return f"{path[:head]}…{path[head + 1 - room :]}"


def _remark(name: str, style: str, what: Finding | Suspicion, parent: str, room: int) -> Text:
    lines: dict[str, list[str]] = {}
    for place in what.examples:
        file, _, line = place.rpartition(":")
        lines.setdefault(file, []).append(line)
    text = Text().append(f"{what.count:,} × {name}", style=style).append(f"  {plain(what.detail)}\n")
    for i, (file, numbers) in enumerate(lines.items()):
        text.append(f"  at {_shown(file, parent, room) if i else plain(file)}:{', '.join(numbers)}\n", style="dim")
    return text.append(f"  → {what.remedy}")


def _lines(summary: Summary, parent: str, room: int) -> Table:
    verdicts = Text()
    for verdict, count in summary.verdicts.items():
        verdicts.append(f"{count:,} {verdict}   ", style=VERDICT_STYLES[verdict])
    names = [f"{_shown(file, parent, room)} ({count:,})" for file, count in list(summary.files.items())[:_TOP]]
    if len(summary.files) > _TOP:
        names.append(f"and {len(summary.files) - _TOP:,} more")
    facts: list[tuple[str, str | Text]] = [("files", "\n".join(names))]
    if parent:
        facts.append(("in", _shown(parent, "", room)))
    return fact_table([*facts, ("lines", f"{summary.lines:,}"), ("verdicts", verdicts)])


def _rewards(rewards: Rewards) -> list[Table | Text]:
    lacking = [(rewards.missing, "missing"), (rewards.non_finite, "not finite"), (rewards.masked, "masked")]
    words = ", ".join(f"{count:,} {what}" for count, what in lacking if count) or "none"
    if rewards.mean is None:
        return [fact_table([("valid", "0"), ("without", words)])]
    spread = f"mean {rewards.mean:.3f}, from {rewards.minimum:g} to {rewards.maximum:g}, {rewards.distinct:,} distinct"
    facts = fact_table([("valid", f"{rewards.n:,}"), ("without", words), ("spread", spread)])
    bars = _bars((_range(bin), bin.count, f"{bin.count:,}") for bin in rewards.bins)
    shown: list[Table | Text] = [facts, Text(), bars]
    return [*shown, Text(), _components(rewards.components)] if rewards.components else shown


def _range(bin: Bin) -> str:
    return f"{bin.low:g}" if bin.low == bin.high else f"{bin.low:.3g} … {bin.high:.3g}"


def _bars(rows: Iterable[tuple[str, int, str]]) -> Table:
    """One bar a row: what stands before it, its length, and what stands behind it."""
    rows = list(rows)
    table = Table.grid(padding=(0, 1))
    table.add_column(justify="right", no_wrap=True)
    table.add_column(no_wrap=True)
    table.add_column(justify="right", no_wrap=True)
    most = max(count for _, count, _ in rows)
    for before, count, behind in rows:
        length = max(1, round(_BAR * count / most)) if count else 0
        table.add_row(before, Text("█" * length, style="cyan"), behind)
    return table


def _components(components: Mapping[str, Component]) -> Table:
    table = _columns("part of the reward", "rollouts", "min", "mean", "max")
    for name, part in list(components.items())[:_TOP]:
        figures = (f"{part.minimum:.4g}", f"{part.mean:.3f}", f"{part.maximum:.4g}")
        table.add_row(Text(plain(name) or "unnamed"), f"{part.n:,}", *figures)
    if len(components) > _TOP:
        table.add_row(f"and {len(components) - _TOP:,} more")
    return table


def _columns(first: str, *names: str) -> Table:
    table = Table(box=None, padding=(0, 2, 0, 0), header_style="dim")
    table.add_column(first, overflow="fold")
    for name in names:
        table.add_column(name, justify="right", no_wrap=True)
    return table


def _tasks(summary: Summary) -> list[Table | Text]:
    tasks = summary.tasks
    sizes = ", ".join(f"{groups:,} of {size:,}" for size, groups in list(tasks.group_sizes.items())[:_TOP])
    facts = [
        ("tasks", f"{tasks.tasks:,} in {tasks.clusters:,} clusters"),
        ("groups", f"{tasks.groups:,}: {sizes or 'none'}" + (", …" if len(tasks.group_sizes) > _TOP else "")),
    ]
    if tasks.prompt_differs:
        facts.append(("no groups", f"{tasks.prompt_differs:,} task indexes were asked different things"))
    facts.append(("input rows", f"known for {tasks.with_input_row:,} rollouts (materialized inputs)"))
    if tasks.asked:
        answered = f"{tasks.missing:,} of them without a line" if tasks.missing else "each has a line"
        facts.append(("asked for", f"{tasks.asked:,} rollouts, {answered}"))
    if summary.world_failures:
        facts.append(("world failures", _counted(summary.world_failures)))
    return [fact_table(facts), *_pass_rates(summary)]


def _pass_rates(summary: Summary) -> list[Table | Text]:
    tasks, threshold = summary.tasks, summary.good_for.threshold
    aim = "the threshold" if threshold is None else f"{threshold:g}"
    shares = {"never": tasks.never, "sometimes": tasks.sometimes, "always": tasks.always}
    total = sum(shares.values())
    if not total:
        return []
    often = _bars((f"{count:,} {name}", count, f"{count / total:.0%}") for name, count in shares.items())
    parts: list[Table | Text] = [Text(f"\nHow often the rollouts of a group reach {aim}", style="bold"), often]
    if max(tasks.group_sizes) > 2:
        tenths = ((f"{b.low:.0%} … {b.high:.0%}", b.count, f"{b.count:,}") for b in tasks.pass_rates)
        parts += [Text("\nGroups by the share of their rollouts that do", style="bold"), _bars(tenths)]
    return parts


def _shape(summary: Summary) -> list[Table | Text]:
    sizes = _columns("a rollout", "min", "median", "95 %", "max", "")
    for name, spread, field in (
        ("turns", summary.turns, "turns"),
        ("tool calls", summary.tool_calls, "tool_calls"),
        ("prompt, characters", summary.prompt_chars, ""),
        ("completion, characters", summary.completion_chars, "completion_chars"),
        ("input tokens", summary.input_tokens, ""),
        ("output tokens", summary.output_tokens, "output_tokens"),
    ):
        sizes.add_row(name, *_figures(spread), _spark(summary.histograms.get(field, [])))
    facts = [("agents", _counted(summary.agents))]
    if summary.environments:
        facts.append(("environments", _counted(summary.environments)))
    facts += [
        ("models", _counted(summary.models)),
        ("tools called", _counted(summary.tools) or "none"),
        ("truncated", f"{summary.truncated:,}"),
        ("masked", f"{summary.masked:,}"),
        ("token ids", f"recorded for {summary.recorded_tokens:,} rollouts"),
    ]
    if summary.flags:
        facts.append(("remarks", _counted(summary.flags)))
    return [sizes, Text(), fact_table(facts)]


def _good_for(summary: Summary) -> Table:
    good = summary.good_for
    sft = (
        f"{good.sft_rows:,} rows (good, whole, distinct, at most {good.max_per_task:,} a task)"
        if good.sft_rows is not None
        else _UNKNOWN
    )
    dpo = f"{good.dpo_pairs:,} groups with a good and a bad rollout" if good.dpo_pairs is not None else _UNKNOWN
    return fact_table(
        [
            (
                "threshold",
                good.threshold_why if good.threshold is None else f"{good.threshold:g} ({good.threshold_why})",
            ),
            ("SFT", sft),
            ("DPO", dpo),
            ("GRPO", f"{good.grpo_groups:,} groups whose rewards differ"),
        ]
    )


def _figures(spread: Spread) -> list[str]:
    if not spread.n:
        return ["not known", "", "", ""]
    return [f"{figure:,}" for figure in (spread.minimum, spread.median, spread.p95, spread.maximum)]


def _spark(bins: Sequence[Bin]) -> str:
    """A histogram one line high, `""` where all values are the same."""
    most = max((bin.count for bin in bins), default=0)
    return "".join(_LEVELS[math.ceil(8 * bin.count / most)] for bin in bins) if len(bins) > 1 else ""


def _counted(counts: Mapping[str, int]) -> str:
    shown = [f"{name or 'unnamed'} ({count:,})" for name, count in list(counts.items())[:_TOP]]
    if len(counts) > _TOP:
        shown.append(f"and {len(counts) - _TOP} more")
    return ", ".join(shown)
