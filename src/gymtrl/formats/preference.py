"""Rollouts become pairs: a DPO dataset, or one for a reward model.

Run as: gymtrl format dpo FILTERED -o DATASET --model MODEL
        gymtrl format reward FILTERED -o DATASET --model MODEL
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import Any

from gymtrl.formats.chats import to_chat
from gymtrl.formats.checks import Refusal, Tokenized
from gymtrl.formats.choosing import Account, batches, chosen_from, fitting
from gymtrl.formats.dataset import as_view, dumped, record_of
from gymtrl.formats.example import Example, whole
from gymtrl.formats.folder import DatasetDraft, FormatResult, dataset_folder
from gymtrl.formats.masks import Recorded, loss_mask, tokenize_all
from gymtrl.formats.plain import is_plain
from gymtrl.formats.settings import FormatDpoSettings, FormatRewardSettings, PairKind, PairSettings
from gymtrl.formats.source import longest_row
from gymtrl.formats.templates import ModelTemplate, model_template
from gymtrl.models.fingerprint import load_tokenizer
from gymtrl.selection.divergence import first_divergence
from gymtrl.selection.lines import read_rollout
from gymtrl.selection.pairs import Pair, PairRules, choose_pairs

_BATCH = 32
"""Pairs whose texts are tokenized together."""

_NO_PAIR = {
    "same_completion": "both did the same",
    "diverges_in_environment": "both did the same up to where a tool or a user made the difference",
    "prompt_differs": "the two were not asked the same",
}


@dataclass(frozen=True)
class _Sides:
    """The two sides of a pair, from the same prompt."""

    chosen: Example
    rejected: Example
    depth: int


@dataclass(frozen=True)
class _Made:
    """A pair with its tokens; the first `prompt` of them are the same on both sides.

    `plain` says that TRL makes the same tokens of the messages.
    """

    sides: _Sides
    chosen: Tokenized
    rejected: Tokenized
    prompt: int
    plain: bool


def format_dpo(
    source: Path, out: Path, settings: FormatDpoSettings, *, on_row: Callable[[], object] | None = None
) -> FormatResult:
    """Writes the DPO dataset of `source` for one model.

    Args:
        source (`Path`): A filter folder, whose kept rollouts are good and those below the threshold bad; or a rollout
            file, a folder of them or a rollout table.
        out (`Path`): Dataset folder to write.
        settings (`FormatDpoSettings`): Model, which pairs, and what of them.
        on_row (`Callable`, *optional*): Called without arguments after each pair; for a progress display.

    Returns:
        `FormatResult`: Lines read = in a pair + dropped with a reason.

    Raises:
        UserError: The source or the model is missing, it is not known what is good, or no pair is left.
        RunError: The disk is full or not writable.
    """

    def put(draft: DatasetDraft, pair: Pair, made: _Made) -> None:
        _write(draft, pair, made, settings.kind, _dpo_tokens(made))

    return _format(source, out, "dpo", settings, settings.kind, put, on_row)


def format_reward(
    source: Path, out: Path, settings: FormatRewardSettings, *, on_row: Callable[[], object] | None = None
) -> FormatResult:
    """Writes a dataset of whole trajectories in pairs, for TRL's `RewardTrainer`; otherwise as `format_dpo`."""

    def put(draft: DatasetDraft, pair: Pair, made: _Made) -> None:
        tokens = {"chosen_ids": made.chosen.input_ids, "rejected_ids": made.rejected.input_ids}
        _write(draft, pair, made, "trajectory", tokens)

    return _format(source, out, "reward", settings, "trajectory", put, on_row)


def _format(
    source: Path,
    out: Path,
    objective: Any,
    settings: PairSettings,
    kind: PairKind,
    put: Callable[[DatasetDraft, Pair, _Made], None],
    on_row: Callable[[], object] | None,
) -> FormatResult:
    template = model_template(load_tokenizer(settings.model, trust_remote_code=settings.trust_remote_code))
    rules = PairRules(settings.strategy, settings.pairs_per_task, settings.margin, settings.seed)
    with dataset_folder(source, out, f"format {objective}", objective, settings, template) as draft:
        pool, choice = chosen_from(source, settings.reward_threshold, lambda pool: choose_pairs(pool, rules))
        account = Account(draft, choice.unused)
        plain = kind == "first_divergence"  # whole trajectories hold what TRL does not mask
        without = {pair.task for pair in choice.pairs}
        # Whether a pair can be used shows in its texts: tasks that have none by then try their next best.
        for pairs in chain([choice.pairs], choice.others(without)):
            for pair, made in _made(pairs, template, settings, kind):
                if isinstance(made, Refusal):
                    account.refuse(pair.chosen, made)
                    account.refuse(pair.rejected, made)
                else:
                    put(draft, pair, made)
                    plain = plain and made.plain
                    account.use(pair.chosen)
                    account.use(pair.rejected)
                    without.discard(pair.task)
                if on_row is not None:
                    on_row()
        account.close()
        draft.facts |= {
            "threshold": pool.threshold,
            "threshold_why": pool.threshold_why,
            "strategy": choice.strategy,
            "margin": choice.margin,
            "kind": kind,
            "plain_trl": plain,
        }
    assert draft.result is not None
    return draft.result


