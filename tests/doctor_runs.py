"""Real runs of a tiny model for the tests of `doctor`: a language of numbers, datasets in it, and our trainers."""

from __future__ import annotations

import functools
import json
import random
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from gymtrl.doctor.facts import data_facts
from gymtrl.doctor.finding import Finding
from gymtrl.doctor.rules import STOPPING
from gymtrl.doctor.run import RunRecord

VOCABULARY = 64
FIRST, LETTERS = 8, 48
KNOWN, NEW = (0.5, 0.3, 0.2), (0.25, 0.3, 0.45)
Rows = list[dict[str, Any]]
WIDE = [[1.0, 0.0, 0.0, 1.0]] * 25
"""Rewards of groups that there is much to learn from."""


def text(odds: Sequence[float], length: int, chance: random.Random, start: int | None = None) -> list[int]:
    """Tokens that each lie one, two or three after the one before, with these odds."""
    at = chance.randrange(LETTERS) if start is None else start
    made = [at]
    for _ in range(length - 1):
        made.append((made[-1] + chance.choices((1, 2, 3), odds)[0]) % LETTERS)
    return [FIRST + letter for letter in made]


def sft_rows(count: int, odds: Sequence[float] = NEW, seed: int = 0) -> Rows:
    """Rows of 30 tokens, the last 26 of which carry loss."""
    chance = random.Random(seed)
    rows = []
    for number in range(count):
        ids = text(odds, 30, chance)
        rows.append({"task_key": f"task {number}", "input_ids": ids, "labels": [-100] * 4 + ids[4:]})
    return rows


def pair_rows(count: int, seed: int = 0, *, chosen: Sequence[float] = NEW, length: int = 12) -> Rows:
    """Pairs of completions of one prompt: the chosen one in new odds, the rejected one in the known ones."""
    chance = random.Random(seed)
    rows = []
    for number in range(count):
        prompt = text(KNOWN, 5, chance)
        row: dict[str, Any] = {"task_key": f"task {number}", "prompt_ids": prompt}
        for side, odds in (("chosen", chosen), ("rejected", KNOWN)):
            row[f"{side}_ids"] = text(odds, length + 1, chance, start=prompt[-1] - FIRST)[1:]
            row[f"{side}_mask"] = [1] * length
        rows.append(row)
    return rows


def unpaired_rows(pairs: Rows) -> Rows:
    """The sides of pairs, good and bad in turn."""
    rows = []
    for number, pair in enumerate(pairs):
        side = ("chosen", "rejected")[number % 2]
        sides = {"completion_ids": pair[f"{side}_ids"], "completion_mask": pair[f"{side}_mask"]}
        own = {"task_key": pair["task_key"], "prompt_ids": pair["prompt_ids"]}
        rows.append({**own, **sides, "label": side == "chosen"})
    return rows


def group_rows(rewards: Sequence[Sequence[float | None]], seed: int = 0, *, length: int = 8) -> Rows:
    """Recorded groups with these rewards."""
    chance = random.Random(seed)
    rows = []
    for group, given in enumerate(rewards):
        prompt = text(KNOWN, 5, chance)
        for reward in given:
            said = text(KNOWN, length + 1, chance, start=prompt[-1] - FIRST)[1:]
            own = {"task_key": f"task {group}", "group": str(group), "reward": reward, "prompt_ids": prompt}
            rows.append({**own, "completion_ids": said, "completion_mask": [1] * length})
    return rows


def dataset(folder: Path, rows: Rows, *, validation: Rows | None = None, **manifest: Any) -> Path:
    """Writes rows as a dataset folder."""
    (folder / "data").mkdir(parents=True)
    types = {"ids": pa.int32(), "labels": pa.int32(), "mask": pa.int8()}
    columns = {
        name: next((pa.list_(kind) for end, kind in types.items() if name.endswith(end)), None) for name in rows[0]
    }
    for split, some in (("train", rows), ("validation", validation)):
        if some:
            arrays = {name: pa.array([row[name] for row in some], type=kind) for name, kind in columns.items()}
            pq.write_table(pa.table(arrays), folder / "data" / f"{split}-00000-of-00001.parquet")
    extra = manifest.pop("extra", {})
    counts = {"read": len(rows), "written": len(rows), "dropped": {}} | manifest
    (folder / "manifest.json").write_text(json.dumps({"counts": counts, "extra": extra}))
    return folder


def pretrained(folder: Path, tokenizer: Path) -> Path:
    """A Llama with 20,000 weights that knows the language in its known odds."""
    import torch
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    AutoTokenizer.from_pretrained(tokenizer).save_pretrained(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=128,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=2,
    )
    model = LlamaForCausalLM(config)
    model.save_pretrained(folder / "random")
    AutoTokenizer.from_pretrained(tokenizer).save_pretrained(folder / "random")
    chance = random.Random(7)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(150):
        ids = torch.tensor([text(KNOWN, 30, chance) for _ in range(16)])
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert loss.item() < 1.3  # the language's own entropy is 1.03
    model.save_pretrained(folder)
    return folder


