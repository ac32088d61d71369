"""Rollouts become good and bad examples, each for itself: a KTO dataset.

Run as: gymtrl format kto FILTERED -o DATASET --model MODEL
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

from gymtrl.formats.checks import Refusal, Tokenized
from gymtrl.formats.choosing import Account, batches, chosen_from, fitting, identity_of
from gymtrl.formats.example import Example, whole
from gymtrl.formats.folder import DatasetDraft, FormatResult, dataset_folder, nothing_left
from gymtrl.formats.masks import loss_mask, tokenize_all
from gymtrl.formats.settings import FormatKtoSettings
from gymtrl.formats.sft import messages
from gymtrl.formats.source import longest_row
from gymtrl.formats.templates import model_template
from gymtrl.models.fingerprint import load_tokenizer
from gymtrl.selection.lines import read_rollout
from gymtrl.selection.pool import Candidate
from gymtrl.selection.unpaired import choose_unpaired, kto_weights

_BATCH = 64
"""Rollouts whose texts are tokenized together."""


def format_kto(
    source: Path, out: Path, settings: FormatKtoSettings, *, on_row: Callable[[], object] | None = None
) -> FormatResult:
    """Writes the KTO dataset of `source` for one model; its rows are shuffled, good and bad mixed.

    Args:
        source (`Path`): A filter folder, whose kept rollouts are good and those below the threshold bad; or a rollout
            file, a folder of them or a rollout table.
        out (`Path`): Dataset folder to write.
        settings (`FormatKtoSettings`): Model, and how many rollouts of a task.
        on_row (`Callable`, *optional*): Called without arguments after each rollout; for a progress display.

    Returns:
        `FormatResult`: Lines read = written + dropped; `facts` holds `desirable_weight` and `undesirable_weight`.

    Raises:
        UserError: The source or the model is missing, it is not known what is good, or there are not both kinds.
        RunError: The disk is full or not writable.
    """
    template = model_template(load_tokenizer(settings.model, trust_remote_code=settings.trust_remote_code))
    limit = longest_row(settings)
    with dataset_folder(source, out, "format kto", "kto", settings, template) as draft:
        pool, choice = chosen_from(
            source,
            settings.reward_threshold,
            lambda pool: choose_unpaired(pool, cap_per_task=settings.cap_per_task, seed=settings.seed),
        )
        chosen = Counter(label for candidate, label in choice.labelled if candidate.side == "train")
        if chosen:
            kto_weights(chosen[True], chosen[False])  # before the work, where one kind is lacking
        account = Account(draft, choice.unused)
        written: Counter[bool] = Counter()
        for labelled in batches(choice.labelled, _BATCH):
            examples = [whole(read_rollout(candidate.origin)) for candidate, _ in labelled]
            made = tokenize_all(
                examples,
                template,
                reasoning=settings.reasoning,
                recorded="auto" if settings.use_recorded_ids == "auto" else "never",
            )
            for (candidate, label), example, found in zip(labelled, examples, made, strict=True):
                tokens = fitting(found, limit)
                if isinstance(tokens, Refusal):
                    account.refuse(candidate, tokens)
                else:
                    account.use(candidate)
                    written[label] += candidate.side == "train"
                    _write(draft, candidate, label, example, tokens)
                if on_row is not None:
                    on_row()
        account.close()
        for label, kind in ((True, "good"), (False, "bad")):
            if not written[label]:
                raise nothing_left(source, draft.close(out), kind)
        desirable, undesirable = kto_weights(written[True], written[False])
        draft.facts |= {
            "threshold": pool.threshold,
            "threshold_why": pool.threshold_why,
            "good": written[True],
            "bad": written[False],
            "desirable_weight": desirable,
            "undesirable_weight": undesirable,
        }
    assert draft.result is not None
    return draft.result


def _write(draft: DatasetDraft, candidate: Candidate, label: bool, example: Example, tokens: Tokenized) -> None:
    prompt, mask = tokens.spans[0][0], loss_mask(tokens)
    draft.write(
        candidate.side,
        {
            **asdict(identity_of(candidate)),
            "reward": candidate.reward,
            "label": label,
            "route": tokens.route,
            "flags": list(tokens.flags),
            **messages(example),
            "prompt_ids": tokens.input_ids[:prompt],
            "completion_ids": tokens.input_ids[prompt:],
            "completion_mask": mask[prompt:],
        },
        routes=[tokens.route],
        lengths=[len(tokens.input_ids)],
        loss_tokens=sum(mask),
    )
