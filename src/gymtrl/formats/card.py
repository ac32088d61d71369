"""What a dataset folder tells people and plain scripts: its card and a short training script."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from gymtrl.formats.dataset import COLUMNS, Objective
from gymtrl.formats.settings import FormatSettings

if TYPE_CHECKING:
    from gymtrl.formats.folder import FormatResult

_SCRIPT = '''\
"""{title}

Run as: python train_with_trl.py [MODEL] [OUTPUT]
"""

import sys
from pathlib import Path

import torch
from datasets import load_dataset
{imports}

folder = Path(__file__).resolve().parent
model = sys.argv[1] if len(sys.argv) > 1 else {model!r}
output = sys.argv[2] if len(sys.argv) > 2 else "{objective}-output"

dataset = load_dataset(str(folder)).select_columns({columns!r})
cuda = torch.cuda.is_available()
config = {config}(
    output_dir=output,
{options}
    use_cpu=not cuda,
    bf16=cuda,
    gradient_checkpointing=cuda,
    seed={seed},
    report_to="none",
)
trainer = {trainer}(
    model=model, args=config, train_dataset=dataset["train"], eval_dataset=dataset.get("validation")
)
trainer.train()
trainer.save_model(output)
'''

_WHOLE = "max_length=None,  # nothing is cut: rows that are too long are not in this dataset"

_SCRIPTS: dict[Objective, dict[str, Any]] = {
    "sft": {
        "title": "Trains on this folder with TRL alone. The rows are tokenized and masked; SFTTrainer takes them so.",
        "imports": "from trl import SFTConfig, SFTTrainer",
        "columns": ["input_ids", "labels"],
        "config": "SFTConfig",
        "trainer": "SFTTrainer",
        "options": [
            _WHOLE,
            "per_device_train_batch_size=1,",
            "gradient_accumulation_steps=8,",
            "num_train_epochs=2,",
            "learning_rate=1e-5,",
        ],
    },
}

_CARD = """\
---
configs:
- config_name: default
  data_files:
{data_files}
---

# {title} dataset from NeMo Gym rollouts

{rows} rows, {tokens:,} tokens, of which {loss_tokens:,} carry loss; the longest sequence has {longest:,} tokens. Made
for the tokenizer and chat template of `{model}`; the tokens fit no other.

```python
from datasets import load_dataset

dataset = load_dataset("path/to/this/folder")
```

{how}

| column | holds |
|---|---|
{columns}

Source: SHA-256 `{source}`. Lines read {read}, used {written}, dropped {dropped}.
{reasons}"""

_TITLES: dict[Objective, str] = {
    "sft": "SFT",
    "dpo": "DPO",
    "reward": "Reward model",
    "kto": "KTO",
    "grpo_prompts": "GRPO prompt",
    "grpo_groups": "GRPO group",
}

_LOSS = "Only what the policy wrote carries loss, the token that ends each turn included. Nothing is cut."
_HOW: dict[Objective, str] = {
    "sft": f"`input_ids` and `labels` are ready for TRL's `SFTTrainer`; `train_with_trl.py` shows how. {_LOSS}",
}

_WORDS = {
    "row_id": "first 16 hex digits of the SHA-256 of the rollout's line",
    "file": "the file that the rollout stood in",
    "line": "its line, from 1",
    "task_key": "its task, the same in every run",
    "input_key": "the task's input row",
    "cluster_key": "what a split must keep together",
    "reward": "as Gym recorded it",
    "part": "which row of the rollout this is, from 0",
    "route": "where the tokens came from: `recorded` ids, a `template` that marks the assistant, turn `prefixes`",
    "flags": "remarks",
    "record_json": "the messages and tools, exactly",
    "prompt": "messages that were sent; a view for people and plain scripts: huge integers and last digits may suffer",
    "completion": "messages from the policy's first turn on; likewise",
    "tools": "declared tools; likewise",
    "input_ids": "the tokens",
    "labels": "the tokens that carry loss; -100 elsewhere",
}


def write_script(path: Path, objective: Objective, settings: FormatSettings, facts: dict[str, Any]) -> None:
    """Writes `train_with_trl.py` into the dataset folder `path`."""
    script = _SCRIPTS[objective]
    text = _SCRIPT.format(
        **script
        | {
            "model": settings.model,
            "seed": settings.seed,
            "objective": objective,
            "options": "\n".join(f"    {option.format(**facts)}" for option in script["options"]),
        }
    )
    (path / "train_with_trl.py").write_text(text, encoding="utf-8")


def write_card(
    path: Path, objective: Objective, settings: FormatSettings, result: FormatResult, *, source_sha256: str
) -> None:
    """Writes the dataset card, whose head tells `datasets.load_dataset` which file is which split."""
    present = [split for split, rows in result.rows.items() if rows]
    dropped = result.counts.dropped
    reasons = "".join(f"\n| {reason} | {count} |" for reason, count in sorted(dropped.items()))
    text = _CARD.format(
        data_files="\n".join(f"  - split: {split}\n    path: data/{split}-*.parquet" for split in present),
        title=_TITLES[objective],
        rows=", ".join(f"{result.rows[split]:,} {split}" for split in present),
        tokens=result.tokens,
        loss_tokens=result.loss_tokens,
        longest=result.longest,
        model=settings.model,
        how=_HOW[objective],
        columns="\n".join(f"| `{name}` | {_WORDS[name]} |" for name in COLUMNS[objective]),
        source=source_sha256,
        read=result.counts.read,
        written=result.counts.written,
        dropped=sum(dropped.values()),
        reasons=f"\n| dropped because | lines |\n|---|---|{reasons}\n" if reasons else "",
    )
    (path / "README.md").write_text(text, encoding="utf-8")
