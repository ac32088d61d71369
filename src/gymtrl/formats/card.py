"""What a dataset folder tells people and plain scripts: its card and a short training script."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from hashlib import sha256
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

{modules}
from pathlib import Path

import torch
from datasets import {loaders}
{imports}

folder = Path(__file__).resolve().parent
model = sys.argv[1] if len(sys.argv) > 1 else {model}
output = sys.argv[2] if len(sys.argv) > 2 else "{objective}-output"

columns = {columns}
dataset = load_dataset(str(folder)).select_columns(columns)
cuda = torch.cuda.is_available()
{before}config = {config}(
    output_dir=output,
{options}
    use_cpu=not cuda,
    bf16=cuda,
    gradient_checkpointing=cuda,
    seed={seed},
    report_to="none",
)
trainer = {trainer}(
    model=model,
    args=config,
    train_dataset=dataset["train"],
    eval_dataset=dataset.get("validation"),
{arguments})
trainer.train()
trainer.save_model(output)
'''

_WHOLE = "max_length=None,  # nothing is cut: rows that are too long are not in this dataset"
_SMALL = ("per_device_train_batch_size=1,", "gradient_accumulation_steps=8,")


@dataclass(frozen=True)
class _Script:
    """What differs between the training scripts of the objectives."""

    title: str
    imports: str
    columns: tuple[str, ...]
    config: str
    trainer: str
    options: tuple[str, ...]
    modules: str = "import sys"
    loaders: str = "load_dataset"
    before: str = ""
    arguments: str = ""


_SFT = _Script(
    "Trains on this folder with TRL alone. The rows are tokenized and masked; SFTTrainer takes them so.",
    "from trl import SFTConfig, SFTTrainer",
    ("input_ids", "labels"),
    "SFTConfig",
    "SFTTrainer",
    (_WHOLE, *_SMALL, "num_train_epochs=2,", "learning_rate=1e-5,"),
)
_SFT_IMAGES = _Script(
    "Trains on this folder with TRL. The model's processor takes texts and images; the labels are this folder's own.",
    "from transformers import AutoProcessor\nfrom trl import SFTConfig, SFTTrainer",
    ("images", "text", "input_ids", "labels"),
    "SFTConfig",
    "SFTTrainer",
    (*_SFT.options, "remove_unused_columns=False,  # the collator below takes them"),
    before='''\
processor = AutoProcessor.from_pretrained(model)


def collate(rows):
    """What the processor makes of texts and images, with the labels of the rows."""
    images = [row["images"] for row in rows]
    batch = processor(
        text=[row["text"] for row in rows],
        images=images if any(images) else None,
        padding=True,
        padding_side="right",
        add_special_tokens=False,
        return_tensors="pt",
    )
    batch["labels"] = torch.full_like(batch["input_ids"], -100)
    for made, mask, labels, row in zip(batch["input_ids"], batch["attention_mask"], batch["labels"], rows):
        if made[mask == 1].tolist() != row["input_ids"]:
            raise SystemExit("this processor makes other tokens than the one that the dataset was made with")
        labels[mask == 1] = torch.tensor(row["labels"])
    return batch


''',
    arguments="    processing_class=processor,\n    data_collator=collate,\n",
)
_DPO_OPTIONS = (
    *_SMALL,
    "num_train_epochs=1,",
    'loss_type=["sigmoid", "sft"],',
    "loss_weights=[1.0, 1.0],",
    "learning_rate=1e-6,",
)
_DPO_PLAIN = _Script(
    "Trains on this folder with TRL alone: each side is one turn. What the chat template writes behind a turn, often\n"
    "a line break, is trained with it; the trainer of gymtrl leaves it out.",
    "from trl import DPOConfig, DPOTrainer",
    ("prompt", "chosen", "rejected", "tools"),
    "DPOConfig",
    "DPOTrainer",
    (_WHOLE, *_DPO_OPTIONS),
    modules="import json\nimport sys",
    before='''\


def declared(row):
    """The tools as text, in which TRL tells none from an empty list; chat templates do, too."""
    return {{"declared": json.dumps(row["tools"] or None)}}


dataset = dataset.map(declared, remove_columns="tools").rename_column("declared", "tools")
''',
)
_DPO_TOKENS = _Script(
    "Trains on this folder with TRL. The trainer is TRL's; it takes the tokens as they are, tool results masked.",
    "from gymtrl import TokenDPOTrainer\nfrom trl import DPOConfig",
    ("prompt_ids", "chosen_ids", "chosen_mask", "rejected_ids", "rejected_mask"),
    "DPOConfig",
    "TokenDPOTrainer",
    (_WHOLE, *_DPO_OPTIONS),
)
_REWARD = _Script(
    "Trains a reward model on this folder with TRL alone; RewardTrainer takes the tokens as they are.",
    "from trl import RewardConfig, RewardTrainer",
    ("chosen_ids", "rejected_ids"),
    "RewardConfig",
    "RewardTrainer",
    (_WHOLE, *_SMALL, "num_train_epochs=1,", "learning_rate=1e-4,"),
)
_KTO = _Script(
    "Trains on this folder with TRL. The trainer is TRL's; it takes the tokens as they are, tool results masked.",
    "from gymtrl import TokenKTOTrainer\nfrom trl import KTOConfig",
    ("prompt_ids", "completion_ids", "completion_mask", "label"),
    "KTOConfig",
    "TokenKTOTrainer",
    (
        _WHOLE,
        "desirable_weight={desirable_weight},",
        "undesirable_weight={undesirable_weight},",
        "per_device_train_batch_size=4,  # its rows are compared with each other",
        "gradient_accumulation_steps=4,",
        "num_train_epochs=1,",
        "learning_rate=1e-6,",
    ),
)
_GROUPS = _Script(
    "Trains on this folder's recorded groups with TRL; nothing is generated. Experimental.",
    "from gymtrl import RecordedGroupConfig, RecordedGroupTrainer, recompute_log_probs",
    ("group", "reward", "prompt_ids", "completion_ids", "completion_mask", "log_probs"),
    "RecordedGroupConfig",
    "RecordedGroupTrainer",
    (*_SMALL, "num_train_epochs=1,", "learning_rate=5e-7,", "temperature=1.0,  # that of the rollouts"),
    before="""\
