"""Small runs of TRL's trainers on a random model, with the callbacks that write a run folder."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from gymtrl.training.progress import MetricsLog
from gymtrl.workspace.artefact import artefact

QUICK = {
    "per_device_train_batch_size": 2,
    "per_device_eval_batch_size": 2,
    "max_steps": 4,
    "learning_rate": 1e-3,
    "use_cpu": True,
    "bf16": False,
    "gradient_checkpointing": False,
    "logging_steps": 1,
    "logging_nan_inf_filter": False,
    "save_strategy": "no",
    "report_to": "none",
    "disable_tqdm": True,
}


class Settings(BaseModel):
    """Stands for those of the verb."""

    method: str = "full"
    learning_rate: float = 1e-3
    trl: dict[str, Any] = {}


def tiny_model(folder: Path, tokenizer_dir: Path) -> Path:
    """Writes a random Llama with a real tokenizer."""
    import torch
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    AutoTokenizer.from_pretrained(tokenizer_dir).save_pretrained(folder)
    torch.manual_seed(0)
    sizes = {"hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    LlamaForCausalLM(LlamaConfig(vocab_size=49152, **sizes, tie_word_embeddings=True)).save_pretrained(folder)
    return folder


def rows(objective: str, count: int, seed: int = 0) -> list[dict[str, Any]]:
    """Rows of a dataset for an objective, of different lengths."""
    draw = random.Random(seed)

    def ids(least: int, most: int) -> list[int]:
        return [draw.randrange(100, 400) for _ in range(draw.randint(least, most))]

    made: list[dict[str, Any]] = []
    for n in range(count):
        prompt, said = ids(3, 6), {name: ids(2, 9) for name in ("chosen", "rejected")}
        if objective == "sft":
            made.append({"input_ids": prompt + said["chosen"], "labels": [-100] * len(prompt) + said["chosen"]})
        elif objective == "dpo":
            sides = {f"{side}_ids": its for side, its in said.items()}
            made.append({"prompt_ids": prompt, **sides, **{f"{side}_mask": [1] * len(said[side]) for side in said}})
        elif objective == "kto":
            its = said["chosen"]
            made.append(
                {"prompt_ids": prompt, "completion_ids": its, "completion_mask": [1] * len(its), "label": n % 2 == 0}
            )
        else:
            made.append({"prompt": f"What is {n} + {n}?"})
    return made


def trainer(objective: str, model: Path, out: Path, data: list[dict[str, Any]], **options: Any) -> Any:
    """TRL's trainer for rows of an objective."""
    import trl
    from datasets import Dataset
    from transformers import AutoTokenizer, PrinterCallback

    from gymtrl import TokenDPOTrainer, TokenKTOTrainer

    name = objective.upper()
    kinds = {"sft": trl.SFTTrainer, "dpo": TokenDPOTrainer, "kto": TokenKTOTrainer, "grpo": trl.GRPOTrainer}
    more: dict[str, Any] = {"max_length": None} if objective != "grpo" else {}
    parts: dict[str, Any] = {"eval_dataset": Dataset.from_list(data[:2])} if objective in ("sft", "dpo") else {}
    if objective == "grpo":
        more = {"num_generations": 2, "max_completion_length": 4}
        parts = {"reward_funcs": lambda completions, **_: [float(len(text) % 3) for text in completions]}
    made = kinds[objective](
        model=str(model),
        args=getattr(trl, f"{name}Config")(output_dir=str(out), **(QUICK | more | options)),
        train_dataset=Dataset.from_list(data),
        processing_class=AutoTokenizer.from_pretrained(model),
        **parts,
    )
    made.remove_callback(PrinterCallback)
    return made


def train_run(objective: str, model: Path, run: Path, data: list[dict[str, Any]], **options: Any) -> Path:
    """Trains for a few steps and writes a run folder: metrics, one finding, and the manifest."""
    settings = Settings()
    with artefact(run, verb=f"train {objective}", settings=settings, inputs=[model]) as draft:
        log = MetricsLog(draft.path / "metrics.jsonl", 0)
        made = trainer(objective, model, draft.path / "checkpoints", data, **options)
        made.add_callback(log)
        log.evaluation(0, made.evaluate())
        made.train()
        log.event("micro-batch halved", 2)
        log.evaluation(made.state.global_step, made.evaluate())
        entries = [json.loads(line) for line in (draft.path / "metrics.jsonl").read_text().splitlines()]
        steps = [entry for entry in entries if "loss" in entry]
        finding = {
            "rule": "tiny_data",
            "severity": "warning",
            "title": f"only {len(data)} rows",
            "evidence": f"{len(data)} rows, {model.name}",
            "cause": "the filter left little",
            "remedy": "gymtrl filter … --reward-threshold 0.5",
        }
        (draft.path / "findings.json").write_text(
            json.dumps([finding | {"severity": "note", "title": "small"}, finding])
        )
        evaluated = [entry["eval_loss"] for entry in entries if "eval_loss" in entry]
        draft.extra.update(
            objective=objective,
            model=str(model),
            plan={"objective": objective, "method": "full", "rows": len(data), "steps": len(steps), "epochs": 1.0}
            | {"effective_batch": 2, "micro_batch": 1, "accumulation": 2, "processes": 1, "learning_rate": 1e-3},
            origins={"learning_rate": "default (TRL)", "micro_batch": "the planner: it fits"},
            data={"train": {"rows": len(data), "tokens": steps[-1]["tokens"]}, "source": "rollouts.jsonl"},
            dataset_inputs=[{"path": "filtered/train.jsonl", "sha256": "ab" * 32}],
            results={"first_loss": steps[0]["loss"], "last_loss": steps[-1]["loss"], "seconds": steps[-1]["seconds"]}
            | {"eval_before": evaluated[0], "eval_after": evaluated[-1], "tokens": steps[-1]["tokens"]}
            | {"peak_memory": steps[-1]["peak_memory"]},
            changes=[{"step": 2, "measure": "micro-batch 2 → 1", "reason": "out of memory"}],
        )
    return run
