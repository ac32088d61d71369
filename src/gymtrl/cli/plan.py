"""`gymtrl plan`"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from gymtrl.cli.options import Stage, print_resolved, resolved_values, stage_options
from gymtrl.training.settings import TrainDpoSettings, TrainGrpoSettings, TrainKtoSettings, TrainSftSettings
from gymtrl.workspace.settings import Resolved

Dataset = Annotated[Path, typer.Argument(help="Folder that 'format' wrote for this objective.")]
Calibrate = Annotated[
    bool,
    typer.Option("--calibrate/--no-calibrate", help="Train on the longest rows for a few steps, to tell the time."),
]


def register(app: typer.Typer) -> None:
    """Adds the verb."""
    group = typer.Typer(
        no_args_is_help=True,
        rich_markup_mode=None,
        help="Tell what training will do, need and take, with the options of 'train', before anything is spent.",
    )
    for verb in (sft, dpo, kto, grpo):
        group.command(verb.__name__)(verb)
    app.add_typer(group, name="plan")


@stage_options(TrainSftSettings, "train sft")
def sft(dataset: Dataset, calibrate: Calibrate = True, *, stage: Stage) -> None:
    """Plan fine-tuning on good rollouts."""
    _show(dataset, stage.settings, calibrate, stage.json)


@stage_options(TrainDpoSettings, "train dpo")
def dpo(dataset: Dataset, calibrate: Calibrate = True, *, stage: Stage) -> None:
    """Plan training on pairs."""
    _show(dataset, stage.settings, calibrate, stage.json)


@stage_options(TrainKtoSettings, "train kto")
def kto(dataset: Dataset, calibrate: Calibrate = True, *, stage: Stage) -> None:
    """Plan training on good and bad rollouts."""
    _show(dataset, stage.settings, calibrate, stage.json)


@stage_options(TrainGrpoSettings, "train grpo")
def grpo(dataset: Dataset, calibrate: Calibrate = True, *, stage: Stage) -> None:
    """Plan training on recorded groups."""
    _show(dataset, stage.settings, calibrate, stage.json)


def preview(resolved: Resolved[Any], *, as_json: bool, dataset: Path, **unused: Any) -> None:
    """What `train --dry-run` prints: each setting with its origin, and the plan."""
    if not as_json:
        print_resolved(resolved, as_json=False)
        print()
    _show(dataset, resolved.settings, calibrated=False, as_json=as_json, more={"settings": resolved_values(resolved)})


def _show(dataset: Path, settings: Any, calibrated: bool, as_json: bool, more: Mapping[str, Any] | None = None) -> None:
    from gymtrl.reports.plan import render_plan
    from gymtrl.training.prepare import plan_facts

    facts = plan_facts(dataset, settings, calibrated=calibrated)
    if as_json:
        import json

        print(json.dumps({**(more or {}), **facts}, indent=2))
    else:
        render_plan(facts)
