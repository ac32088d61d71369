"""Rows as NeMo RL reads them.

The formats are described in https://github.com/NVIDIA-NeMo/RL, `docs/guides/sft.md` (section "OpenAI Format Datasets",
read by `nemo_rl/data/datasets/response_datasets/oai_format_dataset.py`) and `docs/guides/dpo.md` (section "Datasets",
read by `preference_datasets/preference_dataset.py`). How loss falls is in `add_loss_mask_to_message_log` of
`nemo_rl/data/llm_message_utils.py`: SFT trains every assistant message, DPO the last message of each side. Tokens are
made anew, with the chat template of the model that NeMo RL trains.
"""

from __future__ import annotations

from typing import Any

from .source import Chat, Dropped, Pair, developer_as_system, needs_images, to_last_assistant


def sft_row(chat: Chat) -> dict[str, Any] | Dropped:
    """Returns `{"messages", "tools", "metadata"}`; `tools` only where there are some.

    The last message must be the assistant's, so answers of tools that nothing follows are left out. Arguments of calls
    stay objects, as in NeMo RL's own example: they go to the chat template as they are.
    """
    messages = developer_as_system([*chat.prompt, *to_last_assistant(chat.completion)])
    if needs_images(messages):
        return Dropped("images", "the record does not tell where in the text an image stood")
    if any(message["role"] == "assistant" for message in chat.prompt):
        # Nothing marks a single message as history, and the policy of the rollout did not produce it.
        return Dropped("history_would_be_trained", "NeMo RL trains every assistant message, also those of the prompt")
    tools = {"tools": chat.tools} if chat.tools else {}
    return {"messages": messages, **tools, "metadata": chat.provenance}


def preference_row(pair: Pair) -> dict[str, Any] | Dropped:
    """Returns `{"context", "completions", "metadata"}` with the chosen completion at rank 0.

    Each side carries its reward, which the RPO losses need.
    """
    sides = (pair.chosen, pair.rejected)
    if needs_images([*pair.prompt, *pair.chosen, *pair.rejected]):
        return Dropped("images", "the record does not tell where in the text an image stood")
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
