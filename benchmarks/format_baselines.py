"""What `format.py` measures: ours, and scripts as people write them, from a file to tokens on disk.

Each function imports and prepares, and returns the part that is timed. The baselines use nothing of gymtrl.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gymtrl.formats.checks import Tokenized
    from gymtrl.formats.templates import ModelTemplate
    from gymtrl.rollouts.record import Rollout

Job = Callable[[], None]

BATCH = 256


def token_rows(rollouts: list[Rollout], template: ModelTemplate) -> list[Tokenized]:
    """The engine that makes the rows, and the one place that names it."""
    from gymtrl.formats.checks import Refusal
    from gymtrl.formats.rows import rows_of

    made = []
    for start in range(0, len(rollouts), 64):
        for rows in rows_of(rollouts[start : start + 64], template):
            if isinstance(rows, Refusal):
                raise ValueError(rows.detail)
            made += [row.tokens for row in rows]
    return made


def ours(model: str, rollouts: Path, out: Path) -> Job:
    """The whole stage. What it would import on its way is imported beforehand."""
    from datasets import Features  # noqa: F401
    from transformers import AutoConfig, AutoTokenizer  # noqa: F401
    from trl import chat_template_utils  # noqa: F401

    from gymtrl.formats.settings import FormatSftSettings
    from gymtrl.formats.sft import format_sft

    def job() -> None:
        format_sft(rollouts, out, FormatSftSettings(model=model))

    return job


def ours_engine(model: str, rollouts: Path, out: Path) -> tuple[Job, Job]:
    """The engine alone, and what writes its rows once the clock has stopped."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    from gymtrl.formats.templates import model_template
    from gymtrl.models.fingerprint import load_tokenizer
    from gymtrl.rollouts.reader import read_lines

    template = model_template(load_tokenizer(model))
    read = [line.rollout for line in read_lines([rollouts]) if line.rollout is not None]
    made: list[Tokenized] = []

    def job() -> None:
        made.extend(token_rows(read, template))

    def write() -> None:
        ids, labels = [row.input_ids for row in made], [row.labels for row in made]
        pq.write_table(pa.table({"input_ids": ids, "labels": labels}), out)

    return job, write


def bare(model: str, texts: Path, out: Path) -> Job:
    """The floor: texts that are rendered already go through the tokenizer in batches, and the ids into a file.

    There is no mask and no check.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    schema = pa.schema({"input_ids": pa.list_(pa.int32())})

    def job() -> None:
        rendered = [json.loads(line) for line in texts.read_text().splitlines()]
        with pq.ParquetWriter(out, schema, compression="zstd") as writer:
            for start in range(0, len(rendered), BATCH):
                batch = tokenizer(rendered[start : start + BATCH], add_special_tokens=False, verbose=False)
                writer.write_table(pa.table({"input_ids": batch["input_ids"]}, schema=schema))

    return job


def naive(model: str, chats: Path, out: Path) -> Job:
    """A `datasets.map` that finds each assistant turn by rendering and tokenizing what comes before it and up to it."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)

    def ids_of(messages: list[dict[str, Any]], tools: list[dict[str, Any]] | None, **options: Any) -> list[int]:
        found: list[int] = tokenizer.apply_chat_template(messages, tools=tools, return_dict=False, **options)
        return found

    def tokenize(row: dict[str, Any]) -> dict[str, list[int]]:
        messages, tools = row["prompt"] + row["completion"], row["tools"] or None
        input_ids = ids_of(messages, tools)
        labels = [-100] * len(input_ids)
        for i in range(len(row["prompt"]), len(messages)):
            if messages[i]["role"] == "assistant":
                start = len(ids_of(messages[:i], tools, add_generation_prompt=True))
                end = len(ids_of(messages[: i + 1], tools))
                labels[start:end] = input_ids[start:end]
        return {"input_ids": input_ids, "labels": labels}

    def job() -> None:
        rows = _loaded(chats)
        rows.map(tokenize, remove_columns=rows.column_names).to_parquet(out)

    return job


def trl(model: str, chats: Path, out: Path) -> Job:
    """TRL's own preparation: what `SFTTrainer` does to its dataset while it is made; nothing is trained.

    The model is a tiny one with random weights, made beforehand; the trainer needs one.
    """
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
    from trl import SFTConfig, SFTTrainer

    tokenizer = AutoTokenizer.from_pretrained(model)
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 1}
    config = AutoConfig.from_pretrained(model, **sizes, num_key_value_heads=1)
    tiny = AutoModelForCausalLM.from_config(config)
    arguments = SFTConfig(
        output_dir=str(out.with_suffix("")),
        assistant_only_loss=True,
        max_length=None,  # no row is cut
        use_cpu=True,
        bf16=False,
        report_to="none",
    )

    def job() -> None:
        trainer = SFTTrainer(model=tiny, args=arguments, train_dataset=_loaded(chats), processing_class=tokenizer)
        trainer.train_dataset.select_columns(["input_ids", "labels"]).to_parquet(out)

    return job


def _loaded(chats: Path) -> Any:
    # Typed, since otherwise every call would get the arguments of all others, with null.
    from datasets import Features, Json, List, load_dataset

    features = Features({name: List(Json()) for name in ("prompt", "completion", "tools")})
    return load_dataset("json", data_files=str(chats), split="train", features=features)
