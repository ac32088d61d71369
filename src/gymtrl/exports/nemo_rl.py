"""Rows as NeMo RL reads them.

The formats are described in https://github.com/NVIDIA-NeMo/RL, `docs/guides/sft.md` (section "OpenAI Format Datasets",
read by `nemo_rl/data/datasets/response_datasets/oai_format_dataset.py`) and `docs/guides/dpo.md` (section "Datasets",
read by `preference_datasets/preference_dataset.py`). How loss falls is in `add_loss_mask_to_message_log` of
`nemo_rl/data/llm_message_utils.py`: SFT trains every assistant message, or with `sft.only_unmask_final` the last one
alone; DPO the last message of each side. Tokens are made anew, with the chat template of the model that NeMo RL trains.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Literal

from .source import Chat, Dropped, Messages, Pair, developer_as_system, needs_images, to_last_assistant

Scope = Literal["every", "last"]
"""Which messages of a file get loss: every one of the assistant, or the last of each row."""


def scope_of(rows: Iterable[Chat]) -> Scope:
    """Returns the scope that holds more of the rows; `every`, NeMo RL's default, where both hold as many.

    One holds rows whose prompt has no assistant message, the other rows whose completion has a single one.
    """
    every = last = 0
    for chat in rows:
        every += not _spoken(chat.prompt)
        last += _spoken(chat.completion) == 1
    return "last" if last > every else "every"


def sft_row(chat: Chat, scope: Scope) -> dict[str, Any] | Dropped:
    """Returns `{"messages", "tools", "metadata"}`; `tools` only where there are some.

    The last message must be the assistant's, so answers of tools that nothing follows are left out. Arguments of calls
    stay objects, as in NeMo RL's own example: they go to the chat template as they are.
    """
    messages = developer_as_system([*chat.prompt, *to_last_assistant(chat.completion)])
    if needs_images(messages):
        return Dropped("images", "the record does not hold the images themselves")
    if scope == "last" and _spoken(chat.completion) > 1:
        return Dropped("earlier_messages_untrained", "of this file the last message of a row is trained, no other")
    if scope == "every" and _spoken(chat.prompt):
        # Nothing marks a single message as history, which carries no loss in the dataset.
        return Dropped("history_would_be_trained", "of this file every assistant message is trained")
    tools = {"tools": chat.tools} if chat.tools else {}
    return {"messages": messages, **tools, "metadata": chat.provenance}


def preference_row(pair: Pair) -> dict[str, Any] | Dropped:
    """Returns `{"context", "completions", "metadata"}` with the chosen completion at rank 0.

    Each side carries its reward, which the RPO losses need.
    """
    sides = (pair.chosen, pair.rejected)
    if needs_images([*pair.prompt, *pair.chosen, *pair.rejected]):
        return Dropped("images", "the record does not hold the images themselves")
    if pair.tools:
        # Without them the template would render another prompt than the one that the policy saw.
        return Dropped("tools", "a preference row of NeMo RL has no place for tools")
    if any(len(side) != 1 or side[0]["role"] != "assistant" for side in sides):
        return Dropped("more_than_one_message", "NeMo RL trains the last message of each side only")
    rewards = (pair.provenance.get("chosen_reward"), pair.provenance.get("rejected_reward"))
    completions = [
        {"rank": rank, "completion": side, **({} if reward is None else {"reward": reward})}
        for rank, (side, reward) in enumerate(zip(sides, rewards, strict=True))
    ]
    return {"context": developer_as_system(pair.prompt), "completions": completions, "metadata": pair.provenance}


def _spoken(messages: Messages) -> int:
    return sum(message["role"] == "assistant" for message in messages)
