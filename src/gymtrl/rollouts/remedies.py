"""What a user can do about each verdict, one sentence a reason."""

from __future__ import annotations

_REMEDIES = {
    "malformed_json": "The last line of an interrupted collection is often cut: run it again with --resume.",
    "not_object": "Rollout files hold one JSON object a line; look at how the file was made.",
    "failure_row": "Failed attempts belong into X_failures.jsonl; collect the task again.",
    "task_only": "This is an input file: collect rollouts with it first.",
    "custom_record": "NeMo Gym's rollout collection did not write this row; leave it out.",
    "episode_result": "Use the rollouts of the same run, which hold the chats.",
    "empty_output": "The model or the agent returned nothing: look at the model server's log for that time.",
    "noncumulative_transitions": "The agent rewrote its history; let it return one list of items an episode.",
    "unsupported_modality_audio": "Text and images can be trained on, audio cannot.",
    "no_prompt": "The agent kept its prompt to itself; let it return the input items in responses_create_params.input.",
    "no_assistant_turn": "The policy said nothing: look at the agent's log for that task.",
    "unsupported_item_type": "Let the agent return messages, reasoning, function calls and their outputs only.",
    "unsupported_content_part": "Text and images (as URL or data URI) can be read; files and other parts cannot.",
    "refusal_part": "The provider refused; such an answer is no behaviour of a policy that you train.",
    "missing_call_id": "The agent must keep call_id on calls and on their outputs.",
    "duplicate_call_id": "The agent must give each call of an episode an id of its own.",
    "bad_tool_arguments": "The model wrote arguments that are no JSON object; use a tool-call parser that fits it.",
    "orphan_tool_output": "The agent dropped the call that this output answers; it must return both.",
    "duplicate_tool_output": "The agent answered one call twice; it must return one output a call.",
    "missing_tool_output": "The agent went on without returning the output of a call; it must return it.",
    "ambiguous_turns": "The agent merged several model calls; let it return the user's turns between them as well.",
    "empty_assistant": "An empty answer, often a completion beyond the context: raise max_output_tokens or context.",
    "roundtrip_mismatch": "The chat cannot be rebuilt from what was read; leave the row out and report it.",
    "line_too_long": "No rollout is that long: look at how the file was made, and whether line breaks were lost.",
    "tools_undeclared": "Let the agent return its tools in responses_create_params.tools, or pass "
    "--keep-context to 'gymtrl filter'.",
    "hidden_context": "Let the agent return the whole prompt in responses_create_params.input, or pass "
    "--keep-context to 'gymtrl filter'.",
    "materialized_input": "Nothing: name X.jsonl, and this file beside it is used by itself.",
    "reward_profile": "Nothing: name the rollout file instead.",
}


def remedy_for(verdict: str, reason: str) -> str:
    """The remedy for a reason code, which may carry a type after a colon; `""` for `ok`."""
    return "" if verdict == "ok" else _REMEDIES[reason.partition(":")[0]]
