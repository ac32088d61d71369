"""DPO on rows that are tokenized and masked: TRL's trainer, in which only marked tokens count.

TRL's own trainer renders the messages again and scores all that follows the prompt, results of tools included.
"""

from __future__ import annotations

from typing import Any

from datasets import Dataset
from trl import DPOConfig, DPOTrainer
from trl.trainer.dpo_trainer import DataCollatorForPreference

from gymtrl.errors import UserError
from gymtrl.training.tokens import padded, token_columns

_SIDES = ("chosen", "rejected")
_MASKS = ("chosen_mask", "rejected_mask")


class TokenPreferenceCollator(DataCollatorForPreference):  # type: ignore[misc]  # untyped base
    """TRL's batch of pairs, chosen sides first, with the rows' own masks as its `completion_mask`."""

    def torch_call(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        batch: dict[str, Any] = super().torch_call(examples)
        masks = ([0] * len(row["prompt_ids"]) + row[f"{side}_mask"] for side in _SIDES for row in examples)
        batch["completion_mask"] = padded(masks, batch["input_ids"])
        return batch


class TokenDPOTrainer(DPOTrainer):  # type: ignore[misc]  # untyped base
    """TRL's `DPOTrainer` for the rows of a DPO dataset folder, used as they are.

    Policy and reference are scored on the tokens that `chosen_mask` and `rejected_mask` mark, and on no others. All
    else is TRL's: arguments, losses, metrics, reference model, PEFT, evaluation and resuming.

    The rows need `prompt_ids`, `chosen_ids`, `chosen_mask`, `rejected_ids` and `rejected_mask`. Arguments are those of
    `DPOTrainer`, without `data_collator`. Nothing is cut: with `max_length`, 1024 by TRL's default, a longer row is an
    error.

    Raises:
        UserError: Rows that cannot be trained on as they are, or a `data_collator`.
    """

    _signature_columns: list[str]

    # TRL makes the collator while it is constructed and may use it there, for reference log-probabilities. Taking its
    # place at the moment it is set keeps TRL's choice of padding.
    @property
    def data_collator(self) -> TokenPreferenceCollator:
        return self._token_collator

    @data_collator.setter
    def data_collator(self, collator: Any) -> None:
        if type(collator) is not DataCollatorForPreference:
            raise UserError("TokenDPOTrainer makes its batches itself", remedy="leave out data_collator")
        self._token_collator = TokenPreferenceCollator(
            pad_token_id=collator.pad_token_id, pad_to_multiple_of=collator.pad_to_multiple_of
        )

    def _prepare_dataset(self, dataset: Dataset, processing_class: Any, args: DPOConfig, dataset_name: str) -> Dataset:
        return token_columns(dataset, dataset_name, _SIDES, (), args.max_length)

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()
        self._signature_columns += [name for name in _MASKS if name not in self._signature_columns]
