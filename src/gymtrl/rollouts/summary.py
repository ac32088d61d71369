"""What a rollout file holds and what it is good for, as plain data."""

from __future__ import annotations

import math
from collections import Counter
from pathlib import Path

import msgspec
import polars as pl

from .good_for import GoodFor as GoodFor
from .good_for import Thresholds, find_good, find_thresholds
from .quality import CAP_PER_TASK
from .reasons import remedy_for
from .sidecars import count_failures, load_sidecar
from .suspicions import EXAMPLES, MEASURED, places, suspicions
from .suspicions import Suspicion as Suspicion
from .table import COMPONENT, SCHEMA

_BINS = 10
_MANY = 12
_SERIES = ("turns", "tool_calls", "prompt_chars", "completion_chars", "input_tokens", "output_tokens")
_HISTOGRAMS = ("turns", "tool_calls", "completion_chars", "output_tokens")


class Finding(msgspec.Struct, frozen=True):
    """Lines with one verdict and reason.

    Attributes:
        verdict, reason (`str`): As in `Line`; `reason` is `""` for `ok`.
        count (`int`): How many lines.
        examples (`list[str]`): The first few as `file:line`.
        detail (`str`): What was found in the first of them.
        remedy (`str`): What to do about it.
    """

    verdict: str
    reason: str
    count: int
    examples: list[str]
    detail: str
    remedy: str


class Bin(msgspec.Struct, frozen=True):
    """Values from `low` to `high`; equal bounds where there are few distinct ones."""

    low: float
    high: float
    count: int


class Component(msgspec.Struct, frozen=True):
    """One part of the reward, over its finite values."""

    n: int
    minimum: float
    mean: float
    maximum: float


class Rewards(msgspec.Struct, frozen=True):
    """Rewards of the rollouts.

    Attributes:
        n (`int`): Finite, valid rewards; the figures below are theirs.
        missing, non_finite, masked (`int`): Rollouts without such a reward.
        minimum, maximum, mean (`float`, *optional*): `None` where `n` is 0.
        distinct (`int`): Distinct values.
        bins (`list[Bin]`): Up to 12 distinct values one by one, else ten ranges of equal width.
        components (`dict[str, Component]`): Parts of the reward by name, where the environment tells them.
    """

    n: int
    missing: int
    non_finite: int
    masked: int
    minimum: float | None
    maximum: float | None
    mean: float | None
    distinct: int
    bins: list[Bin]
    components: dict[str, Component]


class Spread(msgspec.Struct, frozen=True):
    """Distribution of a count; all zero where nothing was counted (`n` = 0)."""

    n: int
    minimum: int
    median: int
    p95: int
    maximum: int


class Tasks(msgspec.Struct, frozen=True):
    """Tasks and the rollouts of each.

    Attributes:
        tasks (`int`): Distinct `task_key`.
        clusters (`int`): Distinct `cluster_key`.
        with_input_row (`int`): Rollouts that the materialized inputs link to an input row.
        groups (`int`): Groups of rollouts of one task.
        group_sizes (`dict[int, int]`): How many groups have that many rollouts.
        prompt_differs (`int`): Task indexes whose rollouts were asked different things, so that they are no groups.
        never, sometimes, always (`int`): Groups by how often their valid rollouts reach the threshold;
            all 0 where there is none.
        asked (`int`): Rollouts that the materialized inputs beside the files asked for; 0 where there are none.
        missing (`int`): Of these, the ones without a line. Rejected lines and rollouts without an index do not tell
            which one they answer: each is taken to answer one.
        pass_rates (`list[Bin]`): Groups by the share of their valid rollouts that reach the threshold, in ten ranges;
            empty where there is no threshold.
    """

    tasks: int
    clusters: int
    with_input_row: int
    groups: int
    group_sizes: dict[int, int]
    prompt_differs: int
    never: int
    sometimes: int
    always: int
    asked: int
    missing: int
    pass_rates: list[Bin]


class Summary(msgspec.Struct, frozen=True):
    """All of it. `lines` is the sum of the counts of `findings`; the rest describes rollouts (`ok` and `context`).

    `tools`, `models`, `agents`, `environments` and `flags` count rollouts, the most frequent first; a tool counts once
    for each rollout that calls it, and `environments` is empty where no row names one. `histograms` has `turns`,
    `tool_calls`, `completion_chars` and `output_tokens`, in bins like those of the rewards.
    """

    files: dict[str, int]
    lines: int
    verdicts: dict[str, int]
    findings: list[Finding]
    rewards: Rewards
    tasks: Tasks
    good_for: GoodFor
    turns: Spread
    tool_calls: Spread
    prompt_chars: Spread
    completion_chars: Spread
    input_tokens: Spread
    output_tokens: Spread
    tools: dict[str, int]
    models: dict[str, int]
    agents: dict[str, int]
    environments: dict[str, int]
    flags: dict[str, int]
    truncated: int
    masked: int
    recorded_tokens: int
    world_failures: dict[str, int]
    suspicions: list[Suspicion]
    histograms: dict[str, list[Bin]]


