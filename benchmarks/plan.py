"""Predicted memory of training runs (`gymtrl.training.memory`) against what TRL's trainers take.

Run as: python benchmarks/plan.py [--only NAME ...] [--rounds N] [--jobs N] [--out benchmarks/results/plan.json]

Each configuration runs in a fresh process: a model with random weights is loaded from its folder and trained by TRL's
own trainer for two steps of two micro-batches, the last of which is the longest, and a checkpoint is written. Two
shapes: `smollm2`, that of SmolLM2-135M, stored in float32; `wide`, a Qwen3 of 8 layers with a vocabulary of 151,936,
stored in bfloat16. Adapters have rank 32 on every linear layer.

On CPU, `measured` is the highest resident size (VmHWM) minus the resident size once everything is imported and the rows
are made, before the model is loaded; training is in float32. On a GPU it is `torch.cuda.max_memory_allocated()`, under
bfloat16 autocast; that path has not been run yet. `error` is the prediction's, as a share of what was measured.

Memory does not depend on how busy the machine is, so `--jobs` may run several at once. It does differ from run to run,
by what glibc's heap can use again: all rounds are kept, `error` is against their median, and `largest` is that of the
round furthest off.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import platform
import statistics
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from read import compiled, machine, rounded
from read_sides import Result

from gymtrl.training.memory import Method, ModelShape, Objective, RunShape, estimate, model_shape

WITHIN = 0.15
ACCUMULATION = 2
PACKAGES = ("torch", "trl", "transformers", "peft", "accelerate", "safetensors")
ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "HF_HUB_OFFLINE": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "TOKENIZERS_PARALLELISM": "false",
}


@dataclass(frozen=True)
class Configuration:
    """What is trained, and how."""

    model: str
    method: Method
    length: int
    objective: Objective = "sft"
    micro_batch: int = 1
    gradient_checkpointing: bool = False

    @property
    def name(self) -> str:
        parts = [self.model, self.objective, self.method, str(self.length)]
        parts += [f"x{self.micro_batch}"] * (self.micro_batch > 1) + ["checkpointing"] * self.gradient_checkpointing
        return "-".join(parts)


CONFIGURATIONS = (
    *(Configuration("smollm2", "lora", length) for length in (256, 768, 2048)),
    *(Configuration("smollm2", "full", length) for length in (256, 768, 2048)),
    *(Configuration("wide", "lora", length) for length in (256, 768, 2048)),
    *(Configuration("wide", "full", length) for length in (256, 768, 2048)),
    Configuration("smollm2", "lora", 768, gradient_checkpointing=True),
    Configuration("wide", "full", 768, gradient_checkpointing=True),
    Configuration("smollm2", "lora", 256, micro_batch=2),
    Configuration("smollm2", "lora", 256, "dpo"),
    Configuration("wide", "full", 256, "dpo"),
)


def make_model(name: str, folder: Path) -> None:
    """Saves a model of random weights."""
    import torch
    from transformers import AutoModelForCausalLM, LlamaConfig, Qwen3Config

    torch.manual_seed(0)
    if name == "smollm2":
        heads = {"num_attention_heads": 9, "num_key_value_heads": 3, "head_dim": 64}
        widths = {"vocab_size": 49152, "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30}
        config: Any = LlamaConfig(**widths, **heads, max_position_embeddings=8192, tie_word_embeddings=True)
        dtype = torch.float32
    else:
        heads = {"num_attention_heads": 8, "num_key_value_heads": 2, "head_dim": 128}
        widths = {"vocab_size": 151936, "hidden_size": 512, "intermediate_size": 1536, "num_hidden_layers": 8}
        config = Qwen3Config(**widths, **heads, max_position_embeddings=8192, tie_word_embeddings=True)
        dtype = torch.bfloat16
    AutoModelForCausalLM.from_config(config, dtype=dtype).save_pretrained(folder)


def rows(configuration: Configuration) -> list[dict[str, Any]]:
    """Rows in the order in which they are trained on; the longest come last.

    Within a micro-batch of several sequences the lengths differ, as they do in any data, so there is padding.
    """
    made = []
    for whole in (
        configuration.length // 2,
        configuration.length // 8,
        configuration.length // 8,
        configuration.length,
    ):
        for place in range(configuration.micro_batch):
            long, short = whole - whole // 4 * (place % 2), whole - whole // 4
            ids = [3 + (7 * at + place) % 900 for at in range(long)]
            if configuration.objective == "sft":
                made.append({"input_ids": ids, "labels": [-100] * (long // 2) + ids[long // 2 :]})
            else:
                row = {
                    "prompt_ids": ids[: long // 2],
                    "chosen_ids": ids[long // 2 :],
                    "rejected_ids": ids[long // 2 : short],
                }
                masks = {f"{side}_mask": [1] * len(row[f"{side}_ids"]) for side in ("chosen", "rejected")}
                made.append(row | masks)
    return made


def measure_here(configuration: Configuration, model: Path, out: Path) -> Result:
    """Trains in this process."""
    import torch
    import transformers
    from datasets import Dataset
    from peft import LoraConfig
    from tokenizers import Tokenizer, models
    from trl import DPOConfig, SFTConfig, SFTTrainer

    from gymtrl.training.preference import TokenDPOTrainer

    cuda = torch.cuda.is_available()
    words = Tokenizer(models.WordLevel({"a": 0, "b": 1, "<e>": 2}, unk_token="a"))
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<e>", pad_token="<e>")
    data = Dataset.from_list(rows(configuration))
    adapter = LoraConfig(r=32, lora_alpha=32, lora_dropout=0.0, target_modules="all-linear", task_type="CAUSAL_LM")
    trainer_type, config_type = (
        (SFTTrainer, SFTConfig) if configuration.objective == "sft" else (TokenDPOTrainer, DPOConfig)
    )
    arguments = config_type(
        output_dir=str(out),
        max_length=None,
        max_steps=2,
        per_device_train_batch_size=configuration.micro_batch,
        gradient_accumulation_steps=ACCUMULATION,
        gradient_checkpointing=configuration.gradient_checkpointing,
        train_sampling_strategy="sequential",
        use_cpu=not cuda,
        bf16=cuda,
        model_init_kwargs={"dtype": "bfloat16" if weight_bytes(configuration, cuda) == 2 else "float32"},
        save_steps=2,
        report_to="none",
        disable_tqdm=True,
        dataloader_pin_memory=cuda,
    )
    before = status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM starts again from what is resident now: proc(5)
    trainer_type(
        model=str(model),
        args=arguments,
        train_dataset=data,
        processing_class=tokenizer,
        peft_config=adapter if configuration.method == "lora" else None,
    ).train()
    measured = torch.cuda.max_memory_allocated() if cuda else status("VmHWM") - before
    return {"measured": measured, "cuda": cuda}


def weight_bytes(configuration: Configuration, cuda: bool) -> int:
    """Bytes of a weight held: frozen ones are rounded on a GPU."""
    return 2 if cuda and configuration.method != "full" else 4


def status(field: str) -> int:
    """Bytes of a field of this process's status."""
    text = Path("/proc/self/status").read_text()
    return next(int(line.split()[1]) * 1024 for line in text.splitlines() if line.startswith(f"{field}:"))


