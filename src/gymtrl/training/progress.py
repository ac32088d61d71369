"""What a run tells while it runs: `metrics.jsonl`, and a bar or a few lines on standard error."""

from __future__ import annotations

import os
import re
import resource
import sys
import time
from collections import deque
from numbers import Real
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from transformers import TrainerCallback

from gymtrl.workspace.metrics import append_metrics, read_metrics, rewrite_metrics

LINES = 10
"""Lines that a run prints where there is no terminal to draw a bar on."""

PACE_STEPS = 10
"""Steps that the speed on the bar is taken over."""

_TIMING = ("_runtime", "_per_second", "_time")
_RENAMED = ("learning_rate", "num_tokens")
_SHOWN = (
    ("rewards/accuracies", "accuracy"),
    ("rewards/margins", "margin"),
    ("ratio/negatives", "ratio"),
)


class MetricsLog(TrainerCallback):  # type: ignore[misc]  # transformers has no complete types
    """Appends one JSON object a step to a file: step, loss, lr, grad_norm, tokens, seconds, peak_memory, what TRL logs.

    Evaluations during training and the moments at which a run was continued become lines of their own. With several
    processes only the first writes; each of them knows `kept`.

    Args:
        path (`Path`): The file. Lines of steps after `resumed_step`, and all of them in a new run, are removed: these
            steps are repeated. Events stay.
        resumed_step (`int`): Step that the run starts from; 0 for a new run.

    Attributes:
        kept (`list[dict[str, Any]]`): Lines of earlier attempts that still hold.
        evaluated (`dict[int, float]`): Evaluation losses by step, of this process and of those before.
    """

    def __init__(self, path: Path, resumed_step: int) -> None:
        self.path = path
        holds = resumed_step or -1  # a new run measures before its first step again
        self.kept = [entry for entry in read_metrics(path) if entry["step"] <= holds or "event" in entry]
        self.evaluated = {entry["step"]: float(entry["eval_loss"]) for entry in self.kept if "eval_loss" in entry}
        self._resumed_step = resumed_step
        self._writes = is_first_process()
        if self._writes:
            rewrite_metrics(path, self.kept)
        steps = [entry for entry in self.kept if "loss" in entry]
        # Tokens and seconds are counted from the start of the process.
        self._tokens = int(steps[-1]["tokens"]) if steps else 0
        self._seconds = float(steps[-1]["seconds"]) if steps else 0.0
        self._started = time.monotonic()
        self._before_us = 0
        self._training = False

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._started = time.monotonic()
        self._training = True
        # GRPO counts in the state, which a checkpoint brings back; the other trainers start from zero.
        self._before_us = state.num_input_tokens_seen
        if self._resumed_step:
            self.event(f"continued from step {self._resumed_step}", self._resumed_step)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._training = False

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        if not logs:
            return
        if "loss" not in logs:
            if self._training and any(name.startswith("eval_") for name in logs):
                self.evaluation(state.global_step, logs)
            return
        counted = _tokens(logs)
        if counted <= self._before_us:
            self._before_us = 0
        entry = {
            "step": state.global_step,
            "loss": logs["loss"],
            "lr": logs["learning_rate"],
            "grad_norm": logs.get("grad_norm"),
            "tokens": self._tokens + counted - self._before_us,
            "seconds": round(self._seconds + time.monotonic() - self._started, 3),
            "peak_memory": peak_memory(),
        }
        self.append(entry | {name: value for name, value in _numbers(logs).items() if name not in (*entry, *_RENAMED)})

    def evaluation(self, step: int, metrics: dict[str, Any]) -> None:
        """Adds the line of an evaluation that was made before or after training.

        Args:
            step (`int`): Optimizer steps that the model has made.
            metrics (`dict[str, Any]`): What the trainer's `evaluate` returned.
        """
        if "eval_loss" in metrics:
            self.evaluated[step] = float(metrics["eval_loss"])
        found = {name: value for name, value in _numbers(metrics).items() if name.startswith("eval_")}
        self.append({"step": step} | {name: v for name, v in found.items() if not name.endswith(_TIMING)})

    def event(self, text: str, step: int) -> None:
        """Adds a line that says what happened to the run after a step; the report marks it on the curves."""
        self.append({"step": step, "event": text})

    def append(self, entry: dict[str, Any]) -> None:
        """Adds a line."""
        if self._writes:
            append_metrics(self.path, entry)


