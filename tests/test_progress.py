"""What a run writes and shows while TRL trains: its metrics, its events, its bar."""

from __future__ import annotations

import io
import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from rich.console import Console

from gymtrl.training.progress import MetricsLog, Narrator, peak_memory
from gymtrl.workspace.metrics import append_metrics, read_metrics
from tiny_runs import rows, tiny_model, trainer

ALWAYS = {"step", "loss", "lr", "grad_norm", "tokens", "seconds", "peak_memory", "epoch"}
OF_TRL = {
    "sft": {"entropy", "mean_token_accuracy"},
    "dpo": {"rewards/chosen", "rewards/rejected", "rewards/accuracies", "rewards/margins", "logps/chosen", "entropy"},
    "kto": {"kl", "entropy"},
    "grpo": {"reward", "frac_reward_zero_std", "clip_ratio/region_mean", "completions/mean_length", "entropy"},
}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory, smollm2_dir: Path) -> Path:
    return tiny_model(tmp_path_factory.mktemp("tiny") / "model", smollm2_dir)


def strict(path: Path) -> list[dict[str, Any]]:
    """The lines, by a reader that knows no NaN."""

    def refuse(word: str) -> None:
        raise ValueError(word)

    return [json.loads(line, parse_constant=refuse) for line in path.read_text().splitlines()]


def lengths(objective: str, row: dict[str, Any]) -> int:
    """Tokens that the model computes for a row."""
    if objective == "sft":
        return len(row["input_ids"])
    sides = ("completion",) if objective == "kto" else ("chosen", "rejected")
    return sum(len(row["prompt_ids"]) + len(row[f"{side}_ids"]) for side in sides)


@pytest.mark.parametrize("objective", ["sft", "dpo", "kto", "grpo"])
def test_every_number_that_trl_logs_is_written_and_tokens_go_on_when_resumed(
    model: Path, tmp_path: Path, objective: str
) -> None:
    data, path, out = rows(objective, 8), tmp_path / "metrics.jsonl", tmp_path / "out"
    saving = {"save_strategy": "steps", "save_steps": 2}
    first = trainer(objective, model, out, data, **saving)
    first.add_callback(MetricsLog(path, 0))
    first.train()
    lines = strict(path)
    assert [line["step"] for line in lines] == [1, 2, 3, 4]
    logged = first.state.log_history[:4]
    for line, record in zip(lines, logged, strict=True):
        assert set(line) >= ALWAYS | (OF_TRL[objective] if objective != "kto" else {"kl"})
        assert line["lr"] == record["learning_rate"] and 10**7 < line["peak_memory"] <= peak_memory()
        assert set(record) - set(line) == {"learning_rate", "num_tokens"}
        assert {name: line[name] for name in set(record) & set(line)} == {k: record[k] for k in set(record) & set(line)}
    assert set().union(*lines) >= OF_TRL[objective]
    if objective != "grpo":
        assert lines[-1]["tokens"] == sum(lengths(objective, row) for row in data)

    again = trainer(objective, model, out, data, **saving)
    log = MetricsLog(path, 2)
    assert log.kept == lines[:2]
    again.add_callback(log)
    again.train(resume_from_checkpoint=str(out / "checkpoint-2"))
    resumed = strict(path)
    assert resumed[:2] == lines[:2] and resumed[2] == {"step": 2, "event": "continued from step 2"}
    assert [line["step"] for line in resumed[3:]] == [3, 4]
    assert resumed[3]["seconds"] > lines[1]["seconds"]
    if objective == "grpo":
        assert resumed[-1]["tokens"] == again.state.num_input_tokens_seen > resumed[-2]["tokens"] > lines[1]["tokens"]
    else:
        assert [line["tokens"] for line in resumed[3:]] == [line["tokens"] for line in lines[2:]]
        assert resumed[-1]["loss"] == pytest.approx(lines[-1]["loss"], rel=1e-4)


