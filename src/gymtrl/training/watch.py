"""The rules of `doctor` while a run trains: each finding is told once, when it shows."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.text import Text
from transformers import TrainerCallback

from gymtrl.doctor.diagnose import diagnose
from gymtrl.doctor.finding import Finding, read_findings, write_findings
from gymtrl.doctor.rules import STOPPING
from gymtrl.doctor.run import RunRecord, number
from gymtrl.errors import UserError
from gymtrl.text import plain

EVERY = 5
"""Logged steps between two looks; later a twentieth of those that are behind, so that long runs stay cheap."""

_COLOURS = {"error": "red", "warning": "yellow", "note": "cyan"}


class Watch(TrainerCallback):  # type: ignore[misc]  # transformers has no complete types
    """Applies the live rules to a run, tells what they find, and ends a run that goes on in vain.

    Args:
        record (`RunRecord`): What is known before training; of a run that goes on also the steps that it has behind it.
        path (`Path`): `findings.json`; what it holds already is kept, and not told again.
        console (`rich.console.Console`, *optional*): Where to; standard error unless given.
    """

    def __init__(self, record: RunRecord, path: Path, console: Console | None = None) -> None:
        self.record = record
        self.findings = read_findings(path)
        self._path = path
        self._console = console or Console(stderr=True)
        self._next = len(record.steps) + EVERY

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        self.record = replace(self.record, **count_parameters(model))
        self._look(state, control)
        self.require_sense()

    def require_sense(self) -> None:
        """Checks that the steps so far, those of earlier attempts among them, leave sense in what was trained.

        Raises:
            UserError: A rule that ends training says that they do not.
        """
        found = _stopping(diagnose(self.record, "live"))
        if found is not None:
            raise UserError(f"{found.title}: {found.evidence}", remedy=found.remedy)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        entry = {"step": state.global_step, **(logs or {})}
        if "eval_loss" in entry:
            self.record = replace(self.record, evals=(*self.record.evals, entry))
            self._look(state, control)
        if "loss" in entry:
            self.record = replace(self.record, steps=(*self.record.steps, entry))
            count = len(self.record.steps)
            if count >= self._next or not _finite(entry):
                self._next = count + max(EVERY, count // 20)
                self._look(state, control)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._look(state, control)

    def _look(self, state: Any, control: Any) -> None:
        # Every process sees the same numbers and stops at the same step; one of them tells.
        found = diagnose(self.record, "live")
        stopping = _stopping(found)
        if stopping is not None:
            control.should_training_stop = True
        told = {finding.rule for finding in self.findings}
        new = [finding for finding in found if finding.rule not in told]
        self.findings += new
        if not new or not state.is_world_process_zero:
            return
        write_findings(self._path, self.findings)
        for finding in new:
            self._console.print(_told(finding, stopped=finding is stopping), soft_wrap=True)


def count_parameters(model: Any) -> dict[str, Any]:
    """Counts the weights of a model and its linear layers.

    Args:
        model (`torch.nn.Module`): With an adapter or without.

    Returns:
        `dict[str, Any]`: `trainable`, `parameters`, `adapted`, `linear` and `vocabulary`, as in `RunRecord`.
    """
    import torch

    # Under ZeRO-3 a process holds a part of each weight, which knows how large the whole is.
    sizes = [(getattr(weight, "ds_numel", weight.numel()), weight.requires_grad) for weight in model.parameters()]
    head = model.get_output_embeddings()
    layers = dict(model.named_modules())
    linear = [name for name, part in layers.items() if isinstance(part, torch.nn.Linear) and part is not head]
    return {
        "trainable": sum(size for size, trained in sizes if trained),
        "parameters": sum(size for size, _ in sizes),
        "adapted": sum(1 for part in layers.values() if getattr(part, "lora_A", None)),
        "linear": sum(1 for name in linear if ".lora_" not in name),
        "vocabulary": model.config.get_text_config().vocab_size,
    }


def _stopping(findings: Sequence[Finding]) -> Finding | None:
    return next((finding for finding in findings if finding.rule in STOPPING), None)


def _finite(entry: Mapping[str, Any]) -> bool:
    values = (number(entry.get(name)) for name in ("loss", "grad_norm"))
    return all(value is None or math.isfinite(value) for value in values)


def _told(finding: Finding, *, stopped: bool) -> Text:
    lines = [finding.evidence, finding.cause, f"remedy: {finding.remedy}"]
    text = Text.assemble((finding.severity, _COLOURS[finding.severity]), f": {plain(finding.title)}")
    text.append("".join(f"\n  {plain(line)}" for line in lines))
    return text.append("\n  training stops here" if stopped else "")
