"""The demo's run: every stage of the job, each with its time, resumed where it was interrupted."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from gymtrl.demo.tasks import make_tasks
from gymtrl.formats.settings import FormatSftSettings
from gymtrl.formats.sft import format_sft
from gymtrl.formats.source import format_inputs
from gymtrl.gym.install import setup_gym
from gymtrl.gym.settings import CollectSettings, GymSetupSettings
from gymtrl.home import gymtrl_home
from gymtrl.models.smollm2 import make_smollm2
from gymtrl.reports.comparison import render_comparison
from gymtrl.reports.inspection import render
from gymtrl.reports.progress import watch
from gymtrl.reports.stage import render_manifest
from gymtrl.rollouts.inspection import inspect_rollouts
from gymtrl.selection.filter import files_read, filter_rollouts
from gymtrl.selection.settings import FilterSettings
from gymtrl.training.prepare import train_inputs
from gymtrl.training.run import train
from gymtrl.training.settings import TrainSftSettings
from gymtrl.validation.collection import collect_rollouts
from gymtrl.validation.session import gym_session
from gymtrl.validation.settings import ValidateSettings
from gymtrl.validation.validate import read_comparison, validate, validate_inputs
from gymtrl.workspace.stage import once

MODEL = "SmolLM2-135M-Instruct"
SERVER = "reasoning_gym"
TWINS = "metadata.twin"
_STAGES = ("collected", "filtered", "dataset", "trained", "validation", "logs")
# Fixed before any run: the temperature leaves something to select from, and is the same before and after.
TEMPERATURE = 1.0
MAX_TOKENS = 32


@dataclass
class _Clock:
    """Prints each stage's name as it begins, and keeps its time."""

    console: Console
    rows: list[tuple[str, float, bool]] = field(default_factory=list)

    @contextmanager
    def stage(self, name: str, what: str) -> Iterator[Callable[[bool], None]]:
        self.console.print(f"\n[bold cyan]{name}[/] {what}")
        ran = [True]
        start = time.monotonic()
        yield lambda did: ran.__setitem__(0, did)
        self.rows.append((name, time.monotonic() - start, ran[0]))

    def table(self) -> Table:
        table = Table("stage", "seconds", "", box=None, padding=(0, 2))
        for name, seconds, ran in self.rows:
            table.add_row(name, f"{seconds:.1f}", "" if ran else "up to date")
        table.add_row("together", f"{sum(seconds for _, seconds, _ in self.rows):.1f}", "")
        return table


