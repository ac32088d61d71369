"""What a dataset folder tells people and plain scripts: its card and a short training script."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from gymtrl.formats.settings import FormatSftSettings

if TYPE_CHECKING:
    from gymtrl.formats.sft import FormatResult

_SCRIPT = '''\
"""Trains on this folder with TRL alone. The rows are tokenized and masked; SFTTrainer takes them as they are.

Run as: python train_with_trl.py [MODEL] [OUTPUT]
"""

import sys
from pathlib import Path

import torch
from datasets import load_dataset
from trl import SFTConfig, SFTTrainer

folder = Path(__file__).resolve().parent
model = sys.argv[1] if len(sys.argv) > 1 else {model!r}
output = sys.argv[2] if len(sys.argv) > 2 else "sft-output"

dataset = load_dataset(str(folder)).select_columns(["input_ids", "labels"])
cuda = torch.cuda.is_available()
config = SFTConfig(
    output_dir=output,
    max_length=None,  # nothing is cut: rows that are too long are not in this dataset
    per_device_train_batch_size=1,
    gradient_accumulation_steps=8,
    num_train_epochs=2,
    learning_rate=1e-5,
    use_cpu=not cuda,
    bf16=cuda,
    gradient_checkpointing=cuda,
    seed={seed},
    report_to="none",
)
trainer = SFTTrainer(model=model, args=config, train_dataset=dataset["train"], eval_dataset=dataset.get("validation"))
trainer.train()
trainer.save_model(output)
'''

_CARD = """\
---
configs:
- config_name: default
  data_files:
{data_files}
---

# SFT dataset from NeMo Gym rollouts

{rows} rows, {tokens:,} tokens, of which {loss_tokens:,} carry loss; the longest row has {longest:,} tokens. Made for
the tokenizer and chat template of `{model}`; the tokens fit no other.

```python
from datasets import load_dataset

dataset = load_dataset("path/to/this/folder")
```

`input_ids` and `labels` are ready for TRL's `SFTTrainer`; `train_with_trl.py` shows how. Only what the assistant wrote
after the prompt carries loss, the token that ends each turn included. No row is cut.

| column | holds |
|---|---|
| `row_id`, `file`, `line` | the rollout that the row came from |
| `task_key`, `input_key`, `cluster_key` | its task, the task's input row, and what a split must keep together |
| `reward` | as Gym recorded it |
| `route`, `flags` | where the tokens came from (`recorded` ids, marked `template`, turn `prefixes`); remarks |
| `record_json` | prompt, completion and tools, exactly |
| `prompt`, `completion`, `tools` | the same for people and plain scripts; huge integers and last digits may suffer |
| `input_ids`, `labels` | the tokens; -100 where there is no loss |

Source: SHA-256 `{source}`. Read {read}, written {written}, dropped {dropped}.
{reasons}"""


def write_script(path: Path, settings: FormatSftSettings) -> None:
    """Writes `train_with_trl.py` into the dataset folder `path`."""
    text = _SCRIPT.format(model=settings.model, seed=settings.seed)
    (path / "train_with_trl.py").write_text(text, encoding="utf-8")


def write_card(path: Path, result: FormatResult, settings: FormatSftSettings, *, source_sha256: str) -> None:
    """Writes the dataset card, whose head tells `datasets.load_dataset` which file is which split."""
    present = [split for split, rows in result.rows.items() if rows]
    dropped = result.counts.dropped
    reasons = "".join(f"\n| {reason} | {count} |" for reason, count in sorted(dropped.items()))
    text = _CARD.format(
        data_files="\n".join(f"  - split: {split}\n    path: data/{split}-*.parquet" for split in present),
        rows=", ".join(f"{result.rows[split]:,} {split}" for split in present),
        tokens=result.tokens,
        loss_tokens=result.loss_tokens,
        longest=result.longest,
        model=settings.model,
        source=source_sha256,
        read=result.counts.read,
        written=result.counts.written,
        dropped=sum(dropped.values()),
        reasons=f"\n| dropped because | rows |\n|---|---|{reasons}\n" if reasons else "",
    )
    (path / "README.md").write_text(text, encoding="utf-8")
