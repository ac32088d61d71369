"""Training by `gymtrl train sft` against a plain TRL script, and against `trl sft`.

Run as: python benchmarks/train.py ENVIRONMENT MODEL [--steps N] [--rounds N] [--only PART] [--out FOLDER]

ENVIRONMENT is the folder of Gym's virtual environment, with reasoning_gym. The conversations are solved tasks of eight
kinds (`solved_tasks.py`); none is longer than TRL's `max_length`, and both sides train the answers alone. Some tasks of
each kind are held out. `gymtrl train` reads them as `format sft` wrote them, `trl sft` as prompt and completion;
`agreement` compares the ids and labels that both are trained on. TRL trains the line break after a turn too, which the
policy never wrote, and may cut the text where an answer begins into other tokens; nothing else may differ.

`overhead`: `gymtrl train` and the script (`train_sides.py: plain`) build the same trainer with the same settings, on
short rows, where a step is short and what is done once a step weighs most. Both write a checkpoint after the same
steps. They run at the same time, but one is held up while the other takes a step, first the one, then the other: the
machine's speed changes by more within minutes than what is measured. `overhead` is the share of the script's tokens a
second that is missing, from the ratios of all steps but the first, with its interval.

`defaults`: `gymtrl train` against `trl sft`, both by their defaults but for the effective batch, which is TRL's 8,
`bf16`, which is off, and `trl`'s passes: `ours` goes through the rows twice, as is its default, `trl` once, where three
times is its own. Ours trains an adapter, `trl` every weight, which learns more from a row. So `ours_once` and
`ours_full` go through them once, and `trl_lora` is told our method and learning rate, `ours_full` TRL's: these pairs
must gain the same. What is left between the two is how rows are put into micro-batches, gradient checkpointing, the
order of rows, and the checkpoints that ours writes, as always ten in a run. `gained` is the loss of the untrained model
less that of the trained one: ours must gain GAINED_WITHIN of what the other side gains, or more. `whole_cpu_s` is the
share of the other side's CPU time. `trl_bf16` has TRL's defaults untouched but for `use_cpu`, without which
transformers refuses bf16 where there is no GPU; of it two steps are run, and the second is compared with the same step,
which holds the same rows, of `trl`.

Every run is a process of its own. While it trains, its log is watched, and CPU and wall time of the process with its
children are noted as each step is logged: rates are those of the steps after the first, `whole` is the process with
start, loading and saving. Tokens are those of rows, as both log them: padding is none. `eval_loss` is the mean over the
trained tokens of the held-out rows, measured in the same way for all.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections import Counter
from importlib.metadata import version
from itertools import chain, pairwise
from pathlib import Path
from typing import NamedTuple

from read import machine, rounded
from read_sides import Result
from scipy.stats import t as student_t
from solved_tasks import KINDS
from train_runs import ENVIRONMENT, Run, Training, answer, history, in_turn
from train_sides import IGNORED

MOST_OVERHEAD, LEAST_TIMES, GAINED_WITHIN = 0.03, 2.0, 0.95
SHORT = 160  # tokens
BATCH, HELD = 8, 48  # rows
OVERHEAD_BATCH, BF16_STEPS = 4, 2
SIDES, SOLVED = Path(__file__).parent / "train_sides.py", Path(__file__).parent / "solved_tasks.py"
PACKAGES = ("torch", "trl", "transformers", "peft", "accelerate", "datasets")
LORA = {"r": 32, "lora_alpha": 32, "lora_dropout": 0.0, "target_modules": "all-linear"}
TRL_LORA = {
    **{"--use_peft": "True", "--lora_r": "32", "--lora_alpha": "32", "--lora_dropout": "0"},
    **{"--lora_target_modules": "all-linear", "--learning_rate": "2e-4"},
}


class Row(NamedTuple):
    """A conversation: as Gym writes it, as TRL reads it, and how many tokens it has."""

    line: bytes
    chat: str
    tokens: int


def build(environment: Path, model: str, folder: Path, rows: int) -> Result:
    """Writes the training rows, the short ones among them, and the held-out rows, each as both sides read them."""
    from gymtrl.formats.chats import to_chat
    from gymtrl.models.fingerprint import load_tokenizer
    from gymtrl.rollouts.reader import read_lines

    tokenizer = load_tokenizer(model)
    folder.mkdir(parents=True, exist_ok=True)
    command = [str(environment / "bin" / "python"), "-W", "ignore", str(SOLVED), str((rows + HELD) // len(KINDS)), "0"]
    sources = subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout.splitlines()
    (folder / "solved.jsonl").write_bytes(b"".join(line + b"\n" for line in sources))
    made: list[Row] = []
    for line, source in zip(read_lines([folder / "solved.jsonl"]), sources, strict=True):
        assert line.rollout is not None
        prompt, completion = to_chat(line.rollout.prompt), to_chat(line.rollout.completion)
        text = str(tokenizer.apply_chat_template(prompt + completion, tokenize=False))
        tokens = len(tokenizer(text, add_special_tokens=False)["input_ids"])
        made.append(Row(source, json.dumps({"prompt": prompt, "completion": completion}), tokens))
    kept = {"train": made[:rows], "held": made[rows:], "short": [row for row in made[:rows] if row.tokens <= SHORT]}
    for name, chosen in kept.items():
        make(name, chosen, model, folder)
    digest = hashlib.sha256(b"\n".join(sources)).hexdigest()[:16]
    return {"sha256": digest} | {name: facts([row.tokens for row in chosen]) for name, chosen in kept.items()}


def facts(lengths: list[int]) -> Result:
    """How long rows are, in tokens."""
    quantiles = statistics.quantiles(lengths, n=10)
    return {"rows": len(lengths), "tokens": sum(lengths), "deciles": [round(one) for one in quantiles]}


def make(name: str, rows: list[Row], model: str, folder: Path) -> None:
    """Writes rows as a dataset folder of ours, and as the conversations that `trl sft` loads."""
    from gymtrl.formats.settings import FormatSftSettings
    from gymtrl.formats.sft import format_sft

    rollouts, conversations = folder / f"{name}.jsonl", folder / f"chats-{name}"
    rollouts.write_bytes(b"".join(row.line + b"\n" for row in rows))
    conversations.mkdir(exist_ok=True)
    (conversations / "train.jsonl").write_text("".join(row.chat + "\n" for row in rows))
    shutil.rmtree(folder / name, ignore_errors=True)
    format_sft(rollouts, folder / name, FormatSftSettings(model=model))


def agreement(model: str, folder: Path) -> Result:
    """Compares the training rows of both sides; `unexplained` counts those that should not differ as they do."""
    from datasets import load_dataset

    from gymtrl.models.fingerprint import load_tokenizer

    tokenizer = load_tokenizer(model)
    command = [sys.executable, str(SIDES), "rows", model, str(folder / "chats-train")]
    theirs = {tokenizer.decode(ids): (ids, labels) for ids, labels in answer(command, folder)}
    line_break = tokenizer("\n", add_special_tokens=False)["input_ids"]
    found: Counter[str] = Counter(unexplained=0, other_ids_same_text=0)
    for row in load_dataset(str(folder / "train"), split="train"):
        ids, labels = theirs.get(tokenizer.decode(row["input_ids"]), ([], []))
        found["rows"] += 1
        found["trained_tokens"] += sum(label != IGNORED for label in row["labels"])
        found["trained_by_trl"] += sum(label != IGNORED for label in labels)
        if ids != row["input_ids"]:
            # The text at the border of prompt and answer may be cut into other tokens: ours are those of the policy.
            found["other_ids_same_text" if ids else "unexplained"] += 1
            continue
        differing = [their for our, their in zip(row["labels"], labels, strict=True) if our != their]
        found["line_break_after_turn"] += differing == line_break
        found["unexplained"] += differing not in ([], line_break)
    return dict(found)


def ours(dataset: Path, out: Path, *options: str) -> Training:
    """`gymtrl train sft`."""
    command = [sys.executable, "-m", "gymtrl", "train", "sft", str(dataset), "-o", str(out), *options]
    partial = out.with_name(f".{out.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    return Training(command, out, partial / "metrics.jsonl")


def trl(model: str, chats: Path, out: Path, *options: str) -> Training:
    """`trl sft`, which logs every step, not every tenth."""
    named = ["--model_name_or_path", model, "--dataset_name", str(chats), "--output_dir", str(out)]
    command = [str(Path(sys.executable).with_name("trl")), "sft", *named, "--logging_steps", "1", *options]
    return Training(command, out)


def plain(model: str, dataset: Path, out: Path, plan: Result) -> Training:
    """The plain script, with the settings that a run of ours resolved to."""
    train = {
        "max_length": None,
        "per_device_train_batch_size": plan["micro_batch"],
        "gradient_accumulation_steps": plan["accumulation"],
        "max_steps": plan["steps"],
        "learning_rate": plan["learning_rate"],
        "warmup_steps": 0,  # as ours in so few steps
        "gradient_checkpointing": plan["gradient_checkpointing"],
        "train_sampling_strategy": "batch_rebalance",
        "save_steps": plan["save_steps"],
        "save_total_limit": 2,
        "seed": 0,
        "use_cpu": True,
        "bf16": False,
        "logging_steps": 1,
        "report_to": "none",
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
    }
    options = json.dumps({"train": train, "lora": LORA})
    return Training([sys.executable, str(SIDES), "plain", model, str(dataset), str(out), options], out)


def overhead(model: str, folder: Path, steps: int, rounds: int) -> Result:
    """Ours and the plain script, step by step in turn."""
    asked = ("--effective-batch", str(OVERHEAD_BATCH), "--max-steps", str(steps))
    ours(folder / "short", folder / "planned", *asked).run()
    plan = json.loads((folder / "planned" / "manifest.json").read_text())["extra"]["plan"]
    pairs: list[tuple[Run, Run]] = []
    for _ in range(rounds):
        sides = []
        for begin in (
            lambda: ours(folder / "short", folder / "overhead-ours", *asked),
            lambda: plain(model, folder / "short", folder / "overhead-plain", plan),
        ):
            sides.append(begin())
            sides[-1].until(1)
            sides[-1].hold()
        one, other = in_turn(sides, steps)
        pairs.append((one, other))
        for name, run in zip(("ours", "plain"), pairs[-1], strict=True):
            told(name, run.result())
    losses = [[step["loss"] for step in history(run.folder)] for run in pairs[-1]]
    wall, cpu = (missing([took(pair, of) for pair in pairs]) for of in ("wall", "cpu"))
    for name, found in (("wall", wall), ("CPU", cpu)):
        print(f"overhead of {name} time {found['share']:.2%} [{found['low']:.2%}, {found['high']:.2%}]", flush=True)
    return {
        "plan": plan,
        "largest_loss_difference": max(abs(one - other) for one, other in zip(*losses, strict=True)),
        "rounds": [{"ours": one.result(), "plain": other.result()} for one, other in pairs],
        "overhead": wall,
        "overhead_of_cpu_time": cpu,
        "whole_s": {
            name: statistics.median(pair[place].wall for pair in pairs) for place, name in enumerate(("ours", "plain"))
        },
    }


def took(pair: tuple[Run, Run], of: str) -> list[tuple[float, float]]:
    """Seconds of each step after the first, of both sides."""
    spans = [[getattr(b, of) - getattr(a, of) for a, b in pairwise(run.marks)] for run in pair]
    return list(zip(*spans, strict=True))


def missing(rounds: list[list[tuple[float, float]]]) -> Result:
    """The share of the plain script's tokens a second that is missing, from steps of the same rows in both.

    Returns:
        `dict`: `share`; `low` and `high`, its 95 % interval over steps (Student's t of the logarithms); `steps`.
    """
    logs = [math.log(other / one) for steps in rounds for one, other in steps]
    mean, count = statistics.fmean(logs), len(logs)
    half = statistics.stdev(logs) / math.sqrt(count) * float(student_t.ppf(0.975, count - 1))
    share, low, high = (1 - math.exp(at) for at in (mean, mean + half, mean - half))
    return {"share": share, "low": low, "high": high, "steps": count}


def defaults(model: str, folder: Path) -> Result:
    """Ours and `trl sft` on the same conversations."""
    chats, dataset = folder / "chats-train", folder / "train"
    epoch, off = ("--num_train_epochs", "1"), ("--bf16", "False")
    batch, once = ("--effective-batch", str(BATCH)), ("--epochs", "1")
    runs = {"ours": ours(dataset, folder / "ours", *batch).run()}
    runs["ours_once"] = ours(dataset, folder / "ours_once", *batch, *once).run()
    runs["trl"] = trl(model, chats, folder / "trl", *epoch, *off).run()
    runs["trl_lora"] = trl(model, chats, folder / "trl_lora", *epoch, *off, *chain(*TRL_LORA.items())).run()
    options = ("--method", "full", "--learning-rate", "2e-5", "--warmup-ratio", "0")
    runs["ours_full"] = ours(dataset, folder / "ours_full", *batch, *once, *options).run()
    found = {"base": {"eval_loss": eval_loss(model, "", folder)}}
    for name, run in runs.items():
        adapter = (run.folder / "adapter_config.json").is_file()
        trained = run.folder / "model" if name.startswith("ours") else run.folder
        named = (model, str(run.folder)) if adapter else (str(trained), "")
        loss = eval_loss(*named, folder)
        found[name] = run.result() | {"eval_loss": loss, "gained": found["base"]["eval_loss"] - loss}
        told(name, found[name])
    bf16 = trl(model, chats, folder / "trl_bf16", "--max_steps", str(BF16_STEPS), "--use_cpu", "True").run()
    found["trl_bf16"] = bf16.between(1, BF16_STEPS)
    same = runs["trl"].between(1, BF16_STEPS)
    told("trl_bf16", found["trl_bf16"])
    pairs, bf16_speed = compared(found), found["trl_bf16"]["tokens_per_cpu_s"] / same["tokens_per_cpu_s"]
    for name, figures in pairs.items():
        cpu, wall = figures["times_tokens_per_cpu_s"], figures["times_tokens_per_s"]
        gained = figures["times_gained"]
        print(f"{name:<20}{cpu:.2f} times the tokens a CPU second, {wall:.2f} a second, {gained:.2f} the loss gained")
    print(f"bf16 on: {bf16_speed:.2f} times the speed of the same steps without", flush=True)
    return {
        "sides": found,
        "plan": json.loads((folder / "ours" / "manifest.json").read_text())["extra"]["plan"],
        "compared": pairs,
        "bf16_times_as_fast": bf16_speed,
    }


def compared(found: dict[str, Result]) -> dict[str, Result]:
    """Ours against each side of TRL's: how many times as many tokens a CPU second, and as much loss gained."""
    pairs = [("ours", "trl"), ("ours_once", "trl_lora"), ("ours_full", "trl")]
    return {
        f"{one}_to_{other}": {
            "times_tokens_per_cpu_s": found[one]["tokens_per_cpu_s"] / found[other]["tokens_per_cpu_s"],
            "times_tokens_per_s": found[one]["tokens_per_s"] / found[other]["tokens_per_s"],
            "whole_cpu_s": found[one]["whole"]["cpu_s"] / found[other]["whole"]["cpu_s"],
            "times_gained": found[one]["gained"] / found[other]["gained"],
        }
        for one, other in pairs
    }


def eval_loss(model: str, adapter: str, folder: Path) -> float:
    """Mean loss over the trained tokens of the held-out rows."""
    made = answer([sys.executable, str(SIDES), "loss", model, adapter, str(folder / "held")], folder)
    return float(made["loss"])


def told(name: str, result: Result) -> None:
    """Prints a line."""
    loss = f"  loss {result['eval_loss']:.4f}" if "eval_loss" in result else ""
    rates = f"{result['tokens_per_s']:>8.1f} tokens/s {result['tokens_per_cpu_s']:>8.1f} tokens/CPU s"
    print(f"{name:<18}{rates}  {result['steps']} steps, {result['wall_s']:.1f} s{loss}", flush=True)


def main() -> None:
    """Measures, prints the figures and writes them."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("environment", type=Path, help="virtual environment of Gym, with reasoning_gym")
    parser.add_argument("model", help="folder of the model, such as SmolLM2-135M-Instruct")
    parser.add_argument("--steps", type=int, default=12, help="of the comparison with trl sft (default: 12)")
    parser.add_argument("--rounds", type=int, default=3, help="of the overhead (default: 3)")
    parser.add_argument("--overhead-steps", type=int, default=20, help="of each of its runs (default: 20)")
    parser.add_argument("--only", choices=("overhead", "defaults"), help="one of the two parts")
    parser.add_argument("--work", type=Path, default=Path(tempfile.gettempdir()) / "gymtrl-benchmark-train")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results", help="for train-PART.json")
    options = parser.parse_args()
    os.environ |= ENVIRONMENT
    folder, model = options.work.resolve(), str(Path(options.model).resolve())
    about: Result = {
        "machine": machine() | {"packages": {package: version(package) for package in PACKAGES}},
        "load_before": os.getloadavg()[0],
        "environment": ENVIRONMENT | {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS")},
        "model": Path(model).name,
        "corpus": build(options.environment, model, folder, options.steps * BATCH),
        "agreement": agreement(model, folder),
    }
    print(json.dumps({name: about[name] for name in ("corpus", "agreement")}), flush=True)
    parts = {
        "overhead": lambda: overhead(model, folder, options.overhead_steps, options.rounds),
        "defaults": lambda: defaults(model, folder),
    }
    options.out.mkdir(parents=True, exist_ok=True)
    failed = []
    for name in [options.only] if options.only else parts:
        found = parts[name]()
        (options.out / f"train-{name}.json").write_text(json.dumps(rounded(about | found), indent=1) + "\n")
        failed += missed(about | found)
    if failed:
        sys.exit("; ".join(failed))
    shutil.rmtree(folder)


def missed(result: Result) -> list[str]:
    """What was expected and did not hold."""
    failed = []
    if result["agreement"]["unexplained"]:
        failed.append("a row of trl sft differs from ours by more than a line break")
    if result.get("overhead", {"share": 0})["share"] >= MOST_OVERHEAD:
        failed.append(f"the overhead is not below {MOST_OVERHEAD:.0%}")
    for name, figures in result.get("compared", {}).items():
        if figures["times_tokens_per_cpu_s"] < LEAST_TIMES:
            failed.append(f"{name}: not {LEAST_TIMES} times the tokens a CPU second")
        if figures["times_gained"] < GAINED_WITHIN:
            failed.append(f"{name}: the evaluation loss is higher")
    return failed


if __name__ == "__main__":
    main()