# Where none were recorded: by the model that collected the rollouts, before it is trained.
dataset = {{split: recompute_log_probs(model, rows) for split, rows in dataset.items()}}
""",
)


def _script(objective: Objective, settings: FormatSettings, facts: Mapping[str, Any]) -> _Script | None:
    """The script of an objective; `None` where training needs a running Gym."""
    if objective == "dpo":
        return _DPO_PLAIN if facts["plain_trl"] else _DPO_TOKENS
    scripts = {"sft": _SFT, "sft_images": _SFT_IMAGES, "reward": _REWARD, "kto": _KTO, "grpo_groups": _GROUPS}
    return scripts.get(objective)


_CARD = """\
---
configs:
- config_name: default
  description: {rows_id}
  data_files:
{data_files}
---

# {title} dataset from NeMo Gym rollouts

{rows} rows, {tokens:,} tokens{loss}; the longest sequence has {longest:,} tokens. Made for the tokenizer and chat
template of `{model}`; the tokens fit no other.

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
    "sft_images": "SFT",
    "dpo": "DPO",
    "reward": "Reward model",
    "kto": "KTO",
    "grpo_prompts": "GRPO prompt",
    "grpo_groups": "GRPO group",
}

_LOSS = "Only what the policy wrote carries loss, the token that ends each turn included. Nothing is cut."
_HOW: dict[Objective, str] = {
    "sft": f"`input_ids` and `labels` are ready for TRL's `SFTTrainer`; `train_with_trl.py` shows how. {_LOSS}",
    "sft_images": "The model's processor makes `input_ids` of `text` and `images`, and `labels` fit them; "
    "`train_with_trl.py` hands both to TRL's `SFTTrainer`. TRL's own collator takes the messages instead: it shows no "
    f"tools and may train what the template writes behind a turn. {_LOSS}",
    "dpo": "`prompt_ids`, `chosen_ids`, `rejected_ids` and the two masks are what `gymtrl.TokenDPOTrainer` takes. "
    f"`train_with_trl.py` shows how: with TRL alone where it gets the same tokens from the messages. {_LOSS}",
    "reward": "`chosen_ids` and `rejected_ids` are whole conversations, ready for TRL's `RewardTrainer`; "
    "`train_with_trl.py` shows how.",
    "kto": "`prompt_ids`, `completion_ids`, `completion_mask` and `label` are what `gymtrl.TokenKTOTrainer` takes, "
    f"with the weights that stand in `train_with_trl.py`. The rows are shuffled: keep their order. {_LOSS}",
    "grpo_prompts": "Prompts of tasks that the policy solved now and then, for online training in Gym: `pass_rate` is "
    "what was logged over `rollouts` rollouts.",
    "grpo_groups": "Recorded groups whose rewards differ, all of one size: what `gymtrl.RecordedGroupTrainer` takes "
    "(experimental), to train the model that collected them. A rollout that the world spoiled has no reward. "
    f"`train_with_trl.py` shows how. {_LOSS}",
}

