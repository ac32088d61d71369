"""What a rollout file holds and what it is good for, as plain data."""

from __future__ import annotations

import math
from array import array
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import msgspec

from .groups import group_key, tied_tasks
from .keys import completion_key
from .quality import default_threshold, measured, unfit
from .record import Line, Rollout
from .remedies import remedy_for
from .sidecars import count_failures
from .table import text_length

EXAMPLES = 5
MAX_PER_TASK = 4  # the default of FilterSettings.max_per_task, which this package does not import
_BINS = 10
_MANY = 12


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
    """Rewards from `low` to `high`; equal bounds where the file has few distinct values."""

    low: float
    high: float
    count: int


class Rewards(msgspec.Struct, frozen=True):
    """Rewards of the rollouts.

    Attributes:
        n (`int`): Finite, valid rewards; the figures below are theirs.
        missing, non_finite, masked (`int`): Rollouts without such a reward.
        minimum, maximum, mean (`float`, *optional*): `None` where `n` is 0.
        distinct (`int`): Distinct values.
        bins (`list[Bin]`): Up to 12 distinct values one by one, else ten ranges of equal width.
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
        never, sometimes, always (`int`): Groups by how often their valid rollouts reach the threshold.
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


class GoodFor(msgspec.Struct, frozen=True):
    """What could be trained on with the default settings, counting `ok` rollouts only.

    Attributes:
        threshold (`float`, *optional*): Lowest good reward; `None` where the user has to name it.
        threshold_why (`str`): The rule that gave it.
        sft_rows (`int`): Good, whole, distinct completions, at most four a task.
        dpo_pairs (`int`): Groups with a good rollout and a bad one.
        grpo_groups (`int`): Groups whose rewards differ.
    """

    threshold: float | None
    threshold_why: str
    sft_rows: int
    dpo_pairs: int
    grpo_groups: int


class Summary(msgspec.Struct, frozen=True):
    """All of it. `lines` is the sum of the counts of `findings`; the rest describes rollouts (`ok` and `context`)."""

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
    flags: dict[str, int]
    truncated: int
    masked: int
    recorded_tokens: int
    world_failures: dict[str, int]


@dataclass
class _Group:
    tasks: set[str] = field(default_factory=set)
    size: int = 0
    rewards: array[float] = field(default_factory=lambda: array("d"))  # valid ones
    ok_rewards: array[float] = field(default_factory=lambda: array("d"))
    fit_rewards: array[float] = field(default_factory=lambda: array("d"))


@dataclass
class _Tally:
    """What one pass collects; numbers and keys, never a chat."""

    files: Counter[str] = field(default_factory=Counter)
    findings: dict[tuple[str, str], tuple[int, list[str], str]] = field(default_factory=dict)
    groups: defaultdict[str, _Group] = field(default_factory=lambda: defaultdict(_Group))
    # Distinct completions of a task that could be learned from, with their rewards, by task key.
    candidates: defaultdict[str, dict[str, float]] = field(default_factory=lambda: defaultdict(dict))
    tasks: set[tuple[str, str | None]] = field(default_factory=set)  # task key and input key
    clusters: set[str] = field(default_factory=set)
    counts: Counter[str] = field(default_factory=Counter)
    series: defaultdict[str, array[int]] = field(default_factory=lambda: defaultdict(lambda: array("q")))
    names: defaultdict[str, Counter[str]] = field(default_factory=lambda: defaultdict(Counter))


def summarize(lines: Iterable[Line]) -> Summary:
    """Summarizes lines in one pass, keeping numbers and keys only.

    Failed attempts are counted from the `_failures.jsonl` beside each file.

    Args:
        lines (`Iterable[Line]`): As `read_lines` gives them.

    Returns:
        `Summary`: Plain data; `msgspec.json.encode` writes it.
    """
    tally = _Tally()
    for line in lines:
        tally.files[line.origin.file] += 1
        count, examples, detail = tally.findings.get((line.verdict, line.reason), (0, [], line.detail))
        if len(examples) < EXAMPLES:
            examples.append(str(line.origin))
        tally.findings[line.verdict, line.reason] = (count + 1, examples, detail)
        if line.rollout is not None:
            _add(tally, line.rollout, ok=line.verdict == "ok")
    return _finish(tally)


def _add(tally: _Tally, rollout: Rollout, *, ok: bool) -> None:
    group = tally.groups[group_key(rollout)]
    group.tasks.add(rollout.task_key)
    group.size += 1
    tally.tasks.add((rollout.task_key, rollout.input_key))
    tally.clusters.add(rollout.cluster_key)
    reward = rollout.reward
    if reward is None:
        tally.counts["missing"] += 1
    elif not math.isfinite(reward):
        tally.counts["non_finite"] += 1
    elif measured(rollout):
        group.rewards.append(reward)
        if ok:
            group.ok_rewards.append(reward)
            if not unfit(rollout):
                group.fit_rewards.append(reward)
                same = tally.candidates[rollout.task_key]
                key = completion_key(rollout.completion)
                same[key] = max(reward, same.get(key, reward))
    tally.counts["masked"] += rollout.masked
    tally.counts["truncated"] += rollout.truncated
    tally.counts["recorded"] += bool(rollout.recorded)
    tally.counts["with_input_row"] += rollout.input_key is not None
    series = tally.series
    series["turns"].append(rollout.turns)
    series["tool_calls"].append(rollout.n_tool_calls)
    series["prompt_chars"].append(text_length(rollout.prompt))
    series["completion_chars"].append(text_length(rollout.completion))
    if rollout.input_tokens is not None:
        series["input_tokens"].append(rollout.input_tokens)
    if rollout.output_tokens is not None:
        series["output_tokens"].append(rollout.output_tokens)
    tally.names["models"][rollout.model or ""] += 1
    tally.names["agents"][rollout.environment or rollout.agent or ""] += 1
    tally.names["flags"].update(rollout.flags)
    tally.names["tools"].update(call.name for message in rollout.completion for call in message.tool_calls)


def _finish(tally: _Tally) -> Summary:
    verdicts: Counter[str] = Counter({"ok": 0, "context": 0, "reject": 0, "skip": 0})
    findings = []
    for (verdict, reason), (count, examples, detail) in tally.findings.items():
        verdicts[verdict] += count
        findings.append(Finding(verdict, reason, count, examples, detail, remedy_for(verdict, reason)))
    order = list(verdicts)
    findings.sort(key=lambda f: (order.index(f.verdict), -f.count, f.reason))
    whole = [group for group in tally.groups.values() if len(group.tasks) == 1]
    good_for = _good_for(tally, whole)
    failures: Counter[str] = Counter()
    for file in tally.files:
        failures.update(count_failures(Path(file)))
    spreads = {name: _spread(tally.series[name]) for name in _SERIES}
    return Summary(
        files=dict(tally.files),
        lines=sum(tally.files.values()),
        verdicts=dict(verdicts),
        findings=findings,
        rewards=_rewards(tally),
        tasks=_tasks(tally, whole, good_for.threshold),
        good_for=good_for,
        **spreads,
        tools=dict(tally.names["tools"].most_common()),
        models=dict(tally.names["models"].most_common()),
        agents=dict(tally.names["agents"].most_common()),
        flags=dict(tally.names["flags"].most_common()),
        truncated=tally.counts["truncated"],
        masked=tally.counts["masked"],
        recorded_tokens=tally.counts["recorded"],
        world_failures=dict(failures),
    )


_SERIES = ("turns", "tool_calls", "prompt_chars", "completion_chars", "input_tokens", "output_tokens")


def _good_for(tally: _Tally, whole: Sequence[_Group]) -> GoodFor:
    threshold, why = default_threshold({reward for group in tally.groups.values() for reward in group.ok_rewards})
    rows = pairs = 0
    if threshold is not None:
        same = tied_tasks(tally.tasks)
        good: defaultdict[str, set[str]] = defaultdict(set)
        for task, completions in tally.candidates.items():
            good[same[task]].update(key for key, reward in completions.items() if reward >= threshold)
        rows = sum(min(MAX_PER_TASK, len(completions)) for completions in good.values())
        pairs = sum(
            any(r >= threshold for r in group.fit_rewards) and any(r < threshold for r in group.ok_rewards)
            for group in whole
        )
    varied = sum(len(set(group.ok_rewards)) > 1 for group in whole)
    return GoodFor(threshold, why, rows, pairs, varied)


def _tasks(tally: _Tally, whole: Sequence[_Group], threshold: float | None) -> Tasks:
    shares = Counter[str]()
    for group in whole:
        if threshold is not None and group.rewards:
            good = sum(reward >= threshold for reward in group.rewards)
            shares["always" if good == len(group.rewards) else "sometimes" if good else "never"] += 1
    return Tasks(
        tasks=len({task for task, _ in tally.tasks}),
        clusters=len(tally.clusters),
        with_input_row=tally.counts["with_input_row"],
        groups=len(whole),
        group_sizes=dict(sorted(Counter(group.size for group in whole).items())),
        prompt_differs=len(tally.groups) - len(whole),
        never=shares["never"],
        sometimes=shares["sometimes"],
        always=shares["always"],
    )


def _rewards(tally: _Tally) -> Rewards:
    values = Counter[float]()
    for group in tally.groups.values():
        values.update(group.rewards)
    n = values.total()
    low, high = (min(values), max(values)) if values else (None, None)
    return Rewards(
        n=n,
        missing=tally.counts["missing"],
        non_finite=tally.counts["non_finite"],
        masked=tally.counts["masked"],
        minimum=low,
        maximum=high,
        mean=math.fsum(value * count for value, count in values.items()) / n if n else None,
        distinct=len(values),
        bins=_bins(values),
    )


def _bins(values: Counter[float]) -> list[Bin]:
    if len(values) <= _MANY:
        return [Bin(value, value, values[value]) for value in sorted(values)]
    low, high = min(values), max(values)
    # Halves first: the width of a range from -1e308 to 1e308 is no float.
    width = high / _BINS - low / _BINS
    counts = [0] * _BINS
    for value, count in values.items():
        counts[min(_BINS - 1, int((value / width) - (low / width)))] += count
    return [Bin(low + i * width, high if i == _BINS - 1 else low + (i + 1) * width, n) for i, n in enumerate(counts)]


def _spread(values: array[int]) -> Spread:
    if not values:
        return Spread(0, 0, 0, 0, 0)
    ranked = sorted(values)
    last = len(ranked) - 1
    return Spread(len(ranked), ranked[0], ranked[last // 2], ranked[math.ceil(0.95 * last)], ranked[last])
