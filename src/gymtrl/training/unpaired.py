"""KTO on rows that are tokenized and masked: TRL's trainer, in which only marked tokens count.

TRL's own trainer renders the messages again and scores all that follows the prompt, results of tools included.
"""

from __future__ import annotations

import warnings
from typing import Any

import pyarrow as pa
from datasets import Dataset
from trl import KTOConfig, KTOTrainer
from trl.trainer.kto_trainer import DataCollatorForUnpairedPreference

from gymtrl.errors import UserError
from gymtrl.training.tokens import padded, token_columns

_ROTATED = ("completion_ids", "completion_mask")
_MASKS = ("completion_mask", "KL_completion_mask")


class TokenUnpairedCollator(DataCollatorForUnpairedPreference):  # type: ignore[misc]  # untyped base
    """TRL's batch, with the rows' own masks as its `completion_mask` and `KL_completion_mask`."""

    def torch_call(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        batch: dict[str, Any] = super().torch_call(examples)
        for kind in ("", "KL_"):
            if f"{kind}input_ids" in batch:
                masks = ([0] * len(row["prompt_ids"]) + row[f"{kind}completion_mask"] for row in examples)
                batch[f"{kind}completion_mask"] = padded(masks, batch[f"{kind}input_ids"])
        return batch


class TokenKTOTrainer(KTOTrainer):  # type: ignore[misc]  # untyped base
    """TRL's `KTOTrainer` for the rows of a KTO dataset folder, used as they are.

    Policy and reference are scored on the tokens that `completion_mask` marks, and on no others, also where a prompt
    is paired with another row's completion to estimate the KL term. All else is TRL's: arguments with their weights,
    losses, metrics, reference model, PEFT, evaluation and resuming.

    The rows need `prompt_ids`, `completion_ids`, `completion_mask` and `label`, good and bad ones mixed, because TRL
    takes them in their order. Arguments are those of `KTOTrainer`, without `data_collator`. Nothing is cut: with
    `max_length`, 1024 by TRL's default, a longer row is an error. A prompt with another row's completion may be longer.

    Raises:
        UserError: Rows that cannot be trained on as they are, or a `data_collator`.
    """

    _signature_columns: list[str]

    # As in `TokenDPOTrainer`: TRL makes the collator while it is constructed and may use it there.
    @property
    def data_collator(self) -> TokenUnpairedCollator:
        return self._token_collator

    @data_collator.setter
    def data_collator(self, collator: Any) -> None:
        if type(collator) is not DataCollatorForUnpairedPreference:
            raise UserError("TokenKTOTrainer makes its batches itself", remedy="leave out data_collator")
        self._token_collator = TokenUnpairedCollator(
            pad_token_id=collator.pad_token_id, pad_to_multiple_of=collator.pad_to_multiple_of
        )

    def _prepare_dataset(self, dataset: Dataset, processing_class: Any, args: KTOConfig, dataset_name: str) -> Dataset:
        rows = token_columns(dataset, dataset_name, ("completion",), ("label",), args.max_length)
        if dataset_name == "train":
            _warn_of_weights(sum(rows["label"]), len(rows), args)
        if not self.calculate_KL:
            return rows
        # In one process: each part that a worker takes would start batches of its own, not those that are trained on.
        with args.main_process_first():
            arrow = rows.with_format("arrow")
            return arrow.map(_rotate, batched=True, batch_size=args.per_device_train_batch_size).with_format(None)

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()
        self._signature_columns += [name for name in _MASKS if name not in self._signature_columns]


def _rotate(batch: pa.Table) -> pa.Table:
    """Gives each row of a batch the completion of the row before it, as TRL does, and its mask with it."""
    before = batch.take([len(batch) - 1, *range(len(batch) - 1)])
    for column in _ROTATED:
        batch = batch.append_column(f"KL_{column}", before.column(column))
    return batch


def _warn_of_weights(good: int, rows: int, args: KTOConfig) -> None:
    # Weighted good rows over weighted bad ones between 1 and 4/3: equation 8 of arXiv:2402.01306, which TRL checks too.
    bad = rows - good
    low, weighted = max(bad, 1) * args.undesirable_weight, max(good, 1) * args.desirable_weight
    if good != bad and not low <= weighted <= 4 / 3 * low:
        warnings.warn(
            f"{good} good and {bad} bad rows with desirable_weight={args.desirable_weight} and "
            f"undesirable_weight={args.undesirable_weight}: weight times rows should be 1 to 4/3 as much for the good",
            stacklevel=2,
        )
