"""A training run as one HTML page that needs nothing else and runs no script.

Names, paths and findings may quote foreign text: jinja2 escapes every value, each text passes `plain` first, and the
page's content security policy allows no script and no address at all.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from gymtrl.reports.curves import HEIGHT, WIDTH, Chart, Curve, chart, curve, events, speed
from gymtrl.reports.page import page_environment, write_whole
from gymtrl.reports.training import (
    TrainingRun,
    changes,
    effort,
    figure,
    flat,
    headline,
    outcome,
    provenance,
    stopped,
    words,
)

_CURVES: dict[str, list[tuple[str, str]]] = {
    "Loss": [("loss", "training")],
    "Rewards of the two sides": [("rewards/chosen", "chosen"), ("rewards/rejected", "rejected")],
    "Margin between the two": [("rewards/margins", "margin")],
    "Pairs told apart": [("rewards/accuracies", "share")],
    "Log-probability of the two sides": [("logps/chosen", "chosen"), ("logps/rejected", "rejected")],
    "Distance from the reference, or from what was recorded (KL)": [("kl", "KL")],
    "Groups in which all rewards are equal": [("frac_reward_zero_std", "share")],
    "Ratio of the policy to the one that collected": [("ratio/negatives", "mean of bad rollouts")],
    "Clipped by their ratio": [("clip_ratio/region_mean", "share")],
    "Entropy": [("entropy", "a token")],
    "Tokens that the model would have chosen": [("mean_token_accuracy", "share")],
    "Learning rate": [("lr", "rate")],
    "Norm of the gradient": [("grad_norm", "before clipping")],
}
_NOT_DRAWN = {"step", "epoch", "tokens", "seconds", "peak_memory"}
_MOST_FURTHER = 60
_SAMPLED = 12


def write_page(run: TrainingRun, html: Path) -> None:
    """Writes the page of a run, whole or not at all.

    Args:
        run (`TrainingRun`): As `read_run` or `gather_run` give it.
        html (`Path`): The page to write; one of that name is replaced.
    """
    write_whole(training_page(run), html)


def training_page(run: TrainingRun) -> str:
    """Renders a run.

    Args:
        run (`TrainingRun`): As `read_run` or `gather_run` give it.

    Returns:
        `str`: A whole HTML document without any reference to another one.
    """
    environment = page_environment()
    environment.filters.update(figure=figure, words=words)
    charts, further = _charts(run.metrics)
    origins = run.facts("origins")
    plan = run.facts("plan")
    return environment.get_template("training.html.j2").render(
        run=run,
        title=headline(run),
        effort=effort(run),
        outcome=outcome(run),
        stopped=stopped(run),
        changes=changes(run),
        charts=charts,
        further=further,
        events=events(run.metrics),
        sampled=_sampled(run.metrics),
        plan=[(name.replace("_", " "), words(value), str(origins.get(name, ""))) for name, value in plan.items()],
        settings=[
            (name, "not set" if value in (None, {}, []) else words(value)) for name, value in run.settings.items()
        ],
        provenance=provenance(run),
        fingerprint=list(flat(run.facts("fingerprint"))),
        width=WIDTH,
        height=HEIGHT,
    )


def _charts(metrics: Sequence[dict[str, Any]]) -> tuple[list[Chart], list[Chart]]:
    """The charts that have a place of their own, and those of every other number that was logged."""
    marks = events(metrics)
    ends = [entry["step"] for entry in metrics]
    steps = (min(ends, default=0), max(ends, default=1))

    def drawn(groups: list[tuple[str, list[Curve]]]) -> list[Chart]:
        return [made for title, curves in groups if (made := chart(title, curves, marks, steps)) is not None]

    groups = [(title, [curve(metrics, key, name) for key, name in parts]) for title, parts in _CURVES.items()]
    memory = curve(metrics, "peak_memory", "GiB")
    memory = Curve(memory.name, [(step, value / 2**30) for step, value in memory.points], [], [])
    groups += [("Speed", [speed(metrics)]), ("Peak memory", [memory])]
    known = {key for parts in _CURVES.values() for key, _ in parts} | _NOT_DRAWN
    rest = {
        key: None
        for entry in metrics
        for key, value in entry.items()
        if isinstance(value, int | float) and key.removeprefix("eval_") not in known
    }
    names = list(dict.fromkeys(key.removeprefix("eval_") for key in rest))[:_MOST_FURTHER]
    return drawn(groups), drawn([(name, [curve(metrics, name, name)]) for name in names])


def _sampled(metrics: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """A dozen steps, evenly spread, for those who want numbers."""
    steps = [entry for entry in metrics if "loss" in entry]
    if len(steps) <= _SAMPLED:
        return steps
    return [steps[round(at * (len(steps) - 1) / (_SAMPLED - 1))] for at in range(_SAMPLED)]
