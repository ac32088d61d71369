"""Rollouts become what GRPO trains on: prompts to roll out again, or the recorded groups themselves.

Run as: gymtrl format grpo FILTERED -o DATASET --model MODEL [--kind groups]
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

from gymtrl.formats.chats import to_chat
from gymtrl.formats.checks import Refusal, Tokenized
from gymtrl.formats.choosing import Account, chosen_from, fitting, identity_of
from gymtrl.formats.dataset import as_view, dumped, record_of
from gymtrl.formats.example import Example, whole
from gymtrl.formats.folder import DatasetDraft, FormatResult, dataset_folder
from gymtrl.formats.masks import loss_mask, tokenize_all, tokenize_prompt
from gymtrl.formats.settings import FormatGrpoSettings
from gymtrl.formats.sft import messages
from gymtrl.formats.source import longest_row
from gymtrl.formats.templates import ModelTemplate, model_template
from gymtrl.models.fingerprint import load_tokenizer
from gymtrl.selection.lines import read_rollout
from gymtrl.selection.pool import Candidate
from gymtrl.selection.prompts import Prompt, choose_prompts
from gymtrl.selection.rollout_groups import choose_groups


def format_grpo(
    source: Path, out: Path, settings: FormatGrpoSettings, *, on_row: Callable[[], object] | None = None
) -> FormatResult:
    """Writes a GRPO dataset of `source` for one model.

    Args:
        source (`Path`): A filter folder, or a rollout file, a folder of them or a rollout table.
        out (`Path`): Dataset folder to write.
        settings (`FormatGrpoSettings`): Model, and whether prompts or groups.
        on_row (`Callable`, *optional*): Called without arguments after each prompt or group; for a progress display.

    Returns:
        `FormatResult`: Lines read = written + dropped.

    Raises:
        UserError: The source or the model is missing, or nothing is left.
        RunError: The disk is full or not writable.
    """
    template = model_template(load_tokenizer(settings.model, trust_remote_code=settings.trust_remote_code))
    if settings.kind == "prompts":
        return _format_prompts(source, out, settings, template, on_row)
    return _format_groups(source, out, settings, template, on_row)


def _format_prompts(
    source: Path,
    out: Path,
    settings: FormatGrpoSettings,
    template: ModelTemplate,
    on_row: Callable[[], object] | None,
) -> FormatResult:
    limit = longest_row(settings)
    with dataset_folder(source, out, "format grpo", "grpo_prompts", settings, template) as draft:
        pool, choice = chosen_from(
            source,
            settings.reward_threshold,
            lambda pool: choose_prompts(
                pool, pass_rate=settings.pass_rate, zero_share=settings.zero_share, seed=settings.seed
            ),
        )
        account = Account(draft, choice.unused)
        for prompt in choice.prompts:
            example = whole(read_rollout(prompt.candidate.origin))
            ids = tokenize_prompt(example, template, reasoning=settings.reasoning)
            if isinstance(ids, list) and limit is not None and len(ids) >= limit:
                ids = Refusal("too_long", f"{len(ids)} tokens in the prompt, {limit} fit with the answer")
            if isinstance(ids, Refusal):
                account.refuse(prompt.candidate, ids)
            else:
                account.use(prompt.candidate)
                _write_prompt(draft, prompt, example, ids)
            if on_row is not None:
                on_row()
        account.close()
        draft.facts |= {"kind": "prompts", "threshold": pool.threshold, "threshold_why": pool.threshold_why}
    assert draft.result is not None
    return draft.result


def _write_prompt(draft: DatasetDraft, prompt: Prompt, example: Example, ids: list[int]) -> None:
    candidate = prompt.candidate
    parts = {"prompt": dumped(to_chat(example.prompt)), "tools": dumped(list(example.tools))}
    draft.write(
        candidate.side,
        {
            **asdict(identity_of(candidate)),
            "pass_rate": prompt.pass_rate,
            "rollouts": prompt.rollouts,
            "record_json": record_of(parts),
            **{name: as_view(items) for name, items in parts.items()},
            "prompt_ids": ids,
        },
        routes=[],
        lengths=[len(ids)],
        loss_tokens=0,
    )


def _format_groups(
    source: Path,
    out: Path,
    settings: FormatGrpoSettings,
    template: ModelTemplate,
    on_row: Callable[[], object] | None,
) -> FormatResult:
    limit = longest_row(settings)
    with dataset_folder(source, out, "format grpo", "grpo_groups", settings, template) as draft:
        _, choice = chosen_from(
            source,
            settings.reward_threshold,
            lambda pool: choose_groups(pool, settings.group_size, seed=settings.seed),
        )
        account = Account(draft, choice.unused)
        with_log_probs = 0
        for group in choice.groups:
            examples = [whole(read_rollout(candidate.origin)) for candidate in group]
            made = tokenize_all(
                examples,
                template,
                reasoning=settings.reasoning,
                recorded="auto" if settings.use_recorded_ids == "auto" else "never",
                # Without what was cut off, the mean of the group would be another.
                cut_ok=True,
            )
            made = [fitting(tokens, limit) for tokens in made]
            refused = next((tokens for tokens in made if isinstance(tokens, Refusal)), None)
            for candidate, example, tokens in zip(group, examples, made, strict=True):
                if isinstance(tokens, Refusal):
                    account.refuse(candidate, tokens)
                elif refused is not None:
                    # A group with a gap is none: its mean would be another.
                    detail = f"another rollout of its group: {refused.detail}"
                    account.refuse(candidate, Refusal(refused.reason, detail))
                else:
                    account.use(candidate)
                    with_log_probs += tokens.route == "recorded"
                    _write_rollout(draft, candidate, example, tokens)
            if on_row is not None:
                on_row()
        account.close()
        draft.facts |= {"kind": "groups", "group_size": choice.size, "with_log_probs": with_log_probs}
    assert draft.result is not None
    return draft.result


def _write_rollout(draft: DatasetDraft, candidate: Candidate, example: Example, tokens: Tokenized) -> None:
    prompt, mask = tokens.spans[0][0], loss_mask(tokens)
    log_probs = _log_probs(example, tokens) if tokens.route == "recorded" else None
    draft.write(
        candidate.side,
        {
            **asdict(identity_of(candidate)),
            "group": candidate.group,
            "reward": candidate.reward,
            "route": tokens.route,
            "flags": list(tokens.flags),
            **messages(example),
            "prompt_ids": tokens.input_ids[:prompt],
            "completion_ids": tokens.input_ids[prompt:],
            "completion_mask": mask[prompt:],
            "log_probs": log_probs[prompt:] if log_probs is not None else None,
        },
        routes=[tokens.route],
        lengths=[len(tokens.input_ids)],
        loss_tokens=sum(mask),
    )


def _log_probs(example: Example, tokens: Tokenized) -> list[float]:
    """Recorded log-probabilities, 0 where nothing was generated."""
    found = [0.0] * len(tokens.input_ids)
    for (start, end), call in zip(tokens.spans, example.recorded, strict=True):
        found[start:end] = call.generation_log_probs
    return found
