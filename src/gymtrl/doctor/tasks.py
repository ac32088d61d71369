"""Rules about which tasks became worse after training, and whether the comparison can tell."""

from __future__ import annotations

import math
from collections import defaultdict

from scipy import special

from gymtrl.comparison.estimate import LEVEL, MeanEstimate, cluster_mean
from gymtrl.comparison.multiple import holm
from gymtrl.comparison.record import Effect, TaskDifference
from gymtrl.doctor.change import FEWEST_TASKS, POINTS, Change, ChangeRule, listed
from gymtrl.rollouts.record import Sampling

REACHES = 0.5

_QUESTION = 80  # characters


def _environments(change: Change) -> str | None:
    worse = [effect for effect in change.candidate.environments if effect.outcome == "regressed"]
    worse.sort(key=lambda effect: effect.difference.mean)
    return listed([_environment(change, effect) for effect in worse])


def _environment(change: Change, effect: Effect) -> str:
    told = (
        f"{effect.environment}: {effect.before.mean:.3f} before, {effect.after.mean:.3f} after, "
        f"{change.told(effect.difference)}; {effect.broken:,} of {effect.difference.n:,} tasks broken, "
        f"{effect.fixed:,} fixed"
    )
    broken = [f for f in change.candidate.flips if f.kind == "broken" and f.environment == effect.environment]
    return told + (f", such as {broken[0].after[0]}" if broken else "")


def _kinds(change: Change) -> str | None:
    kinds: dict[tuple[str, str], list[TaskDifference]] = defaultdict(list)
    for task in change.candidate.tasks:
        kinds[task.environment, task.cluster].append(task)
    # The tasks of a kind are the sample of it here, whatever makes them alike.
    large = [tasks for tasks in kinds.values() if len(tasks) >= FEWEST_TASKS]
    if not large or len(kinds) < 2:
        return None
    estimates = [cluster_mean([task.after - task.before for task in tasks], range(len(tasks))) for tasks in large]
    least = max(POINTS if change.comparison.points else 0.0, change.comparison.min_effect)
    found = [
        (d.mean, f"{tasks[0].environment}: {change.told(d)} over {d.n:,} tasks such as {_question(tasks[0])!r}")
        for tasks, d, p in zip(large, estimates, holm([_p(d) for d in estimates]), strict=True)
        if p <= 1 - LEVEL and d.mean <= -least
    ]
    return listed([words for _, words in sorted(found)])


def _question(task: TaskDifference) -> str:
    words = " ".join(task.question.split())
    return words if len(words) <= _QUESTION else words[: _QUESTION - 1] + "…"


def _p(d: MeanEstimate) -> float:
    if not d.standard_error:
        return float(not d.mean)
    return float(2 * special.stdtr(d.degrees_of_freedom, -abs(d.mean) / d.standard_error))


def _learned_by_heart(change: Change) -> str | None:
    if change.trained_on is None:
        return None
    trained, held_out = change.trained_on.overall.difference, change.candidate.overall.difference
    gap = trained.mean - held_out.mean
    least = POINTS if change.comparison.points else 0.0
    noise = math.hypot(trained.standard_error, held_out.standard_error)
    if min(trained.n, held_out.n) < FEWEST_TASKS or gap < least or gap <= 3 * noise:
        return None
    if trained.mean <= 0 or held_out.mean >= REACHES * trained.mean:
        return None
    return (
        f"{change.told(trained)} on {trained.n:,} tasks that were trained on, {change.told(held_out)} on "
        f"{held_out.n:,} that were not"
    )


def _several_samplings(change: Change) -> str | None:
    return listed([f"{name}: {'; '.join(map(str, ways[:3]))}" for name, ways in _samplings(change) if len(ways) > 1])


def _samplings(change: Change) -> list[tuple[str, tuple[Sampling, ...]]]:
    """How the policy was asked to sample after training, in the environments that are compared."""
    compared = {task.environment for task in change.candidate.tasks}
    return sorted((name, ways) for name, ways in change.candidate.after.sampling.items() if name in compared)


def _sampling_unset(change: Change) -> str | None:
    if change.candidate.outcome == "improved":
        return None
    unset = [name for name, ways in _samplings(change) if any(one.temperature is None for one in ways)]
    return f"requests of {listed(unset)} name no temperature" if unset else None


TASK_RULES = (
    ChangeRule(
        "environment_broke",
        "error",
        "An environment became worse",
        "Training on other tasks took away what these need, or their own training rows are bad: wrong rewards, another "
        "template, too high a learning rate.",
        "Read broken tasks in the rollouts; train again with rollouts of this environment among the others, and with a "
        "third of the --learning-rate",
        "by the interval, with Holm's adjustment where several environments or candidates are tested",
        _environments,
    ),
    ChangeRule(
        "kind_broke",
        "warning",
        "A kind of task became worse",
        "The training rows hold few of these tasks, or answer them in another way; a kind is a cluster, as --cluster "
        "names it.",
        "Collect and train on more tasks of this kind; 'gymtrl filter ... --balance uniform' keeps frequent ones from "
        "pushing out the others",
        f"p at most 0.05 with Holm's adjustment over kinds of {FEWEST_TASKS} tasks or more; ours: by {POINTS * 100:g} "
        "points, or by the smallest difference that counts",
        _kinds,
    ),
    ChangeRule(
        "tasks_learned_by_heart",
        "warning",
        "The gain does not reach tasks that were not trained on",
        "The policy learned the training tasks by heart: few tasks, many passes, or many rollouts of each.",
        "Train again with fewer --epochs or a lower --learning-rate, on more tasks with fewer rollouts of each: "
        "'gymtrl filter ... --cap-per-task 2'",
        f"ours: less than {REACHES:.0%} of the gain, {POINTS * 100:g} points, and beyond three standard errors",
        _learned_by_heart,
    ),
    ChangeRule(
        "sampling_mixed",
        "warning",
        "Rollouts of one environment were sampled in several ways",
        "The collections were put together from runs with other settings; a difference may be one of their shares.",
        "Collect both sides again with one setting, as 'gymtrl validate' does, or compare the runs one by one",
        "certain",
        _several_samplings,
    ),
    ChangeRule(
        "sampling_unset",
        "note",
        "The server chose the temperature",
        "A request without one takes the default of the server, which may read it from the model's "
        "generation_config.json; training may have written another or none.",
        "Collect both sides with 'gymtrl validate', whose requests name it, or see that both folders have the same "
        "generation_config.json",
        "certain; told where no improvement is shown",
        _sampling_unset,
    ),
)
