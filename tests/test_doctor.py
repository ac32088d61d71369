"""Every rule of `doctor`: a real run that provokes it, and healthy ones on which all of them are silent."""

from __future__ import annotations

import dataclasses
import io
import json
import math
import random
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from doctor_runs import (
    KNOWN,
    WIDE,
    Rows,
    Run,
    dataset,
    group_rows,
    pair_rows,
    pretrained,
    run_folder,
    sft_rows,
    train,
    unpaired_rows,
)
from gymtrl.doctor.diagnose import diagnose, with_told
from gymtrl.doctor.facts import data_facts
from gymtrl.doctor.finding import Finding, read_findings, write_findings
from gymtrl.doctor.read import read_run
from gymtrl.doctor.rule import MOMENTS, USUAL_RATE
from gymtrl.doctor.rules import RULES, STOPPING
from gymtrl.doctor.run import DataFacts, RunRecord
from gymtrl.doctor.trend import trend
from gymtrl.errors import UserError
from test_doctor_data import BEFOREHAND, FROM_ROLLOUTS, SAME_SIDES, changed, long_prompts

BY_CODE = {rule.code: rule for rule in RULES}
ADAPTER = {"r": 4, "lora_alpha": 4, "lora_dropout": 0.0, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory, smollm2_dir: Path) -> Iterator[Path]:
    """A tiny model that knows a language of numbers. One thread: more of them only wait for each other here."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield pretrained(tmp_path_factory.mktemp("model"), smollm2_dir)
    torch.set_num_threads(threads)


def lora(**options: Any) -> Any:
    from peft import LoraConfig

    return LoraConfig(**ADAPTER | options)


def codes(findings: list[Finding]) -> set[str]:
    return {finding.rule for finding in findings}


@pytest.fixture(scope="module")
def healthy(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A sound SFT run with a validation split."""
    folder = tmp_path_factory.mktemp("healthy")
    data = dataset(folder / "data", sft_rows(400), validation=sft_rows(40, seed=9))
    return train("sft", data, model, folder / "run", eval_strategy="steps", eval_steps=15)


def test_sound_sft_is_left_alone(healthy: Run) -> None:
    assert len(healthy.record.evals) == 3
    losses = healthy.record.series("loss")
    assert losses[-1] < 0.9 * losses[0]
    assert [diagnose(healthy.record, moment) for moment in MOMENTS] == [[], [], []]
    assert (healthy.live, healthy.told, healthy.stopped_by, healthy.findings_file.exists()) == ([], "", None, False)


