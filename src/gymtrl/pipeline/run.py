"""Going through the stages of a recipe: what is up to date is skipped, what was interrupted goes on."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from gymtrl.comparison.verdict import exit_status
from gymtrl.errors import UserError
from gymtrl.gym.install import require_installation
from gymtrl.pipeline.sections import SECTIONS, JobSettings, Stage, read_recipe
from gymtrl.pipeline.steps import Clock, Step, filter_step, format_step, train_step, validate_step
from gymtrl.reports.inspection import render
from gymtrl.rollouts.inputs import expand_inputs, expand_patterns, packing
from gymtrl.rollouts.inspection import inspect_rollouts
from gymtrl.selection.filter import HELD_OUT_INPUTS
from gymtrl.selection.settings import FilterSettings
from gymtrl.selection.source import dotted_cluster
from gymtrl.text import plain
from gymtrl.training.prepare import check_ahead, check_settings
from gymtrl.training.settings import TrainSettings
from gymtrl.training.trackers import check_trackers
from gymtrl.validation.settings import ValidateSettings
from gymtrl.validation.validate import model_folder, read_comparison
from gymtrl.workspace.artefact import MANIFEST, read_manifest
from gymtrl.workspace.recipe import Recipe
from gymtrl.workspace.settings import Resolved, resolve, validated
from gymtrl.workspace.spool import as_spooled, spooled
from gymtrl.workspace.stage import job_folder

_PASSED_ON = {"trl", "peft", "quantization", "adapter", "scheduler", "loss_type", "loss_weights"}
"""Settings of training whose values only other libraries can judge."""

_DEMANDING = {"peft", "method", "engine", "nodes"}
"""Settings of training that ask for what not every model and machine has."""

_WHAT = {
    "filter": "what is worth training on, and what is held out",
    "format": "a dataset in which only the policy's own tokens carry loss",
    "train": "with TRL",
    "validate": "the model before and after on the held-out tasks, in the same Gym",
}


@dataclass(frozen=True)
class Job:
    """A recipe whose every setting is resolved.

    Attributes:
        recipe (`Recipe`): What the user wrote.
        files (`list[Path]`): The rollout files.
        steps (`list[Step]`): The stages in order.
        resolved (`dict[str, Resolved]`): Verb → settings and their origins.
        unused (`list[str]`): Sections of datasets and trainings with another objective.
    """

    recipe: Recipe
    files: list[Path]
    steps: list[Step]
    resolved: dict[str, Resolved[Any]]
    unused: list[str]


def open_job(path: Path, *, dry: bool = False) -> Job:
    """Reads a recipe and resolves the settings of all stages, so that a mistake in the last one shows at once.

    Args:
        path (`Path`): The recipe.
        dry (`bool`, *optional*, defaults to `False`): Only to be shown: packed rollouts are not unpacked.

    Raises:
        UserError: The recipe says something that no stage knows, lacks the rollouts or the model, or names rollouts
            that are not there.
    """
    recipe = read_recipe(path)
    values = {key: entry.value for key, entry in recipe.keys.items()}
    origins = {key: recipe.origin(entry) for key, entry in recipe.keys.items()}
    job = validated(JobSettings, values, origins, remedy=f"'gymtrl run' needs rollouts and model at the top of {path}")
    objective, rollouts = job.objective, expand_patterns(job.rollouts)
    out = job.out or job_folder(rollouts[0])
    resolved: dict[str, Resolved[Any]] = {}

    def settings(verb: str, **given: tuple[Any, str]) -> Any:
        known = {name: (value, origin) for name, (value, origin) in given.items() if value is not None}
        resolved[verb] = resolve(SECTIONS[verb], section=verb, recipe=recipe, given=known)
        return resolved[verb].settings

    filtering: FilterSettings = settings("filter")
    groups = {"kind": ("groups", "what train grpo takes")} if objective == "grpo" else {}
    formatting = settings(f"format {objective}", **groups)
    if objective == "grpo" and formatting.kind != "groups":
        raise UserError(
            f"kind = {formatting.kind!r} ({resolved['format grpo'].origins['kind']}): 'train grpo' takes groups",
            remedy="leave 'kind' out below 'format grpo:'",
        )
    training: TrainSettings = settings(f"train {objective}")
    _check_passed_on(training)
    files = as_spooled(rollouts, out) if dry else expand_inputs(spooled(rollouts, out))
    steps = [
        filter_step(files, out / "filter", filtering),
        format_step(objective, out / "filter", out / objective, formatting),
        train_step(objective, out / objective, out / "trained", training),
    ]
    if "validate" in recipe.sections:
        validating = settings(
            "validate",
            baseline=(job.model, f"the model before training ({origins['model']})"),
            tasks=(out / "filter" / HELD_OUT_INPUTS, "what filter holds out"),
            cluster=(dotted_cluster(filtering), "as in filter"),
        )
        steps.append(validate_step(out / "trained", out / "validation", validating))
    unused = [name for name in recipe.sections if name.split()[0] in ("format", "train") and name not in resolved]
    return Job(recipe, files, steps, resolved, unused)


def run_job(job: Job, *, start: Stage | None = None, console: Console | None = None) -> int:
    """Goes through the stages.

    Args:
        job (`Job`): As `open_job` returns it.
        start (`Stage`, *optional*): Take the stages before this one as they are, and do this one and the rest anew.
        console (`Console`, *optional*): Standard output unless given.

    Returns:
        `int`: The exit status: 1 where the validation came out as its `fail_on` says, else 0.

    Raises:
        UserError, RunError: As of the stages. What was done stays; the same call goes on.
    """
    console = console or Console()
    clock = Clock(console)
    steps = _from(job, start)
    _look_ahead(job, steps, start)
    if job.unused:
        console.print(f"not used for this objective: {', '.join(job.unused)}", style="dim")
    if start in (None, Stage.INSPECT):
        _inspect(job, clock, anew=start is not None)
    for step in steps:
        if step.stage != "filter":
            _require_tasks(job)
        clock.go(step, _WHAT[step.stage], anew=start is not None)
    console.print("\n[bold]Time[/]")
    console.print(clock.table())
    if "validate" not in job.resolved:
        return 0
    return exit_status(read_comparison(job.steps[-1].folder), job.resolved["validate"].settings.fail_on)


def show_job(job: Job, *, start: Stage | None = None, console: Console | None = None) -> None:
    """Prints what a run would do: of each stage whether it is up to date, and the settings that are no defaults.

    Args:
        job (`Job`): As `open_job` returns it.
        start (`Stage`, *optional*): As of `run_job`.
        console (`Console`, *optional*): Standard output unless given.
    """
    console = console or Console()
    steps = _from(job, start)
    stale = start is not None or any(file.is_file() and packing(file) for file in job.files)
    for step in job.steps:
        if step in steps:
            stale = stale or not step.done()  # a stage that is done anew makes the next one stale
            state = "to do" if stale else "[green]up to date[/]"
        else:
            state = "taken as it is"
        console.print(f"[bold cyan]{step.verb}[/] → {escape(plain(str(step.folder)))}: {state}", soft_wrap=True)
        console.print(_not_default(job.resolved[step.verb]))
    if job.unused:
        console.print(f"not used for this objective: {', '.join(job.unused)}")


def _from(job: Job, start: Stage | None) -> list[Step]:
    """The steps of a stage and of those after it."""
    order = list(Stage)
    return [step for step in job.steps if start is None or order.index(Stage(step.stage)) >= order.index(start)]


def _not_default(resolved: Resolved[Any]) -> Table:
    table = Table(box=None, show_header=False, padding=(0, 2))
    for _ in ("setting", "value", "origin"):
        table.add_column(overflow="fold")
    for name, value in resolved.settings.model_dump(mode="json").items():
        origin = resolved.origins[name]
        if not origin.startswith("default"):
            table.add_row(name, Text(plain(str(value))), Text(plain(origin), style="dim"))
    return table


def _look_ahead(job: Job, steps: list[Step], start: Stage | None) -> None:
    """Finds what would stop the job later."""
    for step in job.steps:
        there = (step.folder / MANIFEST).is_file()
        if there and (found := read_manifest(step.folder).verb) != step.verb:
            remedy = f"name another folder as 'out' in {job.recipe.path}"
            raise UserError(f"{step.folder} holds what '{found}' wrote, not '{step.verb}'", remedy=remedy)
        if not there and step not in steps:
            raise UserError(f"--from {start}: there is no {step.folder} yet", remedy="run it without --from")
    at = next(at for at, step in enumerate(job.steps) if step.stage == "train")
    training = job.resolved[job.steps[at].verb].settings
    demands = job.steps[at] in steps and training.model_fields_set & _DEMANDING
    if demands and (start is not None or not all(step.done() for step in job.steps[: at + 1])):
        check_ahead(training)
    last = job.steps[-1]
    if last.verb != "validate" or (start is None and all(step.done() for step in job.steps)):
        return
    settings: ValidateSettings = job.resolved["validate"].settings
    if not Path(settings.baseline).is_file():
        model_folder(Path(settings.baseline))
    if settings.head is None:
        require_installation(settings.gym_home, settings.server)


def _check_passed_on(training: TrainSettings) -> None:
    """Finds mistakes in what training passes on to other libraries, which are imported only where there is any."""
    check_trackers(training.report_to)
    if training.model_fields_set & _PASSED_ON:
        check_settings(training)


def _inspect(job: Job, clock: Clock, *, anew: bool) -> None:
    """Shows what is in the rollouts, unless the filter has read them already."""
    settings = job.resolved["filter"].settings
    with clock.stage("inspect", "what is in the rollouts") as ran:
        fresh = not anew and job.steps[0].done()
        ran(not fresh)
        if not fresh:
            summary = inspect_rollouts(
                job.files,
                cluster=dotted_cluster(settings),
                reward_threshold=settings.reward_threshold,
                max_line_bytes=settings.max_line_bytes,
            )
            render(summary, clock.console)


def _require_tasks(job: Job) -> None:
    """Refuses to train where the validation that is wanted afterwards would have no tasks."""
    if "validate" not in job.resolved:
        return
    tasks = job.resolved["validate"].settings.tasks
    if tasks is None or not tasks.is_file():
        raise UserError(
            f"there are no tasks to validate on: {tasks} is not there",
            remedy="filter writes them where X_materialized_inputs.jsonl lies beside X.jsonl and 'validation' is above "
            "0; else name 'tasks' below 'validate:', or leave the section out",
        )
