"""Training by `gymtrl train sft` against a plain TRL script, and against `trl sft`.

Run as: python benchmarks/train.py SITE_PACKAGES MODEL [--steps N] [--rounds N] [--only PART] [--out FOLDER]

SITE_PACKAGES is the folder below which nemo-gym is installed. The conversations are those of the rollouts that it ships
which have one answer, no tools and at most 1,000 tokens, each once: TRL's `max_length` of 1,024 cuts none, and both
sides train the answers alone. Some of them, which share no prompt with the rest, are held out. `gymtrl train` reads
them as `format sft` wrote them, `trl sft` as prompt and completion; `agreement` compares the ids and labels that both
are trained on. TRL trains the line break after a turn too, which the policy never wrote, and may cut the text where an
answer begins into other tokens; nothing else may differ.

`overhead`: `gymtrl train` and the script (`train_sides.py: plain`) build the same trainer with the same settings, on
short rows, where a step is short and what is done once a step weighs most. Both write a checkpoint after the same
steps. `overhead` is the share of the script's tokens a second that is missing, over the steps of all rounds.

`defaults`: `gymtrl train` against `trl sft`, both by their defaults but for the effective batch, which is TRL's 8, one
epoch, and `bf16` off. Ours trains an adapter, theirs every weight; so `trl_lora` is told our method and learning rate,
and `ours_full` theirs: the loss must be equal within these pairs. What is left between `ours` and `trl_lora`, and
between `ours_full` and `trl`, is how rows are put into micro-batches, gradient checkpointing, and the checkpoints that
ours writes, as always ten in a run or one a step. `trl_bf16` has TRL's defaults untouched but for `use_cpu`, without
which transformers refuses bf16 where there is no GPU; of it two steps are run, and the second is compared with the same
step, which holds the same rows, of `trl`.

Every run is a process of its own. While it trains, its log is watched, and CPU and wall time of the process with its
children are noted as each step is logged: rates are those of the steps after the first, `whole` is the process with
start, loading and saving. Tokens are those of rows, as both log them: padding is none. `eval_loss` is the mean over the
trained tokens of the held-out rows, measured in the same way for all.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import statistics
import sys
import tempfile
from collections import Counter
from importlib.metadata import version
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING

from corpus import source_digest, source_lines
from read import machine, rounded
from read_sides import Result
from train_runs import ENVIRONMENT, Run, answer, history, watched
from train_sides import IGNORED

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from gymtrl.rollouts.record import Rollout

MOST_OVERHEAD, LEAST_TIMES, LOSS_WITHIN = 0.03, 2.0, 0.01
LONGEST, SHORT = 1000, 160  # tokens
BATCH, HELD = 8, 16  # rows
OVERHEAD_BATCH, BF16_STEPS = 4, 2
ALIKE = ("ours_to_trl_lora", "ours_full_to_trl")  # which train the same weights at the same learning rate
SIDES = Path(__file__).parent / "train_sides.py"
PACKAGES = ("torch", "trl", "transformers", "peft", "accelerate", "datasets")
LORA = {"r": 32, "lora_alpha": 32, "lora_dropout": 0.0, "target_modules": "all-linear"}
TRL_LORA = {
    **{"--use_peft": "True", "--lora_r": "32", "--lora_alpha": "32", "--lora_dropout": "0"},
    **{"--lora_target_modules": "all-linear", "--learning_rate": "2e-4"},
}


def build(site_packages: Path, model: str, folder: Path, rows: int) -> Result:
    """Writes the training rows, the short ones among them, and the held-out rows, each as both sides read them."""
    from gymtrl.formats.chats import to_chat
    from gymtrl.models.fingerprint import load_tokenizer
    from gymtrl.rollouts.reader import read_lines

    tokenizer, sources = load_tokenizer(model), source_lines(site_packages)
    folder.mkdir(parents=True, exist_ok=True)
    lines = folder / "candidates.jsonl"
    lines.write_bytes(b"".join(line + b"\n" for line in sources))
    found: dict[str, tuple[str, int, bytes]] = {}
    for line in read_lines([lines]):
        length = tokens_of(tokenizer, line.rollout) if line.verdict == "ok" and line.rollout is not None else None
        if length is not None and line.rollout is not None:
            chat = {"prompt": to_chat(line.rollout.prompt), "completion": to_chat(line.rollout.completion)}
            key = hashlib.sha256(json.dumps(chat["prompt"]).encode()).hexdigest()
            found[json.dumps(chat)] = (key, length, sources[line.origin.line - 1])
    ordered = sorted((key, chat, length, line) for chat, (key, length, line) in found.items())
    last = ordered[rows - 1][0] if len(ordered) >= rows else ""
    kept = {"train": ordered[:rows], "held": [one for one in ordered[rows:] if one[0] != last][:HELD]}
    kept["short"] = [one for one in kept["train"] if one[2] <= SHORT]
    if len(kept["held"]) < HELD:
        raise SystemExit(f"only {len(ordered)} rollouts fit; {rows} and {HELD} to hold out are needed")
    for name, chosen in kept.items():
        make(name, [one[3] for one in chosen], [one[1] for one in chosen], model, folder)
    return {"sha256": source_digest(sources)} | {name: facts([one[2] for one in kept[name]]) for name in kept}


def tokens_of(tokenizer: PreTrainedTokenizerBase, rollout: Rollout) -> int | None:
    """Tokens of a rollout that both sides take to be the same rows; `None` where it is not one."""
    from gymtrl.formats.chats import to_chat

    messages = (*rollout.prompt, *rollout.completion)
    odd = any(m.reasoning_content or m.images or m.tool_calls or m.role in ("developer", "tool") for m in messages)
    if len(rollout.completion) != 1 or odd or rollout.tools or rollout.truncated or rollout.recorded:
        return None
    text = str(tokenizer.apply_chat_template(to_chat(messages), tokenize=False))
    count = len(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
    return count if count <= LONGEST else None


def facts(lengths: list[int]) -> Result:
    """How long rows are, in tokens."""
    quantiles = statistics.quantiles(lengths, n=10)
    return {"rows": len(lengths), "tokens": sum(lengths), "deciles": [round(one) for one in quantiles]}


def make(name: str, lines: list[bytes], chats: list[str], model: str, folder: Path) -> None:
    """Writes rows as a dataset folder of ours, and as the conversations that `trl sft` loads."""
    from gymtrl.formats.settings import FormatSftSettings
    from gymtrl.formats.sft import format_sft

    rollouts, conversations = folder / f"{name}.jsonl", folder / f"chats-{name}"
    rollouts.write_bytes(b"".join(line + b"\n" for line in lines))
    conversations.mkdir(exist_ok=True)
    (conversations / "train.jsonl").write_text("".join(chat + "\n" for chat in chats))
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


def ours(dataset: Path, out: Path, *options: str) -> Run:
    """`gymtrl train sft`."""
    command = [sys.executable, "-m", "gymtrl", "train", "sft", str(dataset), "-o", str(out), *options]
    partial = out.with_name(f".{out.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    return watched(command, out, partial / "metrics.jsonl")


def trl(model: str, chats: Path, out: Path, *options: str) -> Run:
    """`trl sft`, which logs every step, not every tenth."""
    named = ["--model_name_or_path", model, "--dataset_name", str(chats), "--output_dir", str(out)]
    command = [str(Path(sys.executable).with_name("trl")), "sft", *named, "--logging_steps", "1", *options]
    return watched(command, out)


def plain(model: str, dataset: Path, out: Path, plan: Result) -> Run:
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
    return watched([sys.executable, str(SIDES), "plain", model, str(dataset), str(out), options], out)


def overhead(model: str, folder: Path, steps: int, rounds: int) -> Result:
    """Ours and the plain script, in turn."""
    runs: dict[str, list[Run]] = {"ours": [], "plain": []}
    for _ in range(rounds):
        asked = ("--effective-batch", str(OVERHEAD_BATCH), "--max-steps", str(steps))
        runs["ours"].append(ours(folder / "short", folder / "overhead-ours", *asked))
        plan = json.loads((folder / "overhead-ours" / "manifest.json").read_text())["extra"]["plan"]
        runs["plain"].append(plain(model, folder / "short", folder / "overhead-plain", plan))
        for name in runs:
            told(name, runs[name][-1].result())
    results = {name: [run.result() for run in side] for name, side in runs.items()}
    losses = [[step["loss"] for step in history(folder / f"overhead-{name}")] for name in runs]
    medians = {
        name: {key: statistics.median(one[key] for one in side) for key in ("tokens_per_s", "tokens_per_cpu_s")}
        for name, side in results.items()
    }
    rates = [[medians[name][rate] for name in ("ours", "plain")] for rate in ("tokens_per_s", "tokens_per_cpu_s")]
    missing, of_cpu_time = (1 - one / other for one, other in rates)
    print(f"overhead {missing:.2%}, of CPU time {of_cpu_time:.2%}", flush=True)
    return {
        "plan": plan,
        "largest_loss_difference": max(abs(one - other) for one, other in zip(*losses, strict=True)),
        "rounds": results,
        "medians": medians,
        "overhead": missing,
        "overhead_of_cpu_time": of_cpu_time,
        "whole_s": {name: statistics.median(one["whole"]["wall_s"] for one in side) for name, side in results.items()},
    }


def defaults(model: str, folder: Path) -> Result:
    """Ours and `trl sft` on the same conversations."""
    chats, dataset = folder / "chats-train", folder / "train"
    epoch, off = ("--num_train_epochs", "1"), ("--bf16", "False")
    asked = ("--effective-batch", str(BATCH), "--epochs", "1")
    runs = {"ours": ours(dataset, folder / "ours", *asked)}
    runs["trl"] = trl(model, chats, folder / "trl", *epoch, *off)
    runs["trl_lora"] = trl(model, chats, folder / "trl_lora", *epoch, *off, *chain(*TRL_LORA.items()))
    options = ("--method", "full", "--learning-rate", "2e-5", "--warmup-ratio", "0")
    runs["ours_full"] = ours(dataset, folder / "ours_full", *asked, *options)
    found = {"base": {"eval_loss": eval_loss(model, "", folder)}}
    for name, run in runs.items():
        adapter = (run.folder / "adapter_config.json").is_file()
        trained = run.folder / "model" if name.startswith("ours") else run.folder
        named = (model, str(run.folder)) if adapter else (str(trained), "")
        found[name] = run.result() | {"eval_loss": eval_loss(*named, folder)}
        told(name, found[name])
    bf16 = trl(model, chats, folder / "trl_bf16", "--max_steps", str(BF16_STEPS), "--use_cpu", "True")
    found["trl_bf16"] = bf16.between(1, BF16_STEPS)
    same = runs["trl"].between(1, BF16_STEPS)
    told("trl_bf16", found["trl_bf16"])
    pairs, bf16_speed = compared(found), found["trl_bf16"]["tokens_per_cpu_s"] / same["tokens_per_cpu_s"]
    for name, figures in pairs.items():
        print(f"{name:<28}{figures['times_tokens_per_cpu_s']:.2f} times the tokens a CPU second, "
              f"{figures['times_tokens_per_s']:.2f} a second, loss {figures['eval_loss_more']:+.2%}")  # fmt: skip
    print(f"bf16 on: {bf16_speed:.2f} times the speed of the same steps without", flush=True)
    return {
        "sides": found,
        "plan": json.loads((folder / "ours" / "manifest.json").read_text())["extra"]["plan"],
        "compared": pairs,
        "bf16_times_as_fast": bf16_speed,
    }


def compared(found: dict[str, Result]) -> dict[str, Result]:
    """Ours against each side of TRL's: how many times as many tokens a CPU second, and the loss beside theirs."""
    pairs = [("ours", "trl"), ("ours", "trl_lora"), ("ours_full", "trl")]
    return {
        f"{one}_to_{other}": {
            "times_tokens_per_cpu_s": found[one]["tokens_per_cpu_s"] / found[other]["tokens_per_cpu_s"],
            "times_tokens_per_s": found[one]["tokens_per_s"] / found[other]["tokens_per_s"],
            "eval_loss_more": found[one]["eval_loss"] / found[other]["eval_loss"] - 1,
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
    parser.add_argument("site_packages", type=Path, help="folder below which nemo-gym is installed")
    parser.add_argument("model", help="folder of the model, such as SmolLM2-135M-Instruct")
    parser.add_argument("--steps", type=int, default=6, help="of the comparison with trl sft (default: 6)")
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
        "corpus": build(options.site_packages, model, folder, options.steps * BATCH),
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
    if result.get("overhead", 0) >= MOST_OVERHEAD:
        failed.append(f"the overhead is not below {MOST_OVERHEAD:.0%}")
    for name, figures in result.get("compared", {}).items():
        if figures["times_tokens_per_cpu_s"] < LEAST_TIMES:
            failed.append(f"{name}: not {LEAST_TIMES} times the tokens a CPU second")
        if name in ALIKE and abs(figures["eval_loss_more"]) > LOSS_WITHIN:
            failed.append(f"{name}: the evaluation loss is not equal")
    return failed


if __name__ == "__main__":
    main()
