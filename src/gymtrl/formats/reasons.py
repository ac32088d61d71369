"""Why a line of the source stands behind no row of a dataset, and what to do about it."""

from __future__ import annotations

from typing import NamedTuple

from gymtrl.selection.rules import DROP_SENTENCES


class Drop(NamedTuple):
    """A reason to drop a line.

    Attributes:
        meaning (`str`): What is the matter, in one sentence.
        remedy (`str`): What to do about it.
    """

    meaning: str
    remedy: str


_MORE_REPEATS = "Collect more repeats of each task."
_INSPECT = "Look at the line with 'gymtrl inspect --row FILE:LINE'."
NO_REMEDY = "None is needed."

ROW_DROPS: dict[str, Drop] = {
    "too_long": Drop(
        "The row has more tokens than --max-length, or than the model's context holds.",
        "Raise --max-length, or choose a model with a longer context.",
    ),
    "truncated": Drop(
        "The last turn was cut off by a limit; rendering it would teach an end that the policy did not choose.",
        "Collect again with a higher limit of output tokens.",
    ),
    "reasoning_lost": Drop(
        "The chat template leaves out the reasoning of a turn that would be trained.",
        "Choose a model whose chat template keeps reasoning, or pass --reasoning drop.",
    ),
    "text_lost": Drop(
        "A message, a call or the declaration of a tool is missing in what the template renders.",
        "Choose a model whose chat template can show it.",
    ),
    "character_lost": Drop(
        "The tokenizer has no tokens for some characters of the row.",
        "Choose a model whose vocabulary covers them.",
    ),
    "loss_text_differs": Drop(
        "The tokens that would be trained are not the words of the turn: some are missing, or there are others.",
        "Choose a model whose chat template writes messages unchanged, or let Gym record token ids.",
    ),
    "template_without_tools": Drop(
        "The row has tools, and the chat template cannot show them.",
        "Choose a model whose chat template knows tools.",
    ),
    "template_error": Drop(
        "The chat template refuses the row; its own words stand beside it.",
        "Choose a model whose chat template allows such conversations.",
    ),
    "template_not_prefix_preserving": Drop(
        "The template rewrites earlier turns, so that no rendering shows what the model saw turn by turn.",
        "Choose a model whose chat template TRL knows, or let Gym record token ids.",
    ),
    "turn_end_missing": Drop(
        "No token that ends a turn follows a turn of the policy.",
        "Mend the chat template: a model that is trained so never stops.",
    ),
    "turn_end_inside": Drop(
        "The token that ends a turn stands inside a turn, as text.",
        "Leave such rollouts out: the model would learn to stop there.",
    ),
    "mask_differs": Drop(
        "The labels do not cover exactly the turns of the policy.",
        "Pass --use-recorded-ids never. If it stays, it is a mistake of ours: report it with the line.",
    ),
    "images_in_text_model": Drop(
        "The row holds images, and the model reads text only; 'format sft' alone makes rows with images.",
        "Leave rows with images out, or choose a model that sees.",
    ),
    "image_not_embedded": Drop(
        "The row only names an image, and nothing is downloaded.",
        "Put the images into the rollouts, as data URIs in base64.",
    ),
    "image_unreadable": Drop(
        "An image is damaged, or neither PNG, JPEG, WebP nor GIF.", "Mend or convert the image, and collect again."
    ),
    "image_too_large": Drop("An image has more pixels than Pillow opens.", "Make it smaller, and collect again."),
    "image_refused": Drop(
        "The model's processor cannot take the images; its own words stand beside it.", "Choose a model that can."
    ),
    "images_lost": Drop(
        "The chat template does not show all images of the row.", "Choose a model whose chat template shows them."
    ),
    "image_token_in_text": Drop(
        "A message's text holds what the template writes for an image.", "Leave such rollouts out."
    ),
    "processor_tokens_differ": Drop(
        "The model's processor makes other tokens than were checked, where a turn begins or ends.",
        "Choose another model.",
    ),
    "no_prompt": Drop("Nothing stands before the first output of the policy.", _INSPECT),
}
"""No row can be made for this model."""

CHOICE_DROPS: dict[str, Drop] = {
    "no_good_rollout": Drop("No rollout of the task is good.", f"{_MORE_REPEATS} Or lower --reward-threshold."),
    "no_bad_rollout": Drop("All rollouts of the task are good.", f"{_MORE_REPEATS} Or choose harder tasks."),
    "no_threshold": Drop(
        "It is not known which reward is good: no threshold holds for the line's environment or agent.",
        "Pass --reward-threshold.",
    ),
    "both_good_and_bad": Drop(
        "The same completion of the task was good once and bad once.", "Look whether the verifier can be trusted."
    ),
    "duplicate_completion": Drop("The same completion of the same task stands in another line.", NO_REMEDY),
    "near_duplicate": Drop("A filter found it to be nearly one that it kept.", NO_REMEDY),
    "margin_too_small": Drop("Every reward on the other side is too near.", "Lower --margin."),
    "not_paired": Drop("Other rollouts of the task make its pairs.", "Raise --pairs-per-task."),
    "prompt_differs": Drop(
        "The good and the bad rollouts of the task were not asked in the same words.",
        "Look whether the prompt holds something that changes, such as the time.",
    ),
    "same_completion": Drop("Both rollouts of the pair did the same; their rewards differ by chance.", NO_REMEDY),
    "same_tokens": Drop("Both sides of the pair have the same tokens, and there would be no gradient.", NO_REMEDY),
    "diverges_in_environment": Drop(
        "Both did the same up to where a tool or a user made the difference: no turn of the policy is at fault.",
        "Pass --kind trajectory to compare all that followed.",
    ),
    "prompt_tokens_differ": Drop(
        "The tokens of the common prompt differ between the two sides.",
        "Choose a model whose chat template writes a prompt the same whatever follows.",
    ),
    "over_cap": Drop("Enough good, or bad, rollouts of the task are there.", "Raise --cap-per-task."),
    "same_task": Drop("Another line stands for the task.", NO_REMEDY),
    "never_solved": Drop("No rollout of the task was good.", "Raise --zero-share to take more such tasks."),
    "solved_too_seldom": Drop("The task's pass rate lies below the band.", "Widen --pass-rate."),
    "solved_too_often": Drop("The task's pass rate lies above the band.", "Widen --pass-rate."),
    "group_too_small": Drop("The group has fewer rollouts than the others.", "Lower --group-size."),
    "no_variance": Drop("All rewards of the group are alike: no rollout is better than its group.", _MORE_REPEATS),
    "over_size": Drop("The group has more rollouts than the others.", "Raise --group-size."),
}
"""The line could be a row, and was not chosen."""

DROPS = ROW_DROPS | CHOICE_DROPS
"""Reason code → what it means. What cannot be read has the verdict with its code, such as `reject:not_object`, and what
a filter dropped keeps the filter's reason."""


def words_for(reason: str) -> str:
    """What a reason means, those of the filter included; `""` where it is neither."""
    if reason in DROPS:
        return DROPS[reason].meaning
    return DROP_SENTENCES.get(reason.partition(":")[0], "")


def remedy_for(reason: str) -> str:
    """What to do about a reason, any but those above included."""
    return DROPS[reason].remedy if reason in DROPS else "Look at the rollouts with 'gymtrl inspect'."