def measure(configuration: Configuration, shape: ModelShape, folder: Path, rounds: int = 1) -> Result:
    """Trains in fresh processes and compares."""
    command = [sys.executable, __file__, "--measure", json.dumps(dataclasses.asdict(configuration))]
    command += [str(folder / configuration.model), str(folder / configuration.name)]
    results: list[Result] = []
    for _ in range(rounds):
        with (folder / f"{configuration.name}.log").open("wb") as log:
            child = subprocess.run(command, stdout=subprocess.PIPE, stderr=log, env=compiled() | ENVIRONMENT)
        if child.returncode:
            text = Path(log.name).read_text()[-2000:]
            raise SystemExit(f"{configuration.name} ended with status {child.returncode}: {text}")
        results.append(json.loads(child.stdout.splitlines()[-1]))
    cuda = bool(results[0]["cuda"])
    return compared(configuration, shape, [result["measured"] for result in results], cuda)


def compared(configuration: Configuration, shape: ModelShape, measured: list[int], cuda: bool) -> Result:
    """The prediction beside what was measured."""
    predicted = estimate(shape, run_shape(configuration, cuda))
    parts = dataclasses.asdict(predicted) | {"total": predicted.total}
    error = predicted.total / statistics.median(measured) - 1
    largest = max((predicted.total / count - 1 for count in measured), key=abs)
    found = {
        "predicted": {part: mib(count) for part, count in parts.items()},
        "measured": [mib(one) for one in measured],
    }
    rounds = ", ".join(str(count) for count in found["measured"])
    print(f"{configuration.name:<38}{mib(predicted.total):>9}{rounds:>18}{error:>+8.1%}{largest:>+9.1%}", flush=True)
    return dataclasses.asdict(configuration) | found | {"cuda": cuda, "error": error, "largest": largest}