def _made(
    chosen: Sequence[Pair], template: ModelTemplate, settings: PairSettings, kind: PairKind
) -> Iterator[tuple[Pair, _Made | Refusal]]:
    limit = longest_row(settings)
    recorded: Recorded = "never" if settings.use_recorded_ids == "never" else "auto"
    for pairs in batches(chosen, _BATCH):
        sides = [_sides(pair, kind) for pair in pairs]
        ready = [pair for pair in sides if isinstance(pair, _Sides)]
        made = _tokenized(ready, template, settings, recorded)
        # Recorded ids of the two sides may show their common prompt differently; rendered, it is one.
        again = [i for i, entry in enumerate(made) if isinstance(entry, Refusal) and entry.reason == _DIFFERS]
        if recorded == "auto" and again:
            rendered = _tokenized([ready[i] for i in again], template, settings, "never")
            for i, entry in zip(again, rendered, strict=True):
                made[i] = _noted(entry)
        found = iter(made)
        for pair, given in zip(pairs, sides, strict=True):
            entry = given if isinstance(given, Refusal) else next(found)
            yield pair, _fitting(entry, limit)


def _noted(made: _Made | Refusal) -> _Made | Refusal:
    if isinstance(made, Refusal):
        return made
    flag = f"recorded_ids_unused:{_DIFFERS}"
    chosen, rejected = (replace(side, flags=(flag, *side.flags)) for side in (made.chosen, made.rejected))
    return replace(made, chosen=chosen, rejected=rejected)


def _sides(pair: Pair, kind: PairKind) -> _Sides | Refusal:
    chosen, rejected = read_rollout(pair.chosen.origin), read_rollout(pair.rejected.origin)
    depth = first_divergence(chosen, rejected)
    if isinstance(depth, str) and not (kind == "trajectory" and depth == "diverges_in_environment"):
        return Refusal(depth, _NO_PAIR[depth])
    if kind == "trajectory" or isinstance(depth, str):
        return _Sides(whole(chosen), whole(rejected), 0)
    return _Sides(whole(chosen).part(depth, depth + 1), whole(rejected).part(depth, depth + 1), depth)


_DIFFERS = "prompt_tokens_differ"


def _tokenized(
    sides: list[_Sides], template: ModelTemplate, settings: PairSettings, recorded: Recorded
) -> list[_Made | Refusal]:
    examples = [example for pair in sides for example in (pair.chosen, pair.rejected)]
    tokens = tokenize_all(examples, template, reasoning=settings.reasoning, recorded=recorded)
    return [
        _paired(pair, chosen, rejected, template)
        for pair, chosen, rejected in zip(sides, tokens[::2], tokens[1::2], strict=True)
    ]


def _paired(
    sides: _Sides, chosen: Tokenized | Refusal, rejected: Tokenized | Refusal, template: ModelTemplate
) -> _Made | Refusal:
    if isinstance(chosen, Refusal):
        return chosen
    if isinstance(rejected, Refusal):
        return rejected
    # Empty think tags stand in the prompt of a side that did not think; on the other side its thoughts begin there.
    prompt = min(chosen.spans[0][0], rejected.spans[0][0])
    if chosen.input_ids[:prompt] != rejected.input_ids[:prompt]:
        return Refusal(_DIFFERS, "the tokens of the common prompt differ between the two sides")
    if chosen.input_ids == rejected.input_ids:
        return Refusal("same_tokens", "the two sides have the same tokens")
    plain = is_plain(sides.chosen, chosen, template) and is_plain(sides.rejected, rejected, template)
    return _Made(sides, chosen, rejected, prompt, plain)


def _fitting(made: _Made | Refusal, limit: int | None) -> _Made | Refusal:
    if isinstance(made, Refusal):
        return made
    sides = (fitting(made.chosen, limit), fitting(made.rejected, limit))
    return next((side for side in sides if isinstance(side, Refusal)), made)


def _dpo_tokens(made: _Made) -> dict[str, list[int]]:
    return {
        "prompt_ids": made.chosen.input_ids[: made.prompt],
        "chosen_ids": made.chosen.input_ids[made.prompt :],
        "rejected_ids": made.rejected.input_ids[made.prompt :],
        "chosen_mask": loss_mask(made.chosen)[made.prompt :],
        "rejected_mask": loss_mask(made.rejected)[made.prompt :],
    }


def _write(draft: DatasetDraft, pair: Pair, made: _Made, kind: PairKind, tokens: dict[str, list[int]]) -> None:
    sides = made.sides
    parts = {
        "prompt": dumped(to_chat(sides.chosen.prompt)),
        "chosen": dumped(to_chat(sides.chosen.completion)),
        "rejected": dumped(to_chat(sides.rejected.completion)),
        "tools": dumped(list(sides.chosen.tools)),
    }
    flags = sorted({*made.chosen.flags, *made.rejected.flags})
    row = {
        "task_key": pair.chosen.task_key,
        "input_key": pair.chosen.input_key,
        "cluster_key": pair.chosen.cluster_key,
        **{
            f"{side}_{name}": getattr(candidate, name)
            for side, candidate in (("chosen", pair.chosen), ("rejected", pair.rejected))
            for name in ("row_id", "file", "line", "reward")
        },
        "kind": kind,
        "depth": sides.depth,
        "chosen_route": made.chosen.route,
        "rejected_route": made.rejected.route,
        "flags": flags,
        "record_json": record_of(parts),
        **{name: as_view(items) for name, items in parts.items()},
        **tokens,
    }
    sequences = (made.chosen, made.rejected)
    draft.write(
        pair.chosen.side,
        row,
        routes=[side.route for side in sequences],
        lengths=[len(side.input_ids) for side in sequences],
        loss_tokens=sum(sum(ids) for name, ids in tokens.items() if name.endswith("_mask")),
    )