@dataclass
class Run:
    """What a real run left.

    Attributes:
        record (`RunRecord`): All that is known of it.
        live (`list[Finding]`): What was found while it trained.
        told (`str`): What was printed then.
        stopped_by (`Finding`, *optional*): What ended it.
        findings_file (`Path`): `findings.json`.
    """

    record: RunRecord
    live: list[Finding]
    told: str
    stopped_by: Finding | None
    findings_file: Path


def train(
    objective: str,
    folder: Path,
    model: Path,
    out: Path,
    *,
    steps: int = 45,
    batch: int = 8,
    rate: float = 1e-3,
    lora: Any = None,
    weights: Callable[[Any], None] | None = None,
    **options: Any,
) -> Run:
    """Trains with the trainer of an objective under a `Watch`.

    Args:
        objective (`str`): `sft`, `dpo`, `kto` or `grpo`.
        folder (`Path`): The dataset.
        model (`Path`): The model.
        out (`Path`): Folder to write into.
        steps, batch, rate: The plan.
        lora (`LoraConfig`, *optional*): An adapter.
        weights (`Callable`, *optional*): Does something to the model first.
        options: Further options of TRL.
    """
    from io import StringIO

    import torch
    from datasets import Dataset
    from rich.console import Console
    from transformers import AutoModelForCausalLM, PrinterCallback
    from trl import DPOConfig, KTOConfig, SFTConfig, SFTTrainer

    from gymtrl import RecordedGroupConfig, RecordedGroupTrainer, TokenDPOTrainer, TokenKTOTrainer, recompute_log_probs
    from gymtrl.training.plan import ADAMW
    from gymtrl.training.watch import Watch

    kinds: dict[str, Any] = {
        "sft": (SFTTrainer, SFTConfig),
        "dpo": (TokenDPOTrainer, DPOConfig),
        "kto": (TokenKTOTrainer, KTOConfig),
        "grpo": (RecordedGroupTrainer, RecordedGroupConfig),
    }
    kind, config = kinds[objective]
    out.mkdir(parents=True, exist_ok=True)
    facts = data_facts(folder)
    record = RunRecord(
        objective,
        method="lora" if lora else "full",
        dataset=str(folder),
        data=facts,
        planned_steps=steps,
        effective_batch=batch,
        learning_rate=rate,
    )
    console = Console(file=StringIO(), width=200)
    watch = Watch(record, out / "findings.json", console)
    usual = {
        "max_steps": steps,
        "per_device_train_batch_size": batch,
        "learning_rate": rate,
        "lr_scheduler_type": "constant",
        "optim": ADAMW,
        "logging_nan_inf_filter": False,
        "use_cpu": True,
        "bf16": False,
        "gradient_checkpointing": False,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
    }
    more: dict[str, Any] = {}
    rows = pq.read_table(folder / "data" / "train-00000-of-00001.parquet").to_pylist()
    train_rows = Dataset.from_list([{n: v for n, v in row.items() if n != "task_key"} for row in rows])
    validation = folder / "data" / "validation-00000-of-00001.parquet"
    if validation.exists():
        names = [name for name in rows[0] if name != "task_key"]
        more["eval_dataset"] = Dataset.from_parquet(str(validation), cache_dir=str(out / "cache")).select_columns(names)
    torch.manual_seed(0)
    loaded = AutoModelForCausalLM.from_pretrained(model, dtype="float32")
    if objective == "grpo":
        train_rows = recompute_log_probs(loaded, train_rows)
    else:
        usual["max_length"] = None
    if weights is not None:
        weights(loaded)
    trainer = kind(
        model=loaded,
        args=config(output_dir=str(out / "trainer"), **usual | options),
        train_dataset=train_rows,
        processing_class=_tokenizer(model),
        peft_config=lora,
        callbacks=[watch],
        **more,
    )
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    assert isinstance(console.file, StringIO)
    stopped_by = next((finding for finding in watch.findings if finding.rule in STOPPING), None)
    return Run(watch.record, watch.findings, console.file.getvalue(), stopped_by, out / "findings.json")


@functools.cache
def _tokenizer(folder: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder)


def run_folder(folder: Path, run: Run, *, verb: str = "train sft", finished: bool = True) -> Path:
    """Writes a run as `gymtrl train` leaves it, finished or interrupted."""
    record = run.record
    kept = folder if finished else folder.parent / f".{folder.name}.partial"
    kept.mkdir(parents=True)
    lines = sorted((*record.steps, *record.evals), key=lambda entry: entry["step"])
    (kept / "metrics.jsonl").write_text("".join(json.dumps(dict(line)) + "\n" for line in lines))
    plan = {"objective": record.objective, "method": record.method, "steps": record.planned_steps}
    plan |= {name: getattr(record, name) for name in ("effective_batch", "learning_rate")}
    assert record.data is not None
    known = {"objective": record.objective, "plan": plan, "data": asdict(record.data)}
    names = ("trainable", "parameters", "adapted", "linear", "vocabulary")
    inputs = [{"path": record.dataset, "sha256": "0" * 64}]
    called = {"verb": verb, "settings": {"method": record.method}, "inputs": inputs}
    if finished:
        known["parameters"] = {name: getattr(record, name) for name in names}
        (kept / "manifest.json").write_text(json.dumps({**called, "extra": known}))
    else:
        (kept / ".identity.json").write_text(json.dumps(called))
        (kept / "job.json").write_text(json.dumps(known))
    return folder