def summarize(
    table: pl.LazyFrame, *, max_per_task: int = CAP_PER_TASK, reward_threshold: float | None = None
) -> Summary:
    """Summarizes a rollout table. Each figure reads the columns that it needs, so that large tables fit as well.

    What was asked for and what failed is read from the files beside those that the table names.

    Args:
        table (`pl.LazyFrame`): As `rollout_table` makes it, or a scan of such a table on disk.
        max_per_task (`int`, *optional*, defaults to 4): How many rollouts of a task `GoodFor.sft_rows` counts.
        reward_threshold (`float`, *optional*): Lowest good reward; as the kind of the rewards tells if not given.

    Returns:
        `Summary`: Plain data; `msgspec.json.encode` writes it.
    """
    rollouts = table.filter(pl.col("verdict").is_in(["ok", "context"]))
    doubts = suspicions(rollouts)  # first, because it takes the most memory, which the others then use again
    findings = _findings(table)
    verdicts: Counter[str] = Counter({"ok": 0, "context": 0, "reject": 0, "skip": 0})
    for finding in findings:
        verdicts[finding.verdict] += finding.count
    files = _counted(table, "file", by_count=False)
    failures: Counter[str] = Counter()
    for file in files:
        failures.update(count_failures(Path(file)))
    thresholds = find_thresholds(rollouts, reward_threshold)
    good_for = find_good(rollouts, thresholds, max_per_task)
    spreads, histograms = {}, {}
    for name in _SERIES:
        values = _ranked(rollouts, name)
        spreads[name] = _spread(values)
        if name in _HISTOGRAMS:
            histograms[name] = _bins(values)
    marks = rollouts.select(
        pl.col("truncated", "masked").sum(), recorded_tokens=pl.col("recorded_tokens").count()
    ).collect()
    return Summary(
        files=files,
        lines=verdicts.total(),
        verdicts=dict(verdicts),
        findings=findings,
        rewards=_rewards(rollouts),
        tasks=_tasks(table, rollouts, list(files), thresholds),
        good_for=good_for,
        turns=spreads["turns"],
        tool_calls=spreads["tool_calls"],
        prompt_chars=spreads["prompt_chars"],
        completion_chars=spreads["completion_chars"],
        input_tokens=spreads["input_tokens"],
        output_tokens=spreads["output_tokens"],
        tools=_counted(rollouts.select(pl.col("tools").explode()).drop_nulls(), "tools"),
        models=_counted(rollouts.select(pl.col("model").fill_null("")), "model"),
        agents=_counted(rollouts.select(pl.col("agent").fill_null("")), "agent"),
        environments=_counted(rollouts.select(pl.col("environment").replace("", None)).drop_nulls(), "environment"),
        flags=_counted(rollouts.select(pl.col("flags").explode()).drop_nulls(), "flags"),
        **marks.row(0, named=True),
        world_failures=dict(failures),
        suspicions=doubts,
        histograms=histograms,
    )


def _findings(table: pl.LazyFrame) -> list[Finding]:
    counts = table.group_by("verdict", "reason").len().collect(engine="streaming")
    found = []
    for verdict, reason, count in counts.iter_rows():
        lines = table.filter(pl.col("verdict") == verdict, pl.col("reason") == reason).select("file", "line", "detail")
        first = lines.head(EXAMPLES).collect()
        detail, remedy = first["detail"][0] or "", remedy_for(verdict, reason)
        found.append(Finding(verdict, reason, count, places(first["file"], first["line"]), detail, remedy))
    order = ["ok", "context", "reject", "skip"]
    return sorted(found, key=lambda f: (order.index(f.verdict), -f.count, f.reason))


def _counted(table: pl.LazyFrame, column: str, *, by_count: bool = True) -> dict[str, int]:
    """How often each value occurs: the most frequent first, else and where equal, the first seen first."""
    counts = table.group_by(column, maintain_order=True).len()
    if by_count:
        counts = counts.sort("len", descending=True, maintain_order=True)
    return dict(counts.collect().iter_rows())


def _ranked(rollouts: pl.LazyFrame, column: str) -> pl.Series:
    return rollouts.select(pl.col(column).drop_nulls().sort()).collect().to_series()


def _rewards(rollouts: pl.LazyFrame) -> Rewards:
    reward = pl.col("reward")
    lacking = rollouts.select(
        missing=reward.is_null().sum(), non_finite=(~reward.is_finite()).sum(), masked=pl.col("masked").sum()
    )
    values = _ranked(rollouts.filter(MEASURED), "reward")
    whole = _component(values)
    names = [name for name in rollouts.collect_schema().names()[len(SCHEMA) :] if name.startswith(COMPONENT)]
    parts = {n: _component(_ranked(rollouts.filter(pl.col(n).is_finite()), n)) for n in names}
    return Rewards(
        n=len(values),
        **lacking.collect().row(0, named=True),
        minimum=whole.minimum if whole else None,
        maximum=whole.maximum if whole else None,
        mean=whole.mean if whole else None,
        distinct=values.n_unique(),
        bins=_bins(values),
        components={name.removeprefix(COMPONENT): part for name, part in parts.items() if part},
    )