COLUMN_WORDS = {
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
    "images": "the images of the messages, in order, as the rollout held them",
    "text": "all messages as the chat template writes them, one placeholder for an image",
    "labels": "the tokens that carry loss; -100 elsewhere",
    "kind": "`first_divergence`: the first turns that differ; `trajectory`: all that followed the prompt",
    "depth": "messages of the completions that the two sides share, here part of the prompt",
    "label": "whether the rollout is good",
    "group": "rollouts of one task in one run",
    "pass_rate": "share of the task's rollouts that were good",
    "rollouts": "how many of its rollouts had a valid reward",
    "prompt_ids": "tokens of the prompt",
    "completion_ids": "tokens after the prompt",
    "completion_mask": "1 for those that carry loss",
    "log_probs": "natural log-probabilities as recorded; 0 where the mask is, null where nothing was recorded",
    **{
        f"{side}{name}": words.format(side=side)
        for side in ("chosen", "rejected")
        for name, words in {
            "": "the {side} side's messages; likewise",
            "_row_id": "the {side} side's rollout",
            "_file": "the file that it stood in",
            "_line": "its line, from 1",
            "_reward": "its reward",
            "_route": "where its tokens came from, as `route`",
            "_ids": "its tokens",
            "_mask": "1 for those that carry loss",
        }.items()
    },
}
"""What each column holds."""


def write_script(path: Path, objective: Objective, settings: FormatSettings, facts: dict[str, Any]) -> None:
    """Writes `train_with_trl.py` into the dataset folder `path`, where one script can train on it."""
    script = _script(objective, settings, facts)
    if script is None:
        return
    text = _SCRIPT.format(
        title=script.title,
        modules=script.modules,
        loaders=script.loaders,
        imports=script.imports,
        columns=json.dumps(script.columns),
        config=script.config,
        trainer=script.trainer,
        before=script.before.format(),
        arguments=script.arguments,
        model=json.dumps(settings.model, ensure_ascii=False),
        seed=settings.seed,
        objective=objective,
        options="\n".join(f"    {option.format(**facts)}" for option in script.options),
    )
    (path / "train_with_trl.py").write_text(text, encoding="utf-8")


def write_card(
    path: Path,
    objective: Objective,
    settings: FormatSettings,
    result: FormatResult,
    *,
    source_sha256: str,
    hashes: Iterable[str],
) -> None:
    """Writes the dataset card, whose head tells `datasets.load_dataset` which file is which split.

    `datasets` keeps what it has loaded under the folder's name and a hash of this head. Without the `hashes` of the
    data files in it, another folder of the same name, or this one written anew, would give the rows of before.
    """
    present = [split for split, rows in result.rows.items() if rows]
    dropped = result.counts.dropped
    reasons = "".join(f"\n| {reason} | {count} |" for reason, count in sorted(dropped.items()))
    text = _CARD.format(
        rows_id=sha256("".join(hashes).encode()).hexdigest(),
        data_files="\n".join(f"  - split: {split}\n    path: data/{split}-*.parquet" for split in present),
        title=_TITLES[objective],
        rows=", ".join(f"{result.rows[split]:,} {split}" for split in present),
        tokens=result.tokens,
        loss=f", of which {result.loss_tokens:,} carry loss" if result.loss_tokens else "",
        longest=result.longest,
        model=settings.model,
        how=_HOW[objective],
        columns="\n".join(f"| `{name}` | {COLUMN_WORDS[name]} |" for name in COLUMNS[objective]),
        source=source_sha256,
        read=result.counts.read,
        written=result.counts.written,
        dropped=sum(dropped.values()),
        reasons=f"\n| dropped because | lines |\n|---|---|{reasons}\n" if reasons else "",
    )
    (path / "README.md").write_text(text, encoding="utf-8")