@pytest.mark.parametrize(
    ("objective", "rows", "options"),
    [
        ("sft", sft_rows(400), {"lora": True, "rate": 1e-2}),
        ("dpo", pair_rows(300), {"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0, 1.0], "rate": 3e-4}),
        ("kto", unpaired_rows(pair_rows(300)), {}),
        ("grpo", group_rows(WIDE), {"rate": 1e-4, "steps": 12}),
    ],
    ids=["lora", "dpo", "kto", "grpo"],
)
def test_sound_runs_are_left_alone(
    model: Path, tmp_path: Path, objective: str, rows: Rows, options: dict[str, Any]
) -> None:
    chosen = {"steps": 30} | options | {"lora": lora() if options.get("lora") else None}
    run = train(objective, dataset(tmp_path / "data", rows), model, tmp_path / "run", **chosen)
    assert [diagnose(run.record, moment) for moment in MOMENTS] == [[], [], []]
    assert not run.live and len(run.record.steps) == chosen["steps"]
    adapted, linear, trainable = run.record.adapted, run.record.linear, run.record.trainable
    assert linear == 14 and adapted == (14 if chosen["lora"] else 0)  # q, k, v, o, gate, up, down in two layers
    assert trainable is not None and run.record.parameters is not None
    assert (trainable < run.record.parameters) == (chosen["lora"] is not None)


def wrong_way(row: dict[str, Any]) -> dict[str, Any]:
    ids = row["input_ids"][:23] + row["input_ids"][:7][::-1]
    return {"input_ids": ids, "labels": [-100] * 4 + ids[4:]}


def garbled(rows: Rows, *places: int) -> Rows:
    return [row | {"input_ids": [5] * 30, "labels": [5] * 30} if at in places else row for at, row in enumerate(rows)]


def no_influence(model: Any) -> None:
    """Trains the queries alone, and makes all keys 0."""
    for weight in model.parameters():
        weight.requires_grad_(False)
    for layer in model.model.layers:
        layer.self_attn.q_proj.weight.requires_grad_(True)
        layer.self_attn.k_proj.weight.zero_()


def only_norms(model: Any) -> None:
    """Freezes all matrices."""
    for weight in model.parameters():
        weight.requires_grad_(weight.dim() == 1)


ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
SAME_LANGUAGE = sft_rows(1000, odds=KNOWN, seed=3)
PLAIN_LOSS = changed(pair_rows(100), lambda row: {"rejected_ids": [9] * 12})
GOOD_AND_BAD = group_rows([[1.0, 0.0]])
LONG_GROUPS = group_rows([[1.0, 0.0, 0.0, 0.0]] * 25, length=40)
CLIPPED = {"loss_type": "dapo", "rate": 1e-2, "steps": 60, "batch": 2, "stop_kl": None, "stop_ratio": None}
EVALUATED = {"eval_strategy": "steps", "eval_steps": 15, "steps": 60, "rate": 1e-2}
PROVOKED: dict[str, tuple[str, Rows, dict[str, Any]]] = {
    "loss_nan": ("sft", sft_rows(100), {"rate": 1e20, "steps": 15}),
    "loss_diverging": ("sft", sft_rows(200), {"rate": 0.3, "steps": 20}),
    "flat_few_loss_tokens": ("sft", long_prompts(200), {"rate": 1e-5, "steps": 15}),
    "flat_rate_low": ("sft", sft_rows(600), {"rate": 1e-7, "steps": 36, "batch": 16}),
    "flat_rate_high": ("sft", SAME_LANGUAGE, {"rate": 1e-2, "steps": 40, "batch": 48}),
    "flat_few_targets": ("sft", sft_rows(800), {"rate": 2e-4, "lora": {"target_modules": ATTENTION}, "batch": 16}),
    "flat_frozen": ("sft", sft_rows(600), {"rate": 1e-5, "weights": only_norms, "batch": 16, "steps": 36}),
    "flat_short_run": ("sft", SAME_LANGUAGE, {"rate": 2e-6, "steps": 48, "batch": 48}),
    "flat": ("sft", SAME_LANGUAGE, {"rate": 2e-6, "steps": 54, "batch": 48}),
    "loss_at_chance": ("sft", sft_rows(100), {"base": "random", "steps": 2}),
    "loss_foreign": ("sft", changed(sft_rows(100), wrong_way), {"rate": 1e-5, "steps": 2}),
    "overfitting": ("sft", sft_rows(8), EVALUATED),
    "entropy_collapse": ("sft", sft_rows(8), EVALUATED),
    "no_gradient": ("sft", sft_rows(100), {"weights": no_influence, "steps": 10}),
    "gradient_spikes": (
        "sft",
        garbled(sft_rows(30), 20, 26),
        {"batch": 1, "steps": 30, "rate": 1e-4, "train_sampling_strategy": "sequential"},
    ),
    "chosen_falls": ("dpo", pair_rows(300), {"rate": 1e-2, "steps": 30}),
    "accurate_early": ("dpo", PLAIN_LOSS, {"steps": 16}),
    "ratios_masked": ("grpo", GOOD_AND_BAD, CLIPPED),
    "kl_high": ("grpo", group_rows(WIDE), {"steps": 12, "rate": 3e-2}),
    "negatives_vanish": ("grpo", LONG_GROUPS, {"steps": 25, "rate": 3e-3}),
}
AT_THE_END = {code for code, rule in BY_CODE.items() if "live" not in rule.when}


@pytest.mark.parametrize("code", PROVOKED)
def test_a_real_run_provokes_each_rule(model: Path, tmp_path: Path, code: str) -> None:
    objective, rows, options = PROVOKED[code]
    chosen = dict(options)
    base = model / chosen.pop("base", "")
    adapter = lora(r=1, **chosen.pop("lora")) if "lora" in chosen else None
    validation = sft_rows(40, seed=9) if "eval_steps" in chosen else None
    folder = dataset(tmp_path / "data", rows, validation=validation)
    run = train(objective, folder, base, tmp_path / "run", lora=adapter, **chosen)
    found = {finding.rule: finding for finding in diagnose(run.record, "after")}
    rule = BY_CODE[code]
    assert code in found, found
    assert found[code].severity == rule.severity and any(letter.isdigit() for letter in found[code].evidence)
    assert "{" not in found[code].remedy
    assert [flat for flat in found if flat.startswith("flat")] == [flat for flat in (code,) if flat.startswith("flat")]
    assert ("loss_diverging" in found) == (code == "loss_diverging")
    # Live rules say so while it trains, once, and keep it; those that are marked end the run.
    assert (code in codes(run.live)) == ("live" in rule.when)
    assert run.told.count(rule.title) == int("live" in rule.when)
    assert run.live == (read_findings(run.findings_file) if run.live else [])
    assert (run.stopped_by is not None) == rule.stops
    if run.stopped_by is not None:
        assert run.stopped_by.rule == code and len(run.record.steps) < chosen["steps"]
        assert "training stops here" in run.told


def test_a_model_without_trainable_weights_is_refused_before_its_first_step(model: Path, tmp_path: Path) -> None:
    folder = dataset(tmp_path / "data", sft_rows(40))
    with pytest.raises(UserError, match=r"No weight is trained: 0 of 24,736 weights") as refused:
        train("sft", folder, model, tmp_path / "run", weights=lambda made: made.requires_grad_(False))
    assert refused.value.remedy == BY_CODE["nothing_trainable"].remedy
    assert codes(read_findings(tmp_path / "run" / "findings.json")) == {"nothing_trainable"}


def test_equal_sides_give_no_gradient(model: Path, tmp_path: Path) -> None:
    run = train("dpo", dataset(tmp_path / "data", SAME_SIDES), model, tmp_path / "run", steps=8)
    assert run.stopped_by is not None and run.stopped_by.rule == "no_gradient"


def test_every_rule_is_provoked() -> None:
    elsewhere = {"nothing_trainable"}
    assert PROVOKED.keys() | BEFOREHAND.keys() | FROM_ROLLOUTS | elsewhere == BY_CODE.keys()
    assert len(BY_CODE) == len(RULES) and {"loss_nan", "no_gradient", "nothing_trainable"} <= STOPPING


def test_noise_alone_is_no_finding() -> None:
    """A hundred runs without a trend, and a hundred that learn, with batches that differ by a fifth."""
    chance = random.Random(0)
    alarms = {"level": 0, "falling": 0}
    for kind in alarms:
        for _ in range(100):
            count = chance.choice((12, 30, 100, 400))
            slope = 0.5 if kind == "falling" else 0.0
            losses = [(1 - slope * at / count) * chance.lognormvariate(0, 0.2) for at in range(count)]
            steps = tuple({"step": at, "loss": loss, "grad_norm": loss} for at, loss in enumerate(losses, 1))
            found = diagnose(RunRecord("sft", planned_steps=count, learning_rate=2e-4, steps=steps), "after")
            alarms[kind] += bool(codes(found) - {"flat", "flat_short_run"} if kind == "level" else found)
    assert alarms == {"level": 0, "falling": 0}


def test_batches_of_two_kinds_are_no_divergence() -> None:
    """Losses that fall, of batches of which three in ten are of an easier kind."""
    alarms = 0
    for seed in range(300):
        chance = random.Random(seed)
        count = chance.choice((12, 30, 100, 400))
        losses = [
            (1 - 0.1 * at / count) * chance.choices((1.0, 0.5), (7, 3))[0] * chance.lognormvariate(0, 0.02)
            for at in range(count)
        ]
        steps = tuple({"step": at, "loss": loss} for at, loss in enumerate(losses, 1))
        alarms += "loss_diverging" in codes(diagnose(RunRecord("sft", steps=steps), "live"))
    assert alarms <= 3


def test_half_precision_may_overflow_in_its_first_steps() -> None:
    def steps(overflows: int) -> tuple[dict[str, float], ...]:
        return tuple(
            {"step": at, "loss": 1.0, "grad_norm": math.inf if at <= overflows else 1.0} for at in range(1, 13)
        )

    assert diagnose(RunRecord("sft", steps=steps(6)), "live") == []
    (found,) = diagnose(RunRecord("sft", steps=steps(12)), "live")
    assert found.evidence == "grad_norm is inf in step 10, as in the 9 before"


def test_where_groups_stop_is_the_limit_of_their_rules() -> None:
    steps = ({"step": 1, "loss": 0.0, "kl": 0.3, "ratio/negatives": 0.2},)
    record = RunRecord("grpo", steps=steps)
    assert diagnose(record, "live") == []
    strict = dataclasses.replace(record, stop_kl=0.2, stop_ratio=0.25)
    assert {f.rule: f.severity for f in diagnose(strict, "live")} == {
        "negatives_vanish": "warning",
        "kl_high": "warning",
    }


def test_trend_needs_enough_values_and_is_deaf_to_outliers() -> None:
    assert trend([1.0] * 11) is None
    values = [1 + 0.01 * (at % 2) for at in range(30)]
    values[15] = values[29] = 1000.0
    found = trend(values)
    assert found is not None and abs(found.change) <= 0.01 and found.margin < 0.06


def test_numbers_written_as_text_are_numbers() -> None:
    steps = ({"step": 1, "loss": "1.25", "grad_norm": "nan"}, {"step": 2, "loss": True, "grad_norm": None})
    record = RunRecord("sft", steps=steps)
    assert (record.series("loss"), record.series("grad_norm")) == ([1.25], [])
    record = dataclasses.replace(record, steps=({"step": 1, "loss": "nan"},))
    assert codes(diagnose(record, "live")) == {"loss_nan"}


def test_errors_come_first(tmp_path: Path) -> None:
    data = data_facts(dataset(tmp_path / "data", SAME_SIDES[:20]))
    found = diagnose(RunRecord("dpo", data=data, effective_batch=64), "preflight")
    assert [finding.severity for finding in found] == ["error", "warning", "note"]


def test_remedies_name_the_run_and_real_flags() -> None:
    from gymtrl.formats.settings import FormatDpoSettings, FormatGrpoSettings, FormatKtoSettings, FormatSftSettings
    from gymtrl.selection.settings import FilterSettings
    from gymtrl.training.settings import TrainSftSettings

    record = RunRecord(
        "sft", dataset="runs/x/sft", data=DataFacts(rows=80, tokens=9, loss_tokens=3), effective_batch=16
    )
    steps = tuple({"step": at, "loss": 1.0 + at % 2 / 100, "grad_norm": 1.0} for at in range(30))
    low = dataclasses.replace(record, learning_rate=1e-6, steps=steps)
    remedies = {finding.rule: finding.remedy for finding in diagnose(low, "after")}
    assert remedies["flat_rate_low"] == "Train with 'gymtrl train sft runs/x/sft --learning-rate 0.0002'"
    short = dataclasses.replace(low, learning_rate=2e-4)
    (told,) = [finding.remedy for finding in diagnose(short, "after") if finding.rule == "flat_short_run"]
    assert told.startswith("Train with a smaller --effective-batch, or on more rollouts: 80 rows in more passes")
    (told,) = [
        f.remedy for f in diagnose(dataclasses.replace(short, planned_steps=4), "after") if f.rule == "few_steps"
    ]
    assert told.startswith("Train without --max-steps")
    more = dataclasses.replace(short, data=DataFacts(rows=200, tokens=9, loss_tokens=3), planned_steps=30)
    (told,) = [finding.remedy for finding in diagnose(more, "after") if finding.rule == "flat_short_run"]
    assert told == "Train with --epochs 4, or with a smaller --effective-batch"
    models = (FormatDpoSettings, FormatGrpoSettings, FormatKtoSettings, FormatSftSettings, FilterSettings)
    known = {f"--{name.replace('_', '-')}" for model in (*models, TrainSftSettings) for name in model.model_fields}
    # Those of preference training, and the look at rows.
    known |= {"--beta", "--loss-type", "--loss-weights", "--desirable-weight", "--undesirable-weight", "--show"}
    words = " ".join(f"{rule.cause} {rule.remedy}" for rule in RULES).replace(",", " ").replace(")", " ")
    flags = {word.strip("(';:.") for word in words.split() if word.strip("(';").startswith("--")}
    assert flags <= known


def test_the_usual_rates_are_the_defaults_of_train() -> None:
    from gymtrl.training.objectives import OBJECTIVES

    rates = {
        (name, method): rate
        for name, objective in OBJECTIVES.items()
        for method, rate in (("lora", objective.defaults.lora_rate), ("full", objective.defaults.full_rate))
    }
    assert rates == USUAL_RATE


@pytest.mark.parametrize("finished", [True, False])
def test_a_run_is_read_back(healthy: Run, tmp_path: Path, finished: bool) -> None:
    folder = run_folder(tmp_path / "run", healthy, finished=finished)
    read = read_run(folder)
    kept = healthy.record
    if not finished:  # the model was never counted
        kept = dataclasses.replace(
            kept, **dict.fromkeys(("trainable", "parameters", "adapted", "linear", "vocabulary"))
        )
        assert read_run(folder.parent / ".run.partial") == read
    assert read == kept
    with (folder if finished else folder.parent / ".run.partial").joinpath("metrics.jsonl").open("a") as stream:
        stream.write('{"step": 46, "lo')
    assert read_run(folder) == read


def test_a_watch_that_goes_on_tells_nothing_twice_and_stops_again(healthy: Run, tmp_path: Path) -> None:
    from types import SimpleNamespace

    from rich.console import Console

    from gymtrl.training.watch import Watch

    told = []
    for _ in range(2):
        record = dataclasses.replace(healthy.record, steps=healthy.record.steps[:3])
        console = Console(file=io.StringIO(), width=200)
        watch = Watch(record, tmp_path / "findings.json", console)
        control = SimpleNamespace(should_training_stop=False)
        state = SimpleNamespace(global_step=4, is_world_process_zero=True)
        watch.on_log(None, state, control, {"loss": float("nan"), "grad_norm": 1.0})
        assert control.should_training_stop
        told.append(console.file.getvalue())  # type: ignore[attr-defined]
    assert "loss is nan in step 4" in told[0] and told[1] == ""


def doctor(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "gymtrl", "doctor", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, env=None)


def test_the_verb(healthy: Run, tmp_path: Path) -> None:
    sound = run_folder(tmp_path / "sound", healthy)
    done = doctor(sound, "--fail-on", "warning")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == "sft, full: 45 of 45 steps, 3 evaluations\nnothing found\n"

    nan = {"step": 46, "loss": float("nan"), "grad_norm": 1.0}
    record = dataclasses.replace(healthy.record, steps=(*healthy.record.steps, nan), dataset="a\x1b[2J[red]b")
    broken = run_folder(tmp_path / "broken", dataclasses.replace(healthy, record=record))
    done = doctor(broken)
    assert done.returncode == 0 and "error: The loss or its gradient is not a number (loss_nan)" in done.stdout
    assert "  seen:   loss is nan in step 46\n" in done.stdout and "\x1b" not in done.stdout
    assert [doctor(broken, "--fail-on", level).returncode for level in ("error", "warning")] == [1, 1]
    (found,) = json.loads(doctor(broken, "--json").stdout)
    assert found["rule"] == "loss_nan" and found.keys() == {field.name for field in dataclasses.fields(Finding)}


def test_findings_of_training_are_told_with_those_of_now(healthy: Run, tmp_path: Path) -> None:
    sound = run_folder(tmp_path / "sound", healthy)
    write_findings(sound / "findings.json", [Finding("overfitting", "warning", "t", "2.0 at step 9", "c", "r")])
    (found,) = json.loads(doctor(sound, "--json").stdout)
    assert (found["rule"], found["evidence"]) == ("overfitting", "seen in training, not any more: 2.0 at step 9")
    again = [dataclasses.replace(Finding(**found), evidence="2.5 at step 12")]
    assert with_told(again, read_findings(sound / "findings.json")) == again


def test_an_unfinished_run_beside_a_finished_one_is_named(healthy: Run, tmp_path: Path) -> None:
    sound = run_folder(tmp_path / "run", healthy)
    run_folder(sound, healthy, finished=False)
    done = doctor(sound)
    assert done.stdout.startswith("sft, full: 45 of 45 steps")
    assert f"gymtrl doctor {tmp_path}/.run.partial" in done.stderr
    assert doctor(tmp_path / ".run.partial").stderr == ""


@pytest.mark.parametrize("manifest", [None, {"verb": "filter", "settings": {}, "inputs": []}])
def test_what_is_no_run_is_refused(tmp_path: Path, manifest: dict[str, Any] | None) -> None:
    if manifest is not None:
        (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    done = doctor(tmp_path)
    assert done.returncode == 2 and "give the folder that 'gymtrl train' wrote" in done.stderr


def test_findings_are_kept_whole(tmp_path: Path) -> None:
    found = [Finding("flat", "warning", "t", "e", "c", "r")]
    write_findings(tmp_path / "findings.json", found)
    assert read_findings(tmp_path / "findings.json") == found
    assert read_findings(tmp_path / "absent.json") == []
    assert [path.name for path in tmp_path.iterdir()] == ["findings.json"]