def test_evaluations_are_lines_of_their_own(model: Path, tmp_path: Path) -> None:
    log = MetricsLog(tmp_path / "metrics.jsonl", 0)
    made = trainer("dpo", model, tmp_path / "out", rows("dpo", 8), eval_strategy="steps", eval_steps=2)
    made.add_callback(log)
    log.evaluation(0, made.evaluate())
    made.train()
    log.evaluation(4, made.evaluate())
    lines = strict(log.path)
    assert [(line["step"], "loss" in line) for line in lines] == [
        *((0, False), (1, True), (2, True), (2, False)),
        *((3, True), (4, True), (4, False), (4, False)),
    ]
    for line in lines:
        if "loss" not in line:
            assert set(line) >= {"eval_loss", "eval_rewards/margins"} and "rewards/margins" not in line


def test_a_loss_that_is_not_finite_stays_json(model: Path, tmp_path: Path) -> None:
    log = MetricsLog(tmp_path / "metrics.jsonl", 0)
    made = trainer("sft", model, tmp_path / "out", rows("sft", 8), learning_rate=1e38, max_grad_norm=0.0)
    made.add_callback(log)
    made.train()
    lines = strict(log.path)
    assert [line["step"] for line in lines] == [1, 2, 3, 4]
    assert lines[0]["loss"] > 0 and lines[-1]["loss"] == "nan"
    broken = {"step": 5, "loss": -math.inf, "tokens": 9, "seconds": 1.0}
    append_metrics(log.path, broken)
    assert strict(log.path)[-1] == broken | {"loss": "-inf"}
    read = read_metrics(log.path)
    assert math.isnan(read[3]["loss"]) and read[4] == broken
    assert MetricsLog(log.path, 5).kept[4] == read[4] and strict(log.path)[4]["loss"] == "-inf"


def test_a_cut_line_and_foreign_lines_are_passed_over(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1, "loss": 2.0}\n[]\n3\n{"loss": 1}\n\xff\xfe\n{"step": 2, "lo')
    assert read_metrics(path) == [{"step": 1, "loss": 2.0}]
    assert read_metrics(tmp_path / "absent") == []


def test_only_numbers_are_written(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path / "metrics.jsonl", 0)
    state = SimpleNamespace(global_step=1, num_input_tokens_seen=0)
    log.on_train_begin(None, state, None)
    logs = {"loss": 1.0, "learning_rate": 0.1, "num_tokens": 7.0, "note": "text", "flag": True}
    log.on_log(None, state, None, logs=logs)
    (line,) = strict(log.path)
    assert line["tokens"] == 7 and not {"note", "flag"} & line.keys()


def test_of_several_processes_only_the_first_writes_and_draws(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "metrics.jsonl"
    before = [{"step": 1, "eval_loss": 1.0}, {"step": 9, "event": "micro-batch halved"}]
    for entry in (*before, {"step": 9, "eval_loss": 1.0}):
        append_metrics(path, entry)
    monkeypatch.setenv("RANK", "1")
    log = MetricsLog(path, 4)
    log.event("something", 4)
    assert log.kept == before and len(strict(path)) == 3
    monkeypatch.setenv("RANK", "0")
    MetricsLog(path, 4).event("something", 4)
    assert strict(path) == [*before, {"step": 4, "event": "something"}]


def narrated(model: Path, out: Path, objective: str, *, terminal: bool, steps: int = 4) -> str:
    screen = io.StringIO()
    made = trainer(objective, model, out, rows(objective, 8), max_steps=steps)
    made.add_callback(Narrator(Console(file=screen, force_terminal=terminal, width=160)))
    made.train()
    return screen.getvalue()


def test_without_a_terminal_ten_lines_tell(model: Path, tmp_path: Path) -> None:
    lines = narrated(model, tmp_path, "sft", terminal=False, steps=30).splitlines()
    assert len(lines) == 10 and lines[-1].startswith("step 30/30  loss ")
    assert all("tokens/s" in line and "s left" in line for line in lines)


def test_a_terminal_gets_a_bar_with_what_the_objective_is_about(model: Path, tmp_path: Path) -> None:
    shown = narrated(model, tmp_path / "dpo", "dpo", terminal=True)
    assert "4/4" in shown and "tokens/s" in shown and "accuracy " in shown and "margin " in shown
    assert shown.rindex("\x1b[?25h") > shown.rindex("\x1b[?25l")  # the cursor is back