def run_demo(out: Path, *, seed: int = 0, fresh: bool = False, limit: int | None = None) -> None:
    """Runs the whole job in `out`: tasks, rollouts, filter, dataset, training, validation, verdict.

    Args:
        out (`Path`): Folder to write; one artefact folder per stage.
        seed (`int`, *optional*, defaults to `0`): Seed of sampling, of the split and of training.
        fresh (`bool`, *optional*, defaults to `False`): Redo every stage; Gym and the model are kept.
        limit (`int`, *optional*): Use so many of the 300 tasks only.
    """
    console = Console()
    clock = _Clock(console)
    if fresh:
        _clear(out)
    out.mkdir(parents=True, exist_ok=True)
    with clock.stage("set-up", "NeMo Gym in its own environment, and the model"):
        gym = setup_gym(
            GymSetupSettings(servers=[SERVER]), say=lambda line: console.print(escape(line), soft_wrap=True)
        )
        model = gymtrl_home() / "models" / MODEL
        if not model.exists():
            make_smollm2(model)
        console.print(f"model: {escape(str(model))}", soft_wrap=True)
    with clock.stage("tasks", "one-digit sums, differences and products from reasoning_gym"):
        tasks = _write_tasks(out / "tasks.jsonl", Path(gym.python), limit)
    with gym_session(SERVER, out / "logs") as session:
        with (
            clock.stage("collect", "rollouts of the untrained model in Gym") as ran,
            watch(console) as session.progress,
        ):
            collecting = CollectSettings(temperature=TEMPERATURE, max_output_tokens=MAX_TOKENS, repeats=2, seed=seed)
            folder = out / "collected"
            manifest, did = once(
                folder,
                verb="collect",
                settings=collecting,
                inputs=[model, tasks],
                work=lambda: collect_rollouts(model, tasks, folder, collecting, session=session),
            )
            ran(did)
            rollouts = folder / "rollouts.jsonl"
            render_manifest(folder, manifest, console)
        with clock.stage("inspect", "what is in the rollouts"):
            render(inspect_rollouts([rollouts]), console)
        with clock.stage("filter", "right answers, at most two per task; 30 % of the twin clusters held out") as ran:
            filtering = FilterSettings(
                cluster=TWINS, validation=0.3, cap_per_task=2, split_salt=f"demo {seed}", seed=seed
            )
            filtered = out / "filtered"
            manifest, did = once(
                filtered,
                verb="filter",
                settings=filtering,
                inputs=files_read([rollouts]),
                work=lambda: filter_rollouts([rollouts], filtered, filtering),
            )
            ran(did)
            render_manifest(filtered, manifest, console)
        with clock.stage("format", "a TRL dataset in which only the model's own tokens carry loss") as ran:
            formatting = FormatSftSettings(model=str(model), seed=seed)
            dataset = out / "dataset"
            manifest, did = once(
                dataset,
                verb="format sft",
                settings=formatting,
                inputs=format_inputs(filtered, formatting),
                work=lambda: format_sft(filtered, dataset, formatting),
            )
            ran(did)
            render_manifest(dataset, manifest, console)
        with clock.stage("train", "LoRA with TRL's SFTTrainer") as ran:
            training = TrainSftSettings(model=str(model), seed=seed)
            trained = out / "trained"
            manifest, did = once(
                trained,
                verb="train sft",
                settings=training,
                inputs=train_inputs(dataset, training),
                work=lambda: train(dataset, trained, training),
            )
            ran(did)
            render_manifest(trained, manifest, console)
        with (
            clock.stage("validate", "both models on the held-out tasks, in the same Gym, sampled alike") as ran,
            watch(console) as session.progress,
        ):
            validating = ValidateSettings(
                temperature=TEMPERATURE,
                max_output_tokens=MAX_TOKENS,
                repeats=2,
                seed=seed + 1,
                baseline=str(model),
                tasks=filtered / "heldout_inputs.jsonl",
                cluster=TWINS,
                server=SERVER,
            )
            validation = out / "validation"
            _, did = once(
                validation,
                verb="validate",
                settings=validating,
                inputs=validate_inputs(trained, validating),
                work=lambda: validate(trained, validation, validating, session=session),
            )
            ran(did)
            comparison = read_comparison(validation)
            render_comparison(comparison, console)
    console.print("\n[bold]Time[/]")
    console.print(clock.table())
    console.print(_CLOSING.format(out=escape(str(out)), model=escape(str(model))), soft_wrap=True)
    console.print(f"[bold]{escape(comparison.verdict)}[/]", soft_wrap=True)


_CLOSING = """
[bold]What this gain is[/]: mostly the answer format. At 135 M parameters the model often has the right number and
seldom the wanted tags; training on its own rewarded rollouts makes the tags regular.
[bold]What it is not[/]: it did not learn arithmetic, the baseline depends on this one prompt, and another model or task
will gain more, less or nothing. No held-out question, nor its commuted twin, was trained on.

[bold]Where things are[/]
  {out}/collected/rollouts.jsonl          the rollouts, as Gym writes them
  {out}/filtered                          train, validation, dropped with reasons
  {out}/dataset                           the dataset, and train_with_trl.py to train from it without us
  {out}/trained/model                     the merged model
  {out}/validation/comparison.json        every held-out task, before and after

[bold]Try next[/]
  gymtrl inspect {out}/collected/rollouts.jsonl
  gymtrl format sft {out}/filtered --model {model} -o {out}/shown --show 3
  gymtrl train sft {out}/dataset -o {out}/full --method full
  gymtrl compare {out}/validation/before/rollouts.jsonl {out}/validation/after/rollouts.jsonl --cluster metadata.twin
"""


def _clear(out: Path) -> None:
    """Removes what the demo writes, and nothing else that may lie there."""
    for name in _STAGES:
        shutil.rmtree(out / name, ignore_errors=True)
        shutil.rmtree(out / f".{name}.partial", ignore_errors=True)
    (out / "tasks.jsonl").unlink(missing_ok=True)


def _write_tasks(path: Path, gym_python: Path, limit: int | None) -> Path:
    if not path.exists():
        draft = path.with_suffix(".partial")
        draft.write_text("".join(json.dumps(row) + "\n" for row in make_tasks(gym_python)[:limit]))
        draft.replace(path)
    return path
