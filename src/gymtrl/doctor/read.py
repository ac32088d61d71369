"""A run folder as a record: of a finished run, or of one that was interrupted."""

from __future__ import annotations

import json
from dataclasses import fields
from pathlib import Path
from typing import Any

from gymtrl.doctor.rule import OBJECTIVES
from gymtrl.doctor.run import DataFacts, RunRecord
from gymtrl.errors import UserError
from gymtrl.workspace.metrics import read_metrics

_COUNTED = ("trainable", "parameters", "adapted", "linear", "vocabulary")
_PLANNED = ("effective_batch", "learning_rate")


def read_run(run: Path) -> RunRecord:
    """Reads what is known of a run.

    Args:
        run (`Path`): Folder that `gymtrl train` wrote or was writing when it was interrupted. While a run is unfinished
            its folder is called `.NAME.partial`; `NAME` finds it, too.

    Raises:
        UserError: No such run.
    """
    folder = run_folder(run)
    if (folder / "manifest.json").is_file():
        manifest = _json(folder / "manifest.json")
        known = {**manifest, **_mapping(manifest.get("extra"))}
    else:
        # The name under which a stage keeps what it was called with, and what the run hands to the process that trains.
        known = {**_json(folder / ".identity.json"), **_json(folder / "job.json")}
    if not known:
        raise UserError(
            f"{run} is no folder of a training run or a comparison",
            remedy="give the folder that 'gymtrl train' wrote, or 'compare' or 'validate' (its -o)",
        )
    settings, plan = _mapping(known.get("settings")), _mapping(known.get("plan"))
    objective = known.get("objective") or plan.get("objective") or str(known.get("verb", "")).removeprefix("train ")
    if objective not in OBJECTIVES:
        raise UserError(
            f"{run} was written by '{known.get('verb')}' and is no training run",
            remedy="give the folder that 'gymtrl train' wrote (its -o)",
        )
    inputs = known.get("inputs") or [{}]
    entries = read_metrics(folder / "metrics.jsonl")
    counted = {"vocabulary": _json(folder / "model" / "config.json").get("vocab_size")}
    counted |= _mapping(known.get("parameters"))
    return RunRecord(
        objective=objective,
        method=str(plan.get("method") or settings.get("method") or "lora"),
        dataset=str(_mapping(inputs[0]).get("path", "DATASET")),
        data=read_facts(known.get("data")),
        planned_steps=plan.get("steps"),
        desirable_weight=settings.get("desirable_weight"),
        undesirable_weight=settings.get("undesirable_weight"),
        stop_ratio=settings.get("stop_ratio"),
        stop_kl=settings.get("stop_kl"),
        steps=tuple(entry for entry in entries if "loss" in entry),
        evals=tuple(entry for entry in entries if "eval_loss" in entry),
        **{name: plan.get(name) for name in _PLANNED},
        **{name: counted.get(name) for name in _COUNTED},
    )


def run_folder(run: Path) -> Path:
    """The folder of a run: its own, or while it is unfinished `.NAME.partial`."""
    partial = unfinished(run)
    return run if partial is None or (run / "manifest.json").is_file() else partial


def unfinished(run: Path) -> Path | None:
    """The folder of an unfinished run of this name, which may be another than the finished one."""
    partial = run.parent / f".{run.name}.partial"
    return partial if partial.is_dir() else None


def read_facts(found: object) -> DataFacts | None:
    """Facts of a dataset as a manifest keeps them; `None` where it has none."""
    facts = _mapping(found)
    if not {"rows", "tokens", "loss_tokens"} <= facts.keys():
        return None
    return DataFacts(**{field.name: facts[field.name] for field in fields(DataFacts) if field.name in facts})


def _json(path: Path) -> dict[str, Any]:
    try:
        return _mapping(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError):
        return {}


def _mapping(found: object) -> dict[str, Any]:
    return found if isinstance(found, dict) else {}
