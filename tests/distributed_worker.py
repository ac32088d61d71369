"""A worker for the tests of several processes: trains with TRL on token rows what `job.json` in a folder says."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import TrainerCallback
from trl import DPOConfig, SFTConfig, SFTTrainer

from gymtrl import RunError, TokenDPOTrainer
from gymtrl.training.ranks import RequireEngine, require_processes, shard_on_cpu

KINDS: dict[str, Any] = {"sft": (SFTTrainer, SFTConfig), "dpo": (TokenDPOTrainer, DPOConfig)}


class Log(TrainerCallback):
    """What was logged, step by step."""

    def __init__(self) -> None:
        self.lines: list[dict[str, Any]] = []

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        self.lines.append({"step": state.global_step} | logs)


def train(folder: Path, work: dict[str, Any], job: dict[str, Any]) -> None:
    """Trains once, and leaves `result.json` and `model/` in a folder of the job's name."""
    out = folder / job["name"]
    trainer_type, config_type = KINDS[job["objective"]]
    options = {
        "output_dir": str(out / "checkpoints"),
        "max_length": None,
        "per_device_train_batch_size": 1,
        "per_device_eval_batch_size": 1,
        "learning_rate": 1e-2,
        "lr_scheduler_type": "constant",
        "num_train_epochs": 1,
        "use_cpu": True,
        "bf16": False,
        "gradient_checkpointing": False,
        "logging_steps": 1,
        "eval_on_start": True,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
    }
    args = config_type(**options | job["options"])
    require_processes(work["processes"])
    if work["engine"] == "fsdp2":
        shard_on_cpu()
    log = Log()
    adapter = LoraConfig(r=4, lora_alpha=4, lora_dropout=0.0, target_modules="all-linear", task_type="CAUSAL_LM")
    trainer = trainer_type(
        model=work["model"],
        args=args,
        train_dataset=Dataset.from_list(job["rows"]),
        eval_dataset=Dataset.from_list(job["rows"][:3]),
        peft_config=adapter if job.get("lora") else None,
        callbacks=[log],
    )
    trainer.add_callback(RequireEngine(trainer, job.get("engine", work["engine"]), work["processes"]))
    resume = job.get("resume")
    result: dict[str, Any] = {}
    try:
        if job.get("evaluate_first"):
            trainer.evaluate()
        trainer.train(resume_from_checkpoint=str(folder / resume) if resume else None)
        trainer.save_model(str(out / "model"))
    except RunError as error:
        result["refused"] = error.message
    if args.process_index == 0:
        out.mkdir(parents=True, exist_ok=True)
        (out / "result.json").write_text(json.dumps(result | {"lines": log.lines}))


def main(folder: Path) -> None:
    work = json.loads((folder / "job.json").read_text())
    for job in work["jobs"]:
        train(folder, work, job)
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
