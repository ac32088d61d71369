"""What every verdict means and what to do about it, and the remarks that a rollout may carry."""

from __future__ import annotations

from typing import NamedTuple

from .record import VerdictKind


class Reason(NamedTuple):
    """A reason for a verdict.

    Attributes:
        kind (`str`): The verdict: `context`, `reject` or `skip`.
        meaning (`str`): What is the matter with the line, in one sentence.
        remedy (`str`): What to do about it.
    """

    kind: VerdictKind
    meaning: str
    remedy: str


REASONS: dict[str, Reason] = {
    "tools_undeclared": Reason(
        "context",
        "The policy called tools that neither request nor response declares, so it saw more than the row shows.",
        "Let the agent return its tools in responses_create_params.tools, or pass --keep-context to 'gymtrl filter'.",
    ),
    "hidden_context": Reason(
        "context",
        "The model server counted far more prompt tokens than the row can hold: part of the prompt was not recorded.",
        "Let the agent return the whole prompt in responses_create_params.input, or pass --keep-context to "
        "'gymtrl filter'.",
    ),
    "malformed_json": Reason(
        "reject",
        "The line is no JSON, or is nested too deeply to be read.",
        "The last line of an interrupted collection is often cut: run it again with --resume. Any other line was "
        "damaged, or never a rollout; write or copy the file anew, one row a line.",
    ),
    "not_object": Reason(
        "reject",
        "The line is JSON, but a list, a text or a number.",
        "Rollout files hold one JSON object a line; look at how the file was made.",
    ),
    "line_too_long": Reason(
        "reject",
        "The line is longer than 64 MB, or than the limit that was set, and was not read.",
        "No rollout is that long: look at how the file was made, and whether line breaks were lost.",
    ),
    "failure_row": Reason(
        "reject",
        "An attempt that failed before it became a rollout.",
        "Failed attempts belong into X_failures.jsonl; collect the task again.",
    ),
    "task_only": Reason(
        "reject",
        "A task without a response, as in the input of a collection.",
        "This is an input file: collect rollouts with it first.",
    ),
    "custom_record": Reason(
        "reject",
        "The row has neither request nor response, and is no chat.",
        "NeMo Gym's rollout collection did not write this row; leave it out.",
    ),
    "episode_result": Reason(
        "reject",
        "The result of an episode, without the chat.",
        "Use the rollouts of the same run, which hold the chats.",
    ),
    "empty_output": Reason(
        "reject",
        "The response holds no output at all.",
        "The model or the agent returned nothing: look at the model server's log for that time.",
    ),
    "noncumulative_transitions": Reason(
        "reject",
        "The output is a list of steps that do not continue one another, so there is no single chat.",
        "The agent rewrote its history; let it return one list of items an episode.",
    ),
    "unsupported_modality_audio": Reason(
        "reject",
        "The model heard audio.",
        "Text and images can be trained on, audio cannot.",
    ),
    "no_prompt": Reason(
        "reject",
        "The row does not show what the policy was asked.",
        "The agent kept its prompt to itself; let it return the input items in responses_create_params.input.",
    ),
    "no_assistant_turn": Reason(
        "reject",
        "The output holds messages of others, but nothing that the policy said or called.",
        "The policy said nothing: look at the agent's log for that task.",
    ),
    "unsupported_item_type": Reason(
        "reject",
        "An item has a type, or a message a role, that has no place in a chat; it follows the code after a colon.",
        "Let the agent return messages, reasoning, function calls and their outputs only.",
    ),
    "unsupported_content_part": Reason(
        "reject",
        "A message holds a part that is neither text nor an image with its address.",
        "Text and images (as URL or data URI) can be read; files and other parts cannot.",
    ),
    "refusal_part": Reason(
        "reject",
        "A part of an answer is marked as a refusal by the provider.",
        "The provider refused; such an answer is no behaviour of a policy that you train.",
    ),
    "missing_call_id": Reason(
        "reject",
        "A call, or the output of one, has no call_id.",
        "The agent must keep call_id on calls and on their outputs.",
    ),
    "duplicate_call_id": Reason(
        "reject",
        "Two calls have the same call_id, so their outputs cannot be told apart.",
        "The agent must give each call of an episode an id of its own.",
    ),
    "bad_tool_arguments": Reason(
        "reject",
        "A call has no name, or arguments that are no JSON object.",
        "The model wrote arguments that are no JSON object; use a tool-call parser that fits it.",
    ),
    "orphan_tool_output": Reason(
        "reject",
        "An output answers a call that was not made before it.",
        "The agent dropped the call that this output answers; it must return both.",
    ),
    "duplicate_tool_output": Reason(
        "reject",
        "A call has two outputs.",
        "The agent answered one call twice; it must return one output a call.",
    ),
    "missing_tool_output": Reason(
        "reject",
        "A call has no output, and yet the chat goes on after it.",
        "The agent went on without returning the output of a call; it must return it. Where one output answers a batch "
        "of calls, it must return one for each of them.",
    ),
    "ambiguous_turns": Reason(
        "reject",
        "The policy spoke twice with nothing in between: several model calls stand side by side as if they were one.",
        "The agent merged several model calls; let it return what stood between them as well: the user's turns, and a "
        "call that it refused to run together with the error that the model was given.",
    ),
    "empty_assistant": Reason(
        "reject",
        "A turn of the policy has no text, no visible reasoning and no call.",
        "An empty answer, often a completion beyond the context: raise max_output_tokens or context.",
    ),
    "roundtrip_mismatch": Reason(
        "reject",
        "A message or a tool holds what no UTF-8 text (half of a surrogate pair) or no JSON (NaN, infinity) can hold.",
        "A dataset could not give it back as it was: mend the text or number where it was made, or leave the row out.",
    ),
    "materialized_input": Reason(
        "skip",
        "An input of the run, as Gym writes it into X_materialized_inputs.jsonl.",
        "Nothing: name X.jsonl, and this file beside it is used by itself.",
    ),
    "reward_profile": Reason(
        "skip",
        "Figures about the rewards of a task, as Gym writes them into X_reward_profiling.jsonl.",
        "Nothing: name the rollout file instead.",
    ),
}
"""By reason code, in the order in which they are explained."""

FAULTS = {
    "ends_in_reasoning": "The last turn has neither a call nor an answer after its reasoning.",
    "unbalanced_think": "The <think> and </think> tags in the text of a turn do not match.",
}
"""What is wrong with a completion as such (column `fault`); 'gymtrl filter' drops it."""

FLAGS = {
    "cluster_missing": "Neither the row nor its input row has the path that --cluster names; the task is its own "
    "cluster.",
    "developer_role": "A message has the role developer, which not every chat template knows.",
    "prompt_differs": "Rollouts with the same task index were asked different things, so they are no group.",
    "reasoning_hidden": "The model reasoned, and the provider did not return what.",
    "reward_not_a_number": "The reward is no number and counts as missing.",
    "think_in_content": "Reasoning stands in the text between <think> tags, not in items of its own.",
    "token_ids_partial": "Token ids were recorded for some model calls only, so none are used.",
    "tool_not_function": "A declared tool is no function, so no chat template shows it.",
}
"""Remarks that change no verdict (column `flags`)."""


def remedy_for(verdict: str, reason: str) -> str:
    """The remedy for a reason code, which may carry a type after a colon; `""` for `ok`."""
    return "" if verdict == "ok" else REASONS[reason.partition(":")[0]].remedy