class Narrator(TrainerCallback):  # type: ignore[misc]
    """Draws a bar with loss, speed, steps and the time that is left, or prints a line every tenth of the run.

    With several processes only the first draws.

    Args:
        console (`rich.console.Console`, *optional*): Where to; standard error unless given.
    """

    def __init__(self, console: Console | None = None) -> None:
        self._console = console or Console(file=sys.stderr)
        self._silent = not is_first_process()
        self._bar: Progress | None = None
        self._task: Any = None
        self._begun = (0, 0.0)
        self._recent: deque[tuple[float, int]] = deque(maxlen=PACE_STEPS + 1)

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._begun = (state.global_step, time.monotonic())
        if self._console.is_terminal and not self._silent:
            self._bar = Progress(
                TextColumn("training"),
                BarColumn(bar_width=None),
                MofNCompleteColumn(),
                TextColumn("{task.fields[told]}"),
                TimeElapsedColumn(),
                TimeRemainingColumn(),
                console=self._console,
                expand=True,
            )
            self._task = self._bar.add_task("training", total=state.max_steps, completed=state.global_step, told="")
            self._bar.start()

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        if not logs or "loss" not in logs or self._silent:
            return
        self._recent.append((time.monotonic(), _tokens(logs)))
        told = [f"loss {float(logs['loss']):.4f}", *self._pace()]
        told += [f"{word} {float(logs[name]):.2f}" for name, word in _SHOWN if name in logs]
        if self._bar is not None:
            self._bar.update(self._task, completed=state.global_step, told="  ".join(told))
            return
        every = max(1, state.max_steps // LINES)
        if state.global_step % every == 0 or state.global_step == state.max_steps:
            first, started = self._begun
            pace = (time.monotonic() - started) / max(1, state.global_step - first)
            told.append(f"{pace * (state.max_steps - state.global_step):.0f} s left")
            line = "  ".join([f"step {state.global_step}/{state.max_steps}", *told])
            self._console.print(line, highlight=False, soft_wrap=True)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.close()

    def close(self) -> None:
        """Leaves the terminal as it was; a run that fails does not reach its end."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    def _pace(self) -> list[str]:
        """Tokens a second over the last steps; the first step of a process has nothing before it to count from."""
        (then, tokens), (now, more) = self._recent[0], self._recent[-1]
        return [f"{(more - tokens) / (now - then):,.0f} tokens/s"] if now > then and more > tokens else []


def peak_memory() -> int:
    """The most memory that this process has held, in bytes: of the GPU where it uses one, else main memory."""
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available() and torch.cuda.max_memory_allocated():
        return int(torch.cuda.max_memory_allocated())
    try:
        # Unlike what getrusage says, this starts anew with the program and holds nothing of the parent's.
        with open("/proc/self/status", encoding="ascii", errors="replace") as stream:
            found = re.search(r"^VmHWM:\s+(\d+) kB", stream.read(), re.MULTILINE)
        if found:
            return int(found[1]) * 1024
    except OSError:
        pass
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def is_first_process() -> bool:
    """Whether this is the only process of a run, or the first of those that torchrun started."""
    return os.environ.get("RANK", "0") == "0"


def _tokens(logs: dict[str, Any]) -> int:
    return int(logs.get("num_tokens", 0))


def _numbers(logs: dict[str, Any]) -> dict[str, int | float]:
    """The numbers of a log in types that JSON knows."""
    return {
        name: value if isinstance(value, int) else float(value)
        for name, value in logs.items()
        if isinstance(value, Real) and not isinstance(value, bool)
    }
