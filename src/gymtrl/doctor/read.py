"""A run folder as a record: of a finished run, or of one that was interrupted."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

from gymtrl.doctor.rule import OBJECTIVES
from gymtrl.doctor.run import DataFacts, RunRecord
from gymtrl.errors import UserError

_COUNTED = ("trainable", "parameters", "adapted", "linear", "vocabulary")
_PLANNED = ("effective_batch", "micro_batch", "learning_rate")


def read_run(run: Path) -> RunRecord:
    """Reads what is known of a run.

    Args:
        run (`Path`): Folder that `gymtrl train` wrote or was writing when it was interrupted. While a run is unfinished
            its folder is called `.NAME.partial`; `NAME` finds it, too.

    Raises:
        UserError: No such run.
    """
    partial = run.parent / f".{run.name}.partial"
    if (run / "manifest.json").is_file():
        manifest = _json(run / "manifest.json")
        known, folder = {**manifest, **_mapping(manifest.get("extra"))}, run
    else:
        folder = partial if partial.is_dir() else run
        # The name under which a stage keeps what it was called with, and what the run hands to the process that trains.
        known = {**_json(folder / ".identity.json"), **_json(folder / "job.json")}
    if not known:
        raise UserError(
            f"{run} is no folder of a training run", remedy="give the folder that 'gymtrl train' wrote (its -o)"
        )
    settings, plan = _mapping(known.get("settings")), _mapping(known.get("plan"))
    objective = known.get("objective") or plan.get("objective") or str(known.get("verb", "")).removeprefix("train ")
    if objective not in OBJECTIVES:
        raise UserError(
            f"{run} was written by '{known.get('verb')}' and is no training run",
            remedy="give the folder that 'gymtrl train' wrote (its -o)",
        )
    inputs = known.get("inputs") or [{}]
    steps, evals = read_entries(folder / "metrics.jsonl")
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
        steps=steps,
        evals=evals,
        **{name: plan.get(name) for name in _PLANNED},
        **{name: counted.get(name) for name in _COUNTED},
    )


def read_facts(found: object) -> DataFacts | None:
    """Facts of a dataset as a manifest keeps them; `None` where it has none."""
    facts = _mapping(found)
    if not {"rows", "tokens", "loss_tokens"} <= facts.keys():
        return None
    return DataFacts(**{field.name: facts[field.name] for field in fields(DataFacts) if field.name in facts})


def read_entries(path: Path) -> tuple[tuple[Mapping[str, Any], ...], tuple[Mapping[str, Any], ...]]:
    """Reads the training steps and the evaluations of `metrics.jsonl`; a line that was cut short is left out."""
    entries = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else ():
        try:
            entries.append(_mapping(json.loads(line)))
        except ValueError:
            continue
    return tuple(e for e in entries if "loss" in e), tuple(e for e in entries if "eval_loss" in e)


def _json(path: Path) -> dict[str, Any]:
    try:
        return _mapping(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError):
        return {}


def _mapping(found: object) -> dict[str, Any]:
    return found if isinstance(found, dict) else {}
