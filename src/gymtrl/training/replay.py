"""GRPO on recorded groups: TRL's trainer, in which nothing is generated and no reward is computed. Experimental.

What was sampled before training is off-policy after the first step. Three things answer for that: importance ratios
against the recorded log-probabilities, a baseline below the mean, and a stop once the policy has moved too far.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor
from torch.utils.data import DataLoader, Sampler
from trl import GRPOConfig, GRPOTrainer

from gymtrl.errors import UserError
from gymtrl.training.groups import COLUMNS, GroupCollator, GroupRows, group_rows, with_blank

POLICY_TOLERANCE = 0.1
"""Largest mean difference of recorded and own log-probabilities, in nats a token, that passes for the same policy."""

_CHECKED_ROWS = 8
_BY_ROW = ("grpo", "sapo", "dr_grpo", "luspo")
_LOSSES = ("topr", *_BY_ROW, "dapo", "cispo", "vespo")
_NOT_IN_TOPR = {
    "top_entropy_quantile": 1.0,
    "off_policy_mask_threshold": None,
    "entropy_coef": 0.0,
    "use_adaptive_entropy": False,
}

_log = logging.getLogger(__name__)


@dataclass
class RecordedGroupConfig(GRPOConfig):  # type: ignore[misc]  # untyped base
    """TRL's `GRPOConfig` with defaults for recorded groups. What concerns generation and rewards has no effect.

    `temperature` must be what the rollouts were sampled with. `loss_type` is `topr` (arXiv:2503.14286) or one of TRL's:
    `grpo`, `dapo`, `dr_grpo`, `cispo`, `sapo`, `vespo`, `luspo`. `scale_rewards` is `none` or `group`.

    Args:
        baseline_shift (`float`, *optional*, defaults to -0.1): Added to a group's mean reward to make its baseline, so
            that an advantage is reward - mean - shift. Training on another policy's samples improves while the baseline
            lies below the mean, and collapses at or above it (arXiv:2506.20520).
        stop_ratio (`float`, *optional*, defaults to 0.1): Training stops when the mean of min(π/μ, 1) over whole
            rollouts with a negative advantage falls below it.
        stop_kl (`float`, *optional*, defaults to 0.5): Training stops when `kl` passes it.
    """

    loss_type: str = "topr"
    scale_rewards: str | bool = "none"
    learning_rate: float = 5e-7
    num_train_epochs: float = 1
    baseline_shift: float = field(default=-0.1, metadata={"help": "Added to a group's mean to make its baseline."})
    stop_ratio: float | None = field(default=0.1, metadata={"help": "Stop below this mean ratio on negatives."})
    stop_kl: float | None = field(default=0.5, metadata={"help": "Stop above this divergence, in nats a token."})

    def __post_init__(self) -> None:
        # Nothing is generated. These pass TRL's checks with any batch size, and mean nothing else.
        self.num_generations, self.num_generations_eval = 2, 1
        self.steps_per_generation, self.generation_batch_size = 2 * self.gradient_accumulation_steps, None
        super().__post_init__()
        if self.loss_type not in _LOSSES:
            raise UserError(
                f"loss_type={self.loss_type!r} is not among {', '.join(_LOSSES)}",
                remedy="choose one; what bnpo is for one batch, dapo is for the whole optimizer step",
            )
        if self.scale_rewards not in ("none", "group"):
            raise UserError(
                f"scale_rewards={self.scale_rewards!r}: advantages do not depend on batches here",
                remedy="set it to 'none' or 'group'",
            )
        if self.beta or self.use_vllm:
            raise UserError(
                "recorded groups are trained on without a reference model and without vLLM",
                remedy="leave out beta and use_vllm",
            )
        unused = [name for name, value in _NOT_IN_TOPR.items() if getattr(self, name) != value]
        if self.loss_type == "topr" and unused:
            raise UserError(
                f"{unused[0]} has no part in loss_type='topr'", remedy="leave it out, or take loss_type='dapo'"
            )


class RecordedGroupTrainer(GRPOTrainer):  # type: ignore[misc]  # untyped base
    """TRL's `GRPOTrainer` for the rows of a dataset of recorded groups, used as they are. Experimental.

    Each row is a rollout. Its advantage comes from all rewards of its group in the dataset, its importance ratio from
    the recorded log-probabilities. Rows without a reward and groups without variance are left out. Losses are divided
    by the loss tokens (or rows, where TRL's loss goes by row) of the whole optimizer step, and the order of rows
    depends on the seed alone, so that micro-batches, accumulation and processes change no step.

    With `topr` a rollout with a positive advantage has weight 1, and one with a negative advantage the constant
    min(π/μ, 1) of all its loss tokens together. The load-balancing loss of mixtures of experts has no part in it.

    Beside what TRL logs, each step logs `kl` (half the mean square of log π − log μ over the loss tokens: to second
    order the divergence in either direction, and not ruled by a few unlikely tokens as unbiased estimators are),
    `ratio/negatives` (the mean that `stop_ratio` is compared with), `frac_reward_zero_std` (groups left out for want of
    variance) and, with `topr`, `clip_ratio/region_mean` (negatives whose ratio was above 1). `kl` and the ratio are
    those of the batch before its update.

    Args:
        model (`str` or `PreTrainedModel`): The model that the rollouts were collected with.
        args (`RecordedGroupConfig`): Settings.
        train_dataset (`Dataset`): Rows with `prompt_ids`, `completion_ids`, `completion_mask`, `log_probs`, `reward`
            and `group`.
        eval_dataset (`Dataset` or `dict[str, Dataset]`, *optional*): Such rows.
        **options: Those of `GRPOTrainer` that do not concern generation: `processing_class`, `callbacks`, `optimizers`,
            `peft_config`, `quantization_config`.

    Raises:
        UserError: Rows that cannot be trained on as they are; in the first step, log-probabilities of another policy.

    Attributes:
        train_groups (`GroupRows`): The rows that are trained on, and counts of what was left out.
        stop_reason (`str`, *optional*): Why training stopped before its end.
    """

    def __init__(
        self,
        model: Any,
        args: RecordedGroupConfig,
        train_dataset: Dataset,
        eval_dataset: Dataset | dict[str, Dataset] | None = None,
        **options: Any,
    ) -> None:
        if not isinstance(args, RecordedGroupConfig):
            raise UserError("args is no RecordedGroupConfig", remedy="take RecordedGroupConfig instead of GRPOConfig")

        def prepared(dataset: Dataset, split: str) -> GroupRows:
            return group_rows(dataset, split, baseline_shift=args.baseline_shift, scale_rewards=str(args.scale_rewards))

        self.train_groups = prepared(train_dataset, "train")
        rows = self.train_groups.rows
        if isinstance(eval_dataset, dict):
            eval_dataset = {name: prepared(split, name).rows for name, split in eval_dataset.items()}
        elif eval_dataset is not None:
            eval_dataset = prepared(eval_dataset, "validation").rows
        self.stop_reason: str | None = None
        self._policy_known = False
        self._sums: Tensor | None = None
        super().__init__(
            model=model,
            reward_funcs=_no_reward,
            args=args,
            train_dataset=with_blank(rows) if args.world_size > 1 else rows,
            eval_dataset=eval_dataset,
            **options,
        )
        self.data_collator = GroupCollator(
            self._tokenizer.pad_token_id, args.pad_to_multiple_of, self.accelerator.num_processes
        )

    # What follows takes the place of TRL's generation: rows come one by one, as in any other trainer.

    def _set_signature_columns_if_needed(self) -> None:
        self._signature_columns = COLUMNS

    def get_train_dataloader(self) -> DataLoader[Any]:
        return super(GRPOTrainer, self).get_train_dataloader()

    def get_eval_dataloader(self, eval_dataset: Any = None) -> DataLoader[Any]:
        return super(GRPOTrainer, self).get_eval_dataloader(eval_dataset)

    def _get_eval_sampler(self, eval_dataset: Any) -> Any:
        return super(GRPOTrainer, self)._get_eval_sampler(eval_dataset)

    def _get_train_sampler(self, dataset: Any = None) -> Any:
        strategy = self.args.train_sampling_strategy
        if strategy not in ("random", "sequential"):
            return super(GRPOTrainer, self)._get_train_sampler(dataset)
        seed = self.args.seed if self.args.data_seed is None else self.args.data_seed
        # Processes must take equally many batches.
        whole = self._train_batch_size * self.accelerator.num_processes if self.accelerator.num_processes > 1 else 1
        return _Order(len(self.train_groups.rows), whole, seed if strategy == "random" else None)

    def _prepare_inputs(self, inputs: Any) -> Any:
        return super(GRPOTrainer, self)._prepare_inputs(inputs)

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: torch.device) -> tuple[list[Any], Any]:
        batches, items = super().get_batch_samples(epoch_iterator, num_batches, device)
        if not batches:
            return batches, items
        masks = [batch["tool_mask"] for batch in batches]
        counts = [sum(int(mask.sum()) for mask in masks), sum(int(mask.any(1).sum()) for mask in masks)]
        tokens, rows = self.accelerator.reduce(torch.tensor(counts, device=device), reduction="sum").tolist()
        # TRL takes the first for tokens of as many steps as a generation has, and scales it back.
        span = self.args.steps_per_generation / len(batches)
        for batch in batches:
            batch["num_items_in_batch"] = torch.tensor(tokens * span)
            batch["rows_in_step"] = torch.tensor(float(rows))
        return batches, items

    def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> Tensor:
        if self.state.global_step == 0 and not self._policy_known:
            self._check_policy(model)
            self._policy_known = True
        loss: Tensor = super().training_step(model, inputs, num_items_in_batch)
        return loss

    def _get_per_token_logps_and_entropies(self, *args: Any, **options: Any) -> tuple[Tensor, Any, Any]:
        found: tuple[Tensor, Any, Any] = super()._get_per_token_logps_and_entropies(*args, **options)
        self._log_probs, self._entropies = found[0].detach(), found[1]
        return found

    def _compute_loss(self, model: Any, inputs: dict[str, Tensor]) -> Tensor:
        loss: Tensor = self._topr(model, inputs) if self.loss_type == "topr" else super()._compute_loss(model, inputs)
        if self.model.training:
            if self.loss_type in _BY_ROW:
                # TRL takes the mean of each batch and then of all; batches may hold different numbers of rows.
                batches = self.current_gradient_accumulation_steps * self.accelerator.num_processes
                loss = loss * len(inputs["advantages"]) * batches / inputs["rows_in_step"]
            self._watch(inputs)
        return loss

    def _topr(self, model: Any, inputs: dict[str, Tensor]) -> Tensor:
        advantages, mask = inputs["advantages"], inputs["tool_mask"]
        log_probs = self._score(model, inputs)
        log_ratio = ((log_probs.detach() - inputs["old_per_token_logps"]) * mask).sum(-1)
        weights = torch.where(advantages < 0, log_ratio.clamp(max=0).exp(), 1.0) * advantages
        tokens = inputs["num_items_in_batch"]
        if self.model.training:
            tokens = tokens * self.current_gradient_accumulation_steps / self.args.steps_per_generation
        tokens = tokens.clamp(min=1.0) / self.accelerator.num_processes
        return -(weights * (log_probs * mask).sum(-1)).sum() / tokens

    def _score(self, model: Any, inputs: dict[str, Tensor]) -> Tensor:
        log_probs, _, _ = self._get_per_token_logps_and_entropies(
            model,
            torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], dim=1),
            torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], dim=1),
            inputs["completion_ids"].size(1),
            compute_entropy=True,
        )
        return log_probs

    def _watch(self, inputs: dict[str, Tensor]) -> None:
        """Adds up how far the policy has moved; logs it and stops if need be when the optimizer step is complete."""
        mask, negative = inputs["tool_mask"], inputs["advantages"] < 0
        log_ratio = (self._log_probs - inputs["old_per_token_logps"]) * mask
        of_rollouts = log_ratio.sum(-1)[negative]
        sums = [
            (log_ratio**2 / 2).sum(),
            (self._entropies.detach() * mask).sum(),
            mask.sum(),
            of_rollouts.clamp(max=0).exp().sum(),
            (of_rollouts > 0).sum(),
            negative.sum(),
            inputs["prompt_mask"].sum() + inputs["completion_mask"].sum(),
        ]
        found = torch.stack([value.float() for value in sums])
        self._sums = found if self._sums is None else self._sums + found
        if not self.accelerator.sync_gradients:
            return
        total = self.accelerator.reduce(self._sums, reduction="sum").tolist()
        squares, entropy, tokens, ratios, clipped, negatives, computed = total
        self._sums = None
        metrics, groups = self._metrics["train"], self.train_groups
        kl = squares / max(tokens, 1)
        metrics["kl"].append(kl)
        self.state.num_input_tokens_seen += round(computed)
        metrics["num_tokens"] = [self.state.num_input_tokens_seen]
        metrics["frac_reward_zero_std"].append(groups.without_variance / groups.groups)
        if negatives:
            metrics["ratio/negatives"].append(ratios / negatives)
        if self.loss_type == "topr":  # with its own losses, TRL logs these
            metrics["entropy"].append(entropy / max(tokens, 1))
            metrics["clip_ratio/region_mean"].append(clipped / max(negatives, 1))
        stop_ratio, stop_kl = self.args.stop_ratio, self.args.stop_kl
        if stop_ratio is not None and negatives and ratios / negatives < stop_ratio:
            self._stop(f"the mean ratio on negatives is {ratios / negatives:.3g}, below stop_ratio={stop_ratio}")
        elif stop_kl is not None and kl > stop_kl:
            self._stop(f"the policy is {kl:.3g} nats a token from the recorded one, more than stop_kl={stop_kl}")

    def _stop(self, reason: str) -> None:
        self.stop_reason = reason
        self.control.should_training_stop = self.control.should_log = True
        _log.warning("training stops after step %s: %s", self.state.global_step + 1, reason)

    def _check_policy(self, model: Any) -> None:
        rows = self.train_groups.rows
        model.eval()
        difference = tokens = 0.0
        for at in sorted({len(rows) * place // _CHECKED_ROWS for place in range(_CHECKED_ROWS)}):
            batch = self._prepare_inputs(self.data_collator([rows[at]]))
            with torch.no_grad():
                log_probs = self._score(model, batch)
            difference += ((log_probs - batch["old_per_token_logps"]).abs() * batch["tool_mask"]).sum().item()
            tokens += batch["tool_mask"].sum().item()
        mean = difference / tokens
        if not mean <= POLICY_TOLERANCE:
            raise UserError(
                f"the recorded log-probabilities are not those of this model at temperature {self.temperature}: over "
                f"{tokens:.0f} tokens they differ by {mean:.3g} on average, more than {POLICY_TOLERANCE}",
                remedy="train the model that collected the rollouts, with the temperature that they were sampled with. "
                "Where the engine recorded log-probabilities before applying the temperature, leave them out and have "
                "them filled in by gymtrl.recompute_log_probs(model, dataset, temperature=...)",
            )


class _Order(Sampler):  # type: ignore[misc]  # untyped base
    """Rows in an order that depends on seed and epoch alone, with blank rows at the end for equally many batches.

    Args:
        rows (`int`): Rows; the blank one stands behind them.
        whole (`int`): The number of rows is brought to a multiple of this.
        seed (`int`, *optional*): Of the shuffling; `None` keeps the rows' own order.
    """

    def __init__(self, rows: int, whole: int, seed: int | None) -> None:
        self._rows = rows
        self._blanks = -rows % whole
        self._seed = seed
        self._epoch = 0

    def set_epoch(self, epoch: int) -> None:
        self._epoch = epoch

    def __len__(self) -> int:
        return self._rows + self._blanks

    def __iter__(self) -> Iterator[int]:
        if self._seed is None:
            yield from range(self._rows)
        else:
            generator = torch.Generator().manual_seed(self._seed + self._epoch)
            yield from torch.randperm(self._rows, generator=generator).tolist()
        yield from [self._rows] * self._blanks


def _no_reward(**columns: Any) -> list[float]:
    raise AssertionError("rewards are recorded")
