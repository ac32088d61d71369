"""The typed record that every stage shares: one rollout, and the verdict on the line that it came from."""

from __future__ import annotations

from typing import Any, Literal

import msgspec

Role = Literal["system", "developer", "user", "assistant", "tool"]
VerdictKind = Literal["ok", "context", "reject", "skip"]


class ToolCall(msgspec.Struct, frozen=True):
    """A call that the policy made.

    Attributes:
        id (`str`): Identifier that the tool's answer refers to.
        name (`str`): Name of the function.
        arguments (`dict[str, Any]`): The parsed arguments.
        arguments_json (`str`): The arguments exactly as the rollout holds them.
    """

    id: str
    name: str
    arguments: dict[str, Any]
    arguments_json: str


class Message(msgspec.Struct, frozen=True, omit_defaults=True):
    """One chat message as the policy saw or produced it.

    Attributes:
        role (`str`): `system`, `developer`, `user`, `assistant` or `tool`.
        content (`str`): The text; `""` where there is none. Images stand as `images`.
        images (`tuple[str, ...]`): Image URLs or data URIs of the message, in order.
        reasoning_content (`str`, *optional*): The visible reasoning of an assistant message.
        tool_calls (`tuple[ToolCall, ...]`): Calls of an assistant message, in order.
        tool_call_id (`str`, *optional*): On a `tool` message, the call that it answers.
        name (`str`, *optional*): On a `tool` message, the name of the function that answered.
        image_offsets (`tuple[int, ...]`): Where each image stands: characters of `content` before it. Empty where all
            images come before the text, which is what Gym's own environments send.
    """

    role: Role
    content: str = ""
    images: tuple[str, ...] = ()
    reasoning_content: str | None = None
    tool_calls: tuple[ToolCall, ...] = ()
    tool_call_id: str | None = None
    name: str | None = None
    image_offsets: tuple[int, ...] = ()


class RecordedTurn(msgspec.Struct, frozen=True):
    """Token ids that Gym recorded for one model call.

    Attributes:
        prompt_token_ids (`tuple[int, ...]`): Everything that was sent.
        generation_token_ids (`tuple[int, ...]`): What came back, with the end-of-turn token where the server kept it.
        generation_log_probs (`tuple[float, ...]`): Natural log-probabilities of the generated tokens, same length.
    """

    prompt_token_ids: tuple[int, ...]
    generation_token_ids: tuple[int, ...]
    generation_log_probs: tuple[float, ...]


class Origin(msgspec.Struct, frozen=True):
    """Where a line stands.

    Attributes:
        file (`str`): Path as the user gave it.
        line (`int`): Line number, from 1.
        offset (`int`): First byte of the line in the file.
        length (`int`): Bytes of the line without its line break.
        row_id (`str`): First 16 hex digits of the SHA-256 of those bytes.
    """

    file: str
    line: int
    offset: int
    length: int
    row_id: str

    def __str__(self) -> str:
        return f"{self.file}:{self.line}"


class Sampling(msgspec.Struct, frozen=True):
    """How the policy was asked to sample; two collections that differ here cannot be compared.

    Attributes:
        temperature, top_p (`float`, *optional*): As the request gave them.
        max_output_tokens (`int`, *optional*): Likewise.
    """

    temperature: float | None = None
    top_p: float | None = None
    max_output_tokens: int | None = None

    def __str__(self) -> str:
        return ", ".join(f"{name} {getattr(self, name)}" for name in self.__struct_fields__)


class Rollout(msgspec.Struct, frozen=True):
    """One rollout: what was asked, what the policy did, how it was rewarded.

    Attributes:
        origin (`Origin`): The line that it was read from.
        prompt (`tuple[Message, ...]`): Messages before the policy's first output.
        completion (`tuple[Message, ...]`): From the policy's first output on: assistant and tool messages, and the user
            messages of a simulated user.
        tools (`tuple[dict[str, Any], ...]`): Declared tools as `{"type": "function", "function": {...}}`.
        reward (`float`, *optional*): `None` where the row has none; may be non-finite.
        reward_components (`dict[str, float]`): Parts of the reward by name, where the environment tells them.
        task_key (`str`): SHA-256 (hex) over environment or agent, prompt and tools; the same in every run.
        input_key (`str`, *optional*): SHA-256 (hex) over the task's input row, where a sidecar gives it.
        cluster_key (`str`): What a split must not tear apart: `input_key`, else `task_key`, unless the user names one.
        agent (`str`, *optional*): `agent_ref.name`.
        environment (`str`, *optional*): The environment server, where the row names it.
        model (`str`, *optional*): `response.model`.
        task_index (`int`, *optional*): `_ng_task_index`; restarts at 0 in every run.
        rollout_index (`int`, *optional*): `_ng_rollout_index`, the repeat.
        turns (`int`): Assistant messages of the completion.
        n_tool_calls (`int`): Calls in the completion.
        truncated (`bool`): The response is incomplete.
        masked (`bool`): The environment says that the reward is no valid measurement.
        input_tokens, output_tokens (`int`, *optional*): As `usage` records them.
        flags (`tuple[str, ...]`): Remarks such as `reasoning_hidden`, sorted.
        recorded (`tuple[RecordedTurn, ...]`): Recorded token ids, one entry a model call; empty where not recorded.
        sampling (`Sampling`): How the policy was asked to sample.
    """

    origin: Origin
    prompt: tuple[Message, ...]
    completion: tuple[Message, ...]
    tools: tuple[dict[str, Any], ...]
    reward: float | None
    task_key: str
    input_key: str | None
    cluster_key: str
    agent: str | None
    environment: str | None
    model: str | None
    task_index: int | None
    rollout_index: int | None
    turns: int
    n_tool_calls: int
    truncated: bool
    masked: bool
    input_tokens: int | None
    output_tokens: int | None
    flags: tuple[str, ...]
    recorded: tuple[RecordedTurn, ...]
    sampling: Sampling = Sampling()
    reward_components: dict[str, float] = {}


class Line(msgspec.Struct, frozen=True):
    """One line of a rollout file with its verdict; nothing that was read goes without one.

    Attributes:
        origin (`Origin`): Where the line stands.
        verdict (`str`): `ok`, `context`, `reject` or `skip`.
        reason (`str`): Reason code; `""` for `ok`.
        detail (`str`): What was found, in words, for a person.
        rollout (`Rollout`, *optional*): Present for `ok` and `context`.
    """

    origin: Origin
    verdict: VerdictKind
    reason: str = ""
    detail: str = ""
    rollout: Rollout | None = None
