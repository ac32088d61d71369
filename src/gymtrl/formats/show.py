"""Shows a person which tokens of a dataset carry loss."""

from __future__ import annotations

from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING

import pyarrow.parquet as pq
from rich.console import Console
from rich.text import Text

from gymtrl.errors import UserError
from gymtrl.formats.checks import IGNORED
from gymtrl.text import plain

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TRAINED, CONTEXT = "bold black on green", "dim"


def show(dataset: Path, tokenizer: PreTrainedTokenizerBase, n: int, console: Console) -> None:
    """Prints the first `n` training rows with the tokens that carry loss painted.

    Args:
        dataset (`Path`): Dataset folder.
        tokenizer (`PreTrainedTokenizerBase`): The one that it was made for.
        n (`int`): Rows to print.
        console (`rich.console.Console`): Where to print; without colours the trained parts stand in ⟦ ⟧.

    Raises:
        UserError: The folder holds no training rows.
    """
    files = sorted((dataset / "data").glob("train-*.parquet"))
    if not files:
        raise UserError(f"{dataset} holds no training rows", remedy="give the folder that 'gymtrl format sft' wrote")
    left = n
    for file in files:
        columns = ["row_id", "file", "line", "route", "input_ids", "labels"]
        for batch in pq.ParquetFile(file).iter_batches(batch_size=max(1, min(left, 64)), columns=columns):
            for row in batch.to_pylist()[:left]:
                trained = sum(label != IGNORED for label in row["labels"])
                counted = f"{len(row['labels'])} tokens, {trained} with loss ({row['route']})"
                console.rule(Text(plain(f"{row['file']}:{row['line']}  {counted}")))
                colourless = console.color_system is None
                console.print(painted(row["input_ids"], row["labels"], tokenizer, brackets=colourless))
                left -= 1
            if left <= 0:
                return


def painted(ids: list[int], labels: list[int], tokenizer: PreTrainedTokenizerBase, *, brackets: bool = False) -> Text:
    """Decodes a row with its trained parts painted, or put into brackets where there is no colour."""
    text = Text()
    pairs = zip(ids, labels, strict=True)
    for trained, run in groupby(pairs, key=lambda pair: pair[1] != IGNORED):
        part = plain(tokenizer.decode([token for token, _ in run], clean_up_tokenization_spaces=False))
        text.append(f"⟦{part}⟧" if trained and brackets else part, style=TRAINED if trained else CONTEXT)
    return text
