"""Generated tokens a second of the CPU endpoint's engine, against `transformers` generate in left-padded batches.

Run as: python benchmarks/serving.py MODEL [--threads 2] [--out benchmarks/results/serving.json]

The load is that of a group-sampling collection: 64 tasks, 3 rollouts each, prompts that share their first part, sampled
at temperature 1. Both sides run in this process, with the same prompts, alternating, and the faster of the rounds
counts for each, as other work on the machine only ever slows a round down.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import time
from pathlib import Path
from typing import Any

import torch
import transformers

from gymtrl.serving.chat import prompt_ids
from gymtrl.serving.engine import Engine
from gymtrl.serving.prefixes import common_prefix
from gymtrl.serving.request import GenerationRequest
from gymtrl.serving.sampling import Sampling
from gymtrl.serving.server import load_model

TASKS, REPEATS, NEW_TOKENS, BATCH = 64, 3, 24, 64


def prompts(tokenizer: Any) -> list[tuple[int, ...]]:
    """One worked turn, the same for all, then a question of the task's own; each task `REPEATS` times."""
    ask = "State the final answer to the following arithmetic problem: {} + {} ="
    # The numbers come first, so that what follows them is the task's own.
    question = "{} + {} = is the arithmetic problem. State the final answer as above, please."
    shown = [
        {"role": "user", "content": ask.format(5, 7)},
        {"role": "assistant", "content": "5 + 7 = 12 <answer>12</answer>"},
    ]
    tasks = [
        prompt_ids(tokenizer, [*shown, {"role": "user", "content": question.format(i % 8 + 1, i // 8 + 1)}])
        for i in range(TASKS)
    ]
    return [prompt for prompt in tasks for _ in range(REPEATS)]


def engine_round(model: Any, tokenizer: Any, asked: list[tuple[int, ...]]) -> tuple[float, int]:
    """A new engine, so that no prefix is known beforehand: seconds and generated tokens."""
    engine = Engine(model, tokenizer, max_batch=BATCH)
    start = time.perf_counter()
    futures = [engine.submit(GenerationRequest(prompt, NEW_TOKENS, Sampling())) for prompt in asked]
    tokens = sum(len(future.result().token_ids) for future in futures)
    seconds = time.perf_counter() - start
    engine.close()
    return seconds, tokens


@torch.inference_mode()
def generate_round(model: Any, tokenizer: Any, asked: list[tuple[int, ...]]) -> tuple[float, int]:
    """Left-padded batches through `model.generate`: seconds and generated tokens, end of sequence included."""
    start, tokens = time.perf_counter(), 0
    for begin in range(0, len(asked), BATCH):
        batch = asked[begin : begin + BATCH]
        longest = max(map(len, batch))
        ids = torch.tensor([[tokenizer.pad_token_id] * (longest - len(p)) + list(p) for p in batch])
        mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in batch])
        output = model.generate(
            ids, attention_mask=mask, do_sample=True, temperature=1.0, top_k=0, top_p=1.0, max_new_tokens=NEW_TOKENS
        )
        for row in output[:, longest:].tolist():
            end = tokenizer.eos_token_id
            tokens += row.index(end) + 1 if end in row else len(row)
    return time.perf_counter() - start, tokens


def figures(rounds: list[tuple[float, int]], count: int) -> dict[str, Any]:
    """The best round's rates, and the seconds of all."""
    seconds, tokens = min(rounds, key=lambda entry: entry[0] / entry[1])
    return {
        "rollouts_per_minute": round(60 * count / seconds, 1),
        "tokens_per_second": round(tokens / seconds, 1),
        "seconds_of_rounds": [round(entry[0], 2) for entry in rounds],
        "tokens_of_rounds": [entry[1] for entry in rounds],
    }


def cpu_name() -> str:
    """The processor's name where the system tells it."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    return next(
        (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.processor()
    )


def main() -> None:
    """Measures both sides, prints the ratio and writes the results."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("model", type=Path, help="folder of the checkpoint")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="CPU threads (default: all cores)")
    parser.add_argument("--rounds", type=int, default=2, help="rounds of each side (default: 2)")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "serving.json")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    model, tokenizer = load_model(options.model, device="cpu")
    asked = prompts(tokenizer)
    load_before = os.getloadavg()[0]
    ours, theirs = [], []
    for _ in range(options.rounds):
        ours.append(engine_round(model, tokenizer, asked))
        theirs.append(generate_round(model, tokenizer, asked))
        print(f"engine {ours[-1][0]:.1f} s, generate {theirs[-1][0]:.1f} s", flush=True)
    engine, baseline = figures(ours, len(asked)), figures(theirs, len(asked))
    result = {
        "load": {
            "requests": len(asked),
            "tasks": TASKS,
            "new_tokens_at_most": NEW_TOKENS,
            "prompt_tokens": sorted({len(prompt) for prompt in asked}),
            "shared_prompt_tokens": min(common_prefix(asked[0], prompt) for prompt in asked[REPEATS:]),
            "batch": BATCH,
            "temperature": 1.0,
        },
        "engine": engine,
        "transformers generate": baseline,
        # Of token rates: the two draw different samples, and so not the same number of tokens.
        "ratio": round(engine["tokens_per_second"] / baseline["tokens_per_second"], 2),
        "machine": {
            "cpu": cpu_name(),
            "threads": options.threads,
            "load_average_before_and_after": [round(load_before, 1), round(os.getloadavg()[0], 1)],
            "dtype": str(model.dtype),
        },
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
    }
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(result, indent=2) + "\n")
    for name, side in (("engine", engine), ("transformers generate", baseline)):
        print(f"{name}: {side['rollouts_per_minute']} rollouts/min, {side['tokens_per_second']} tokens/s")
    print(f"ratio of token rates {result['ratio']} (written to {options.out})")


if __name__ == "__main__":
    main()
