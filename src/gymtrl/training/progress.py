"""What a run tells while it runs: `metrics.jsonl`, and a bar or a few lines on standard error."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from transformers import TrainerCallback

LINES = 10
"""Lines that a run prints where there is no terminal to draw a bar on."""


class MetricsLog(TrainerCallback):  # type: ignore[misc]  # transformers has no complete types
    """Appends one JSON object a step to a file: step, loss, lr, grad_norm, tokens, seconds.

    Args:
        path (`Path`): The file. Lines after `resumed_step` come from steps that will be repeated and are removed.
        resumed_step (`int`): Step that the run starts from; 0 for a new run.
    """

    def __init__(self, path: Path, resumed_step: int) -> None:
        self.path = path
        kept = [entry for entry in read_metrics(path) if entry["step"] <= resumed_step]
        partial = path.with_name(f".{path.name}")
        partial.write_text("".join(json.dumps(entry) + "\n" for entry in kept), encoding="utf-8")
        partial.replace(path)  # a kill while it is written must not cost the lines of the steps that are kept
        steps = [entry for entry in kept if "loss" in entry]
        # TRL counts tokens, and we count seconds, from the start of the process.
        self._tokens = int(steps[-1]["tokens"]) if steps else 0
        self._seconds = float(steps[-1]["seconds"]) if steps else 0.0
        self._started = time.monotonic()

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._started = time.monotonic()

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        if not logs or "loss" not in logs:
            return
        entry = {
            "step": state.global_step,
            "loss": logs["loss"],
            "lr": logs["learning_rate"],
            "grad_norm": logs.get("grad_norm"),
            "tokens": self._tokens + int(logs.get("num_tokens", 0)),
            "seconds": round(self._seconds + time.monotonic() - self._started, 3),
        }
        for name in ("entropy", "mean_token_accuracy"):
            if name in logs:
                entry[name] = logs[name]
        self.append(entry)

    def append(self, entry: dict[str, Any]) -> None:
        """Adds a line."""
        with self.path.open("a", encoding="utf-8") as stream:
            stream.write(json.dumps(entry) + "\n")


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Reads `metrics.jsonl`; a last line that an interruption cut short is left out."""
    if not path.is_file():
        return []
    entries = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            entries.append(json.loads(line))
        except ValueError:
            continue
    return entries


class Narrator(TrainerCallback):  # type: ignore[misc]
    """Draws a bar with loss, steps and the time that is left, or prints a line every tenth of the run.

    Args:
        console (`rich.console.Console`, *optional*): Where to; standard error unless given.
    """

    def __init__(self, console: Console | None = None) -> None:
        self._console = console or Console(file=sys.stderr)
        self._bar: Progress | None = None
        self._task: Any = None
        self._begun = (0, 0.0)

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._begun = (state.global_step, time.monotonic())
        if self._console.is_terminal:
            self._bar = Progress(
                TextColumn("training"),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("loss {task.fields[loss]}"),
                TimeElapsedColumn(),
                TimeRemainingColumn(),
                console=self._console,
            )
            self._task = self._bar.add_task("training", total=state.max_steps, completed=state.global_step, loss="-")
            self._bar.start()

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        if not logs or "loss" not in logs:
            return
        loss = f"{float(logs['loss']):.4f}"
        if self._bar is not None:
            self._bar.update(self._task, completed=state.global_step, loss=loss)
            return
        every = max(1, state.max_steps // LINES)
        if state.global_step % every == 0 or state.global_step == state.max_steps:
            first, started = self._begun
            pace = (time.monotonic() - started) / max(1, state.global_step - first)
            left = pace * (state.max_steps - state.global_step)
            self._console.print(
                f"step {state.global_step}/{state.max_steps}  loss {loss}  {left:.0f} s left", highlight=False
            )

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.close()

    def close(self) -> None:
        """Leaves the terminal as it was; a run that fails does not reach its end."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None
