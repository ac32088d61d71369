"""The demo's run: every stage of the job, each with its time, resumed where it was interrupted."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from rich.console import Console
from rich.markup import escape

from gymtrl.demo.tasks import make_tasks
from gymtrl.formats.settings import FormatSftSettings
from gymtrl.gym.install import setup_gym
from gymtrl.gym.settings import CollectSettings, GymSetupSettings
from gymtrl.home import gymtrl_home
from gymtrl.models.smollm2 import make_smollm2
from gymtrl.pipeline.steps import Clock, Step, filter_step, format_step, train_step, validate_step
from gymtrl.reports.inspection import render
from gymtrl.reports.progress import watch
from gymtrl.rollouts.inspection import inspect_rollouts
from gymtrl.selection.settings import FilterSettings
from gymtrl.training.settings import TrainSftSettings
from gymtrl.validation.collection import collect_rollouts
from gymtrl.validation.session import GymSession, gym_session
from gymtrl.validation.settings import ValidateSettings
from gymtrl.validation.validate import read_comparison

MODEL = "SmolLM2-135M-Instruct"
SERVER = "reasoning_gym"
TWINS = "metadata.twin"
_STAGES = ("collected", "filtered", "dataset", "trained", "validation", "logs")
# Fixed before any run: the temperature leaves something to select from, and is the same before and after.
TEMPERATURE = 1.0
MAX_TOKENS = 32


def run_demo(out: Path, *, seed: int = 0, fresh: bool = False, limit: int | None = None) -> None:
    """Runs the whole job in `out`: tasks, rollouts, filter, dataset, training, validation, verdict.

    Args:
        out (`Path`): Folder to write; one artefact folder per stage.
        seed (`int`, *optional*, defaults to `0`): Seed of sampling, of the split and of training.
        fresh (`bool`, *optional*, defaults to `False`): Redo every stage; Gym and the model are kept.
        limit (`int`, *optional*): Use so many of the 300 tasks only.
    """
    console = Console()
    clock = Clock(console)
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
        collected, filtered, dataset, trained = (out / name for name in _STAGES[:4])
        collecting = CollectSettings(temperature=TEMPERATURE, max_output_tokens=MAX_TOKENS, repeats=2, seed=seed)
        clock.go(_collect_step(model, tasks, collected, collecting, session), "rollouts of the untrained model in Gym")
        rollouts = collected / "rollouts.jsonl"
        with clock.stage("inspect", "what is in the rollouts"):
            render(inspect_rollouts([rollouts]), console)
        filtering = FilterSettings(cluster=TWINS, validation=0.3, cap_per_task=2, split_salt=f"demo {seed}", seed=seed)
        clock.go(
            filter_step([rollouts], filtered, filtering),
            "right answers, at most two per task; 30 % of the twin clusters held out",
        )
        clock.go(
            format_step("sft", filtered, dataset, FormatSftSettings(model=str(model), seed=seed)),
            "a TRL dataset in which only the model's own tokens carry loss",
        )
        clock.go(
            train_step("sft", dataset, trained, TrainSftSettings(model=str(model), seed=seed)),
            "LoRA with TRL's SFTTrainer",
        )
        validating = ValidateSettings(
            temperature=TEMPERATURE,
            max_output_tokens=MAX_TOKENS,
            repeats=2,
            seed=seed + 1,
            baseline=str(model),
            tasks=filtered / "heldout_inputs.jsonl",
            cluster=TWINS,
            server=[SERVER],
        )
        clock.go(
            validate_step(trained, out / "validation", validating, session),
            "both models on the held-out tasks, in the same Gym, sampled alike",
        )
    comparison = read_comparison(out / "validation")
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
  {out}/validation/report.html            the same to read in a browser, with rollouts side by side

[bold]Try next[/]
  gymtrl inspect {out}/collected/rollouts.jsonl
  gymtrl format sft {out}/filtered --model {model} -o {out}/shown --show 3
  gymtrl train sft {out}/dataset -o {out}/full --method full
  gymtrl compare {out}/validation/before/rollouts.jsonl {out}/validation/after/rollouts.jsonl --cluster metadata.twin
"""


def _collect_step(model: Path, tasks: Path, folder: Path, settings: CollectSettings, session: GymSession) -> Step:
    def work(console: Console) -> None:
        with watch(console) as session.progress:
            collect_rollouts(model, tasks, folder, settings, session=session)

    return Step("collect", folder, settings, lambda: [model, tasks], work)


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
