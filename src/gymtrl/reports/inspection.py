"""The terminal view of a summary of rollouts."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import msgspec
from rich.console import Console, Group
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from gymtrl.rollouts.summary import Finding, Rewards, Spread, Summary
from gymtrl.text import plain

_BAR = 40
_TOP = 8
_STYLES = {"ok": "green", "context": "yellow", "reject": "red", "skip": "dim"}


def render(summary: Summary, console: Console) -> None:
    """Prints a summary, readable from about 80 columns on.

    Args:
        summary (`Summary`): What `summarize` found.
        console (`Console`): Where to print. Nothing of the file is taken for markup.
    """
    console.print(_panel("Lines", _lines(summary)))
    problems = [finding for finding in summary.findings if finding.verdict != "ok"]
    if problems:
        console.print(_panel("What stands in the way", *map(_problem, problems)))
    if summary.verdicts["ok"] + summary.verdicts["context"]:
        console.print(_panel("Rewards", *_rewards(summary.rewards)))
        console.print(_panel("Tasks", _tasks(summary)))
        console.print(_panel("Shape", _shape(summary)))
        console.print(_panel("Good for", _good_for(summary)))


def summary_json(summary: Summary) -> str:
    """A summary as one JSON document, indented, with a final line break."""
    return msgspec.json.format(msgspec.json.encode(summary), indent=2).decode() + "\n"


def _panel(title: str, *parts: Table | Text) -> Panel:
    return Panel(Group(*parts), title=title, title_align="left")


def _facts(pairs: Iterable[tuple[str, str | Text]]) -> Table:
    table = Table.grid(padding=(0, 2))
    table.add_column(no_wrap=True, style="bold")
    table.add_column(overflow="fold")
    for name, value in pairs:
        table.add_row(Text(name), Text(plain(value)) if isinstance(value, str) else value)
    return table


def _lines(summary: Summary) -> Table:
    verdicts = Text()
    for verdict, count in summary.verdicts.items():
        verdicts.append(f"{count:,} {verdict}   ", style=_STYLES[verdict])
    files = Text(plain("\n".join(f"{file} ({count:,})" for file, count in list(summary.files.items())[:_TOP])))
    if len(summary.files) > _TOP:
        files.append(f"\nand {len(summary.files) - _TOP} more")
    return _facts([("files", files), ("lines", f"{summary.lines:,}"), ("verdicts", verdicts)])


def _problem(finding: Finding) -> Text:
    text = Text()
    text.append(f"{finding.count:,} × {finding.verdict}:{finding.reason}", style=_STYLES[finding.verdict])
    text.append(f"  {plain(finding.detail)}\n")
    text.append(f"  at {plain(', '.join(finding.examples[:3]))}\n", style="dim")
    text.append(f"  → {finding.remedy}")
    return text


def _rewards(rewards: Rewards) -> list[Table | Text]:
    lacking = [(rewards.missing, "missing"), (rewards.non_finite, "not finite"), (rewards.masked, "masked")]
    words = ", ".join(f"{count:,} {what}" for count, what in lacking if count) or "none"
    if rewards.mean is None:
        return [_facts([("valid", "0"), ("without", words)])]
    spread = f"mean {rewards.mean:.3f}, from {rewards.minimum:g} to {rewards.maximum:g}, {rewards.distinct:,} distinct"
    bars = Table.grid(padding=(0, 1))
    bars.add_column(justify="right", no_wrap=True)
    bars.add_column(no_wrap=True)
    bars.add_column(justify="right", no_wrap=True)
    most = max(bin.count for bin in rewards.bins)
    for bin in rewards.bins:
        label = f"{bin.low:g}" if bin.low == bin.high else f"{bin.low:.3g} … {bin.high:.3g}"
        length = max(1, round(_BAR * bin.count / most)) if bin.count else 0
        bars.add_row(label, Text("█" * length, style="cyan"), f"{bin.count:,}")
    return [_facts([("valid", f"{rewards.n:,}"), ("without", words), ("spread", spread)]), Text(), bars]


def _tasks(summary: Summary) -> Table:
    tasks = summary.tasks
    sizes = ", ".join(f"{groups:,} of {size:,}" for size, groups in list(tasks.group_sizes.items())[:_TOP])
    facts = [
        ("tasks", f"{tasks.tasks:,} in {tasks.clusters:,} clusters"),
        ("groups", f"{tasks.groups:,}: {sizes or 'none'}" + (", …" if len(tasks.group_sizes) > _TOP else "")),
    ]
    if summary.good_for.threshold is not None:
        words = f"{tasks.never:,} never, {tasks.sometimes:,} sometimes, {tasks.always:,} always"
        facts.append((f"at least {summary.good_for.threshold:g}", words))
    if tasks.prompt_differs:
        facts.append(("no groups", f"{tasks.prompt_differs:,} task indexes were asked different things"))
    facts.append(("input rows", f"known for {tasks.with_input_row:,} rollouts (materialized inputs)"))
    if summary.world_failures:
        facts.append(("world failures", _counted(summary.world_failures)))
    return _facts(facts)


def _shape(summary: Summary) -> Table:
    facts = [
        ("agents", _counted(summary.agents)),
        ("models", _counted(summary.models)),
        ("turns", _spread(summary.turns)),
        ("tool calls", _spread(summary.tool_calls)),
        ("tools used", _counted(summary.tools) or "none"),
        ("prompt", _spread(summary.prompt_chars) + " characters"),
        ("completion", _spread(summary.completion_chars) + " characters"),
        ("counted", f"input {_spread(summary.input_tokens)} tokens; output {_spread(summary.output_tokens)} tokens"),
        ("truncated", f"{summary.truncated:,}"),
        ("masked", f"{summary.masked:,}"),
        ("token ids", f"recorded for {summary.recorded_tokens:,} rollouts"),
    ]
    if summary.flags:
        facts.append(("remarks", _counted(summary.flags)))
    return _facts(facts)


def _good_for(summary: Summary) -> Table:
    good = summary.good_for
    if good.threshold is None:
        threshold = f"{good.threshold_why}; pass --reward-threshold to filter"
    else:
        threshold = f"{good.threshold:g} ({good.threshold_why})"
    return _facts(
        [
            ("threshold", threshold),
            ("SFT", f"{good.sft_rows:,} rows (good, whole, distinct, at most 4 a task)"),
            ("DPO", f"{good.dpo_pairs:,} tasks with a good and a bad rollout"),
            ("GRPO", f"{good.grpo_groups:,} groups whose rewards differ"),
        ]
    )


def _spread(spread: Spread) -> str:
    if not spread.n:
        return "not recorded"
    return f"{spread.minimum:,} / {spread.median:,} / {spread.p95:,} / {spread.maximum:,} (min, median, 95 %, max)"


def _counted(counts: Mapping[str, int]) -> str:
    shown = [f"{name or 'unnamed'} ({count:,})" for name, count in list(counts.items())[:_TOP]]
    if len(counts) > _TOP:
        shown.append(f"and {len(counts) - _TOP} more")
    return ", ".join(shown)