def mib(count: int) -> int:
    """Bytes in MiB."""
    return round(count / 2**20)


def run_shape(configuration: Configuration, cuda: bool) -> RunShape:
    """The configuration as the planner sees it."""
    return RunShape(
        objective=configuration.objective,
        method=configuration.method,
        longest=configuration.length,
        micro_batch=configuration.micro_batch,
        accumulation=ACCUMULATION,
        gradient_checkpointing=configuration.gradient_checkpointing,
        weight_bytes=weight_bytes(configuration, cuda),
        cuda=cuda,
    )


def main() -> None:
    """Measures, prints the table and writes it."""
    if sys.argv[1:2] == ["--measure"]:
        configuration, model, out = sys.argv[2:]
        result = measure_here(Configuration(**json.loads(configuration)), Path(model), Path(out))
        print("\n" + json.dumps(result))
        return
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--only", nargs="+", help="names of configurations (default: all; the result is not written)")
    parser.add_argument("--rounds", type=int, default=3, help="measurements of each (default: 3)")
    parser.add_argument("--jobs", type=int, default=1, help="configurations at once (default: 1)")
    parser.add_argument("--out", type=Path, help="default: benchmarks/results/plan.json")
    options = parser.parse_args()
    chosen = [one for one in CONFIGURATIONS if options.only is None or one.name in options.only]
    out = options.out or (None if options.only else Path(__file__).parent / "results" / "plan.json")
    from transformers import AutoConfig

    with tempfile.TemporaryDirectory(prefix="gymtrl-benchmark-plan-") as name:
        folder = Path(name)
        shapes = {}
        for model in {one.model for one in chosen}:
            make_model(model, folder / model)
            shapes[model] = model_shape(AutoConfig.from_pretrained(folder / model))
        print(f"{'MiB':<38}{'predicted':>9}{'measured':>18}{'error':>8}{'largest':>9}", flush=True)
        with ThreadPoolExecutor(options.jobs) as pool:
            results = list(pool.map(lambda one: measure(one, shapes[one.model], folder, options.rounds), chosen))
    outside = [result for result in results if abs(result["error"]) > WITHIN]
    libraries = {package: version(package) for package in PACKAGES} | {"libc": " ".join(platform.libc_ver())}
    if out is not None:
        found: Result = {
            "machine": machine() | {"packages": libraries},
            "environment": ENVIRONMENT,
            "accepted_error": WITHIN,
            "unit": "MiB",
            "configurations": {one.name: result for one, result in zip(chosen, results, strict=True)},
        }
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps(rounded(found), indent=1) + "\n")
    largest = max(abs(result["error"]) for result in results)
    print(f"{len(results) - len(outside)} of {len(results)} within {WITHIN:.0%}, the largest error is {largest:.1%}")
    if outside:
        sys.exit("a prediction is further off than is accepted")


if __name__ == "__main__":
    main()