def _component(ranked: pl.Series) -> Component | None:
    """The figures of sorted finite values, `None` where there are none."""
    if ranked.is_empty():
        return None
    low, high = ranked[0], ranked[-1]
    scale = max(-low, high) or 1.0  # the sum of values that are each a float may be none
    return Component(len(ranked), low, float((ranked.to_numpy() / scale).mean()) * scale, high)


def _bins(values: pl.Series) -> list[Bin]:
    counts = values.value_counts(name="count").select(pl.nth(0).cast(pl.Float64).alias("value"), "count").sort("value")
    if len(counts) <= _MANY:
        return [Bin(value, value, count) for value, count in counts.iter_rows()]
    low, high = counts["value"][0], counts["value"][-1]
    # Halves first: the width of a range from -1e308 to 1e308 is no float.
    width = high / _BINS - low / _BINS
    place = (pl.col("value") / width - low / width).cast(pl.Int64, strict=False).fill_null(0).clip(0, _BINS - 1)
    filled = dict(counts.group_by(place).agg(pl.col("count").sum()).iter_rows())
    edges = [*(low + i * width for i in range(_BINS)), high]
    return [Bin(edges[i], edges[i + 1], filled.get(i, 0)) for i in range(_BINS)]


def _spread(ranked: pl.Series) -> Spread:
    if ranked.is_empty():
        return Spread(0, 0, 0, 0, 0)
    last = len(ranked) - 1
    return Spread(len(ranked), ranked[0], ranked[last // 2], ranked[math.ceil(0.95 * last)], ranked[last])


def _tasks(table: pl.LazyFrame, rollouts: pl.LazyFrame, files: list[str], thresholds: Thresholds) -> Tasks:
    keys = {
        name: rollouts.select(pl.col(name).hash().n_unique()).collect().item() for name in ("task_key", "cluster_key")
    }
    apart = rollouts.filter(pl.col("group").is_null())
    indexes = apart.select("file", pl.coalesce("environment", "agent"), "task_index").unique().select(pl.len())
    good = thresholds.is_good()
    judged = MEASURED & good.is_not_null()
    groups = (
        rollouts.filter(pl.col("group").is_not_null())
        .group_by("group")
        .agg(size=pl.len(), valid=judged.sum(), good=(judged & good).sum())
        .select("size", "valid", "good")
        .collect()
    )
    measured = groups.filter(pl.col("valid") > 0)
    never = len(measured.filter(pl.col("good") == 0))
    always = len(measured.filter(pl.col("good") == pl.col("valid")))
    asked, missing = _asked(table, rollouts, files)
    return Tasks(
        tasks=keys["task_key"],
        clusters=keys["cluster_key"],
        with_input_row=rollouts.select(pl.col("input_key").count()).collect().item(),
        groups=len(groups),
        group_sizes=dict(groups["size"].value_counts().sort("size").iter_rows()),
        prompt_differs=indexes.collect().item(),
        never=never,
        sometimes=len(measured) - never - always,
        always=always,
        asked=asked,
        missing=missing,
        pass_rates=_pass_rates(measured) if thresholds.whole is not None or thresholds.each else [],
    )


def _pass_rates(measured: pl.DataFrame) -> list[Bin]:
    tenth = (pl.col("good") * _BINS // pl.col("valid")).clip(0, _BINS - 1)
    filled = dict(measured.group_by(tenth).agg(pl.len()).iter_rows())
    return [Bin(i / _BINS, (i + 1) / _BINS, filled.get(i, 0)) for i in range(_BINS)]


def _asked(table: pl.LazyFrame, rollouts: pl.LazyFrame, files: list[str]) -> tuple[int, int]:
    """How many rollouts were asked for, and how many of them no line answers."""
    asked = missing = 0
    indexes = {"task_index": pl.Int64(), "repeat": pl.Int64()}
    for file in files:
        rows = load_sidecar(Path(file)).rows
        if not rows:
            continue
        here = pl.col("file") == file
        columns = dict(zip(indexes, zip(*rows, strict=True), strict=True))
        wanted = pl.LazyFrame(columns, schema=indexes, strict=False)  # an index too large for a rollout is null
        unanswered = wanted.join(rollouts.filter(here).select(*indexes), on=list(indexes), how="anti").select(pl.len())
        nameless = pl.any_horizontal(pl.col(*indexes).is_null()) & (pl.col("verdict") != "skip")
        others = table.filter(here & nameless).select(pl.len())
        asked += len(rows)
        missing += max(0, unanswered.collect().item() - others.collect().item())
    return asked, missing
