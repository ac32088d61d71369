"""What `train.py` runs in processes of their own: a plain TRL script, the loss of a model, rows as TRL makes them.

Run as: python benchmarks/train_sides.py plain|loss|rows ...

None of them imports gymtrl.
"""

from __future__ import annotations

import json
import sys
from typing import Any

IGNORED = -100


def plain(model: str, dataset: str, out: str, options: str) -> None:
    """The script of somebody who knows the options that `gymtrl train sft` takes, and sets them.

    Args:
        model (`str`): Folder of the model.
        dataset (`str`): Dataset folder with token ids and labels.
        out (`str`): Where the trained model is left, merged.
        options (`str`): JSON: TRL's options as `train`, PEFT's as `lora`.
    """
    from datasets import load_dataset
    from peft import LoraConfig
    from trl import SFTConfig, SFTTrainer

    given = json.loads(options)
    rows = load_dataset(dataset, split="train").shuffle(seed=0).select_columns(["input_ids", "labels"])
    trainer = SFTTrainer(
        model,
        args=SFTConfig(output_dir=f"{out}/checkpoints", **given["train"]),
        train_dataset=rows,
        peft_config=LoraConfig(task_type="CAUSAL_LM", **given["lora"]),
    )
    trainer.train()
    trainer.save_model(f"{out}/adapter")
    trainer.model.merge_and_unload().save_pretrained(f"{out}/model")
    trainer.processing_class.save_pretrained(f"{out}/model")


def loss(model: str, adapter: str, dataset: str) -> None:
    """Prints the mean loss over the trained tokens of a dataset folder.

    Args:
        model (`str`): Folder of the model.
        adapter (`str`): Folder of an adapter of it, or an empty text.
        dataset (`str`): Dataset folder.
    """
    import torch
    from datasets import load_dataset
    from transformers import AutoModelForCausalLM

    made: Any = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    if adapter:
        from peft import PeftModel

        made = PeftModel.from_pretrained(made, adapter)
    made.eval()
    total, count = 0.0, 0
    for row in load_dataset(dataset, split="train").select_columns(["input_ids", "labels"]):
        ids, labels = torch.tensor([row["input_ids"]]), torch.tensor(row["labels"][1:])
        trained = labels != IGNORED
        with torch.inference_mode():
            logits = made(ids, logits_to_keep=trained.nonzero()[:, 0]).logits[0]
        total += float(torch.nn.functional.cross_entropy(logits, labels[trained], reduction="sum"))
        count += int(trained.sum())
    print("\n" + json.dumps({"loss": total / count, "tokens": count}))


def rows(model: str, chats: str) -> None:
    """Prints ids and labels of the rows of a folder of conversations, as `SFTTrainer` prepares them by default.

    Args:
        model (`str`): Folder whose tokenizer is used; the model that the trainer asks for is a tiny one.
        chats (`str`): Folder of conversations.
    """
    from datasets import load_dataset
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
    from trl import SFTConfig, SFTTrainer

    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 1}
    config = AutoConfig.from_pretrained(model, **sizes, num_key_value_heads=1)
    trainer = SFTTrainer(
        model=AutoModelForCausalLM.from_config(config),
        args=SFTConfig(output_dir=f"{chats}/none", use_cpu=True, bf16=False, report_to="none"),
        train_dataset=load_dataset(chats, split="train"),
        processing_class=AutoTokenizer.from_pretrained(model),
    )
    made = trainer.train_dataset
    print("\n" + json.dumps([[row["input_ids"], row["labels"]] for row in made]))


if __name__ == "__main__":
    {"plain": plain, "loss": loss, "rows": rows}[sys.argv[1]](*sys.argv[2:])
