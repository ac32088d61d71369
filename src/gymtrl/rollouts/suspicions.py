"""What rewards look like when something is wrong with the verifier: reasons to look twice, no verdicts.

The thresholds are ours. Each is set so that chance alone rarely reaches it, and its reason stands beside it.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import msgspec
import polars as pl

EXAMPLES = 5
MEASURED = pl.col("reward").is_finite() & ~pl.col("masked")
"""The reward is a valid, finite measurement, as `quality.measured` says of a rollout."""

SAME_REWARD = 1e-9  # what summing the parts of a reward in another order can change
# At 50 rollouts in 10 groups a correlation of unrelated ranks has a standard deviation of about 0.16: 0.5 is three of
# them. Rewards that take two values cannot reach 1 in groups of four and more, so that a higher bound would miss them.
FEWEST_ROLLOUTS = 50
FEWEST_GROUPS = 10
STRONG = 0.5
# Four rollouts of a task that is solved half of the time come out alike once in eight times: fewer would say nothing.
# That half of all tasks do is rarely the policy's doing, and twenty are worth a look in any file.
WHOLE_GROUP = 4
SHARE_OF_GROUPS = 0.5
MANY_GROUPS = 20


class Suspicion(msgspec.Struct, frozen=True):
    """Something that a sound verifier rarely causes.

    Attributes:
        kind (`str`): `same_completion_different_rewards`, `reward_follows_length`, `always_lowest` or `always_highest`.
        count (`int`): Completions, rollouts or tasks concerned.
        detail (`str`): What was seen, with numbers.
        examples (`list[str]`): Up to five as `file:line`.
        remedy (`str`): What to do.
    """

    kind: str
    count: int
    detail: str
    examples: list[str]
    remedy: str


def suspicions(rollouts: pl.LazyFrame) -> list[Suspicion]:
    """Everything that is suspicious about the rewards of some rollouts.

    Args:
        rollouts (`pl.LazyFrame`): Rows of the rollout table that are `ok` or `context`.

    Returns:
        `list[Suspicion]`: At most one of each kind.
    """
    found = [same_completion_different_rewards(rollouts), reward_follows_length(rollouts), *one_sided(rollouts)]
    return [suspicion for suspicion in found if suspicion is not None]


def places(files: Iterable[str], lines: Iterable[int]) -> list[str]:
    """Places as `file:line`."""
    return [f"{file}:{line}" for file, line in zip(files, lines, strict=True)]


def same_completion_different_rewards(rollouts: pl.LazyFrame) -> Suspicion | None:
    """Completions that one task rewarded differently, by more than 1e-9.

    The examples are the lines with the lowest and the highest reward of the first two of them.
    """
    reward = pl.col("reward")
    # Digests of keys, and in pieces: their text for all rollouts at once is what would take the memory.
    keys = [pl.col("task_key").hash(), pl.col("completion_key").hash()]
    measured = rollouts.filter(MEASURED)
    repeated = (
        measured.select("reward", *keys)
        .with_row_index("row")
        .group_by("task_key", "completion_key")
        .agg(pl.len(), pl.col("row").min(), gap=reward.max() - reward.min())
        .filter(pl.col("len") > 1)
        .collect(engine="streaming")
    )
    differ = repeated.filter(pl.col("gap") > SAME_REWARD).sort("row")
    if differ.is_empty():
        return None
    gap = differ.select(pl.col("gap").max()).item()
    examples = []
    for task, completion in differ.select("task_key", "completion_key").head(EXAMPLES // 2).iter_rows():
        same = measured.filter(keys[0] == task, keys[1] == completion).select("file", "line", "reward").collect()
        ranked = same.sort("reward", maintain_order=True)
        examples += places(ranked["file"].gather([0, -1]), ranked["line"].gather([0, -1]))
    return Suspicion(
        kind="same_completion_different_rewards",
        count=len(differ),
        detail=f"{len(differ):,} of {len(repeated):,} completions that a task was answered with more than once got "
        f"different rewards, up to {gap:g} apart",
        examples=examples,
        remedy="Score one of them several times: either the verifier is not deterministic, or it judges by something "
        "that neither prompt nor completion shows.",
    )


def reward_follows_length(rollouts: pl.LazyFrame) -> Suspicion | None:
    """A strong rank correlation of reward and length of the completion within tasks.

    Both are ranked among the rollouts of their task and the task's mean rank is taken off, so that hard tasks with long
    answers do not make one. Truncated completions are left out: they fail because they are long. The examples are
    rollouts of the task that shows it most.
    """
    measured = rollouts.filter(MEASURED & ~pl.col("truncated") & pl.col("group").is_not_null())
    centred = {
        name: pl.col(column).rank() - (pl.len() + 1) / 2
        for name, column in {"reward_rank": "reward", "length_rank": "completion_chars"}.items()
    }
    ranked = (
        measured.select(pl.col("group").hash(), "reward", "completion_chars")
        .filter(pl.col("reward").n_unique().over("group") > 1)
        .select("group", *(rank.over("group").alias(name) for name, rank in centred.items()))
    )
    reward, length = pl.col("reward_rank"), pl.col("length_rank")
    groups = (
        ranked.group_by("group", maintain_order=True)
        .agg(pl.len(), both=(reward * length).sum(), rewards=(reward**2).sum(), lengths=(length**2).sum())
        .collect()
    )
    n, both, rewards, lengths = groups.select(pl.col("len", "both", "rewards", "lengths").sum()).row(0)
    if n < FEWEST_ROLLOUTS or len(groups) < FEWEST_GROUPS or not lengths:
        return None
    rho = both / math.sqrt(rewards * lengths)
    if abs(rho) < STRONG:
        return None
    clearest = groups.sort(pl.col("both") * rho, descending=True, maintain_order=True)["group"][0]
    lines = measured.filter(pl.col("group").hash() == clearest).select("file", "line").head(EXAMPLES).collect()
    return Suspicion(
        kind="reward_follows_length",
        count=n,
        detail=f"Within a task {'longer' if rho > 0 else 'shorter'} completions get more: rank correlation of reward "
        f"and characters {rho:+.2f}, over {n:,} rollouts of {len(groups):,} tasks",
        examples=places(lines["file"], lines["line"]),
        remedy="Read a short and a long completion of one task: if their length and not their content makes the "
        "difference, a policy trained on this reward learns length.",
    )


def one_sided(rollouts: pl.LazyFrame) -> list[Suspicion | None]:
    """Tasks whose every rollout got the lowest reward (`always_lowest`), and the highest (`always_highest`).

    Lowest and highest are 0 and 1 for rewards within them, else the lowest and the highest seen. The examples are the
    first line of each of the first five tasks.
    """
    reward = pl.col("reward")
    groups = (
        rollouts.filter(MEASURED & pl.col("group").is_not_null())
        .select("file", "line", "group", "reward")
        .group_by("group", maintain_order=True)
        .agg(pl.col("file", "line").first(), n=pl.len(), low=reward.min(), high=reward.max())
        .select("file", "line", "n", "low", "high")
        .collect()
    )
    if groups.is_empty():
        return []
    lowest, highest = groups["low"].min(), groups["high"].max()
    assert isinstance(lowest, float) and isinstance(highest, float)
    if lowest >= 0.0 and highest <= 1.0:
        lowest, highest = 0.0, 1.0
    if lowest == highest:  # 5 and nothing else: the best, the worst, or the only one there is
        return []
    whole = groups.filter(pl.col("n") >= WHOLE_GROUP)
    failed, solved = whole.filter(pl.col("high") == lowest), whole.filter(pl.col("low") == highest)
    return [
        _one_sided("always_lowest", failed, len(whole), f"{lowest:g}, the lowest reward"),
        _one_sided("always_highest", solved, len(whole), f"{highest:g}, the highest reward"),
    ]


def _one_sided(kind: str, tasks: pl.DataFrame, of: int, reward: str) -> Suspicion | None:
    if tasks.is_empty() or len(tasks) < min(MANY_GROUPS, SHARE_OF_GROUPS * of):
        return None
    return Suspicion(
        kind=kind,
        count=len(tasks),
        detail=f"{len(tasks):,} of {of:,} tasks with at least {WHOLE_GROUP} valid rewards: every one of their rollouts "
        f"got {reward}",
        examples=places(tasks["file"].head(EXAMPLES), tasks["line"].head(EXAMPLES)),
        remedy="Check the verifier on one of them by hand; tasks whose rewards do not vary teach GRPO and DPO nothing.",
    )
