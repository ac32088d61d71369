"""How chat templates spell an assistant's turn: written by hand, apart from the templates and from the engine."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

from gymtrl.rollouts.record import Message, ToolCall

Spelling = Callable[[Message, bool], str]
"""A turn, and whether the prompt switched thinking off → what the model has to produce."""


def dumped(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)


def as_said(text: str) -> str:
    return text


def scalar(value: Any) -> str:
    """Containers as JSON, all else as Python prints it."""
    return dumped(value) if isinstance(value, dict | list) else str(value)


def bare(value: Any) -> str:
    return value if isinstance(value, str) else dumped(value)


def plain(end: str, content: Callable[[str], str] = as_said) -> Spelling:
    return lambda turn, off: content(turn.content) + end


def hermes(thoughts: bool = False, content: Callable[[str], str] = as_said) -> Spelling:
    def spelled(turn: Message, off: bool) -> str:
        thought = f"<think>\n{turn.reasoning_content}\n</think>\n\n" if thoughts and turn.reasoning_content else ""
        calls = [
            f'<tool_call>\n{{"name": "{call.name}", "arguments": {dumped(call.arguments)}}}\n</tool_call>'
            for call in turn.tool_calls
        ]
        return thought + "\n".join([content(turn.content)] * bool(turn.content) + calls) + "<|im_end|>"

    return spelled


def function_tags(call: ToolCall, value: Callable[[Any], str]) -> str:
    arguments = "".join(f"<parameter={k}>\n{value(v)}\n</parameter>\n" for k, v in call.arguments.items())
    return f"<tool_call>\n<function={call.name}>\n{arguments}</function>\n</tool_call>"


def qwen_tags(value: Callable[[Any], str], *, always_thinks: bool = False) -> Spelling:
    def spelled(turn: Message, off: bool) -> str:
        thinks = always_thinks or turn.reasoning_content
        thought = f"{turn.reasoning_content or ''}\n</think>\n\n" if thinks else ""
        calls = "\n".join(function_tags(call, value) for call in turn.tool_calls)
        return thought + "\n\n".join(filter(None, [turn.content.strip(), calls])) + "<|im_end|>"

    return spelled


def nemotron(after_thought: str) -> Spelling:
    def spelled(turn: Message, off: bool) -> str:
        said = f"{turn.reasoning_content}{after_thought}" if turn.reasoning_content else ""
        said = (said + turn.content).rstrip()
        calls = "".join(function_tags(call, scalar) + "\n" for call in turn.tool_calls)
        return said + ("\n" + calls if calls else "") + "<|im_end|>"

    return spelled


def glm(turn: Message, off: bool) -> str:
    said = f"\n<think>{turn.reasoning_content or ''}</think>" + ("\n" + turn.content.strip() if turn.content else "")
    for call in turn.tool_calls:
        pairs = (f"<arg_key>{k}</arg_key>\n<arg_value>{bare(v)}</arg_value>\n" for k, v in call.arguments.items())
        said += f"\n<tool_call>{call.name}\n{''.join(pairs)}</tool_call>"
    return said + ("<|observation|>" if turn.tool_calls else "<|user|>")


def pythonic(value: Callable[[Any], str]) -> Spelling:
    def spelled(turn: Message, off: bool) -> str:
        said = f"<think>{turn.reasoning_content}</think>" if turn.reasoning_content else ""
        calls = [
            f"{call.name}({', '.join(f'{k}={value(v)}' for k, v in call.arguments.items())})"
            for call in turn.tool_calls
        ]
        said += turn.content + (f"<|tool_call_start|>[{', '.join(calls)}]<|tool_call_end|>" if calls else "")
        return said + "<|im_end|>"

    return spelled


def between_quotes(value: Any) -> str:
    return f"'{value}'" if isinstance(value, str) else dumped(value) if isinstance(value, dict) else str(value)


def escaped(value: Any) -> str:
    if not isinstance(value, str):
        return scalar(value)
    return "'" + value.replace("\\", "\\\\").replace("'", "\\'").replace("\n", "\\n") + "'"


def gemma(none: str, call_end: str) -> Spelling:
    def value(of: Any) -> str:
        if isinstance(of, str):
            return f'<|"|>{of}<|"|>'
        if isinstance(of, dict):
            return "{" + ",".join(f"{k}:{value(v)}" for k, v in sorted(of.items())) + "}"
        if isinstance(of, list):
            return "[" + ",".join(map(value, of)) + "]"
        return none if of is None else dumped(of)

    def spelled(turn: Message, off: bool) -> str:
        said = f"<|channel>thought\n{turn.reasoning_content}\n<channel|>" if turn.reasoning_content else ""
        said += "".join(f"<|tool_call>call:{c.name}{value(c.arguments)}<tool_call|>" for c in turn.tool_calls)
        return said + turn.content.strip() + (call_end if turn.tool_calls else "<turn|>")

    return spelled


def gptoss(turn: Message, off: bool) -> str:
    thought = turn.reasoning_content
    said = f"<|channel|>analysis<|message|>{thought}<|end|><|start|>assistant" if thought else ""
    if not turn.tool_calls:
        return said + f"<|channel|>final<|message|>{turn.content}<|return|>"
    (call,) = turn.tool_calls
    assert not turn.content
    return said + f" to=functions.{call.name}<|channel|>commentary json<|message|>{dumped(call.arguments)}<|call|>"


def muse(turn: Message, off: bool) -> str:
    said = [f" to=self<|message|>{turn.reasoning_content}"] if turn.reasoning_content else []
    for call in turn.tool_calls:
        pairs = (f'<atem:parameter name="{k}">{bare(v)}</atem:parameter>\n' for k, v in call.arguments.items())
        inner = f'<atem:function_calls>\n<atem:invoke name="{call.name}">\n{"".join(pairs)}</atem:invoke>\n'
        said.append(f" to={call.name}<|message|>{inner}</atem:function_calls>")
    if not turn.tool_calls:
        said.append(f" to=user<|message|>{turn.content}")
    return "<|eom|><|start|>assistant".join(said) + "<|eot|>"


def llama(turn: Message, off: bool) -> str:
    if not turn.tool_calls:
        return turn.content.strip() + "<|eot_id|>"
    (call,) = turn.tool_calls
    return f'{{"name": "{call.name}", "parameters": {dumped(call.arguments)}}}<|eot_id|>'


def unknown(turn: Message, off: bool) -> str:
    said = f"({turn.reasoning_content}) " if turn.reasoning_content else ""
    calls = (f" !{call.name} {dumped(call.arguments)}" for call in turn.tool_calls)
    return said + turn.content + "".join(calls) + "<|im_end|>"


SPELLINGS: dict[str, Spelling] = {
    "SmolLM2": plain("<|im_end|>"),
    "unknown": unknown,
    "inst": lambda turn, off: f" {turn.content} <|im_end|>",
    "cohere": plain("<|END_OF_TURN_TOKEN|>", str.strip),
    "cohere2": plain("<|END_RESPONSE|><|END_OF_TURN_TOKEN|>"),
    "gemma": plain("<end_of_turn>", str.strip),
    "gemma3": plain("<end_of_turn>", str.strip),
    "gemma4": gemma("None", "<|tool_response>"),
    "gemma4_v2": gemma("None", "<turn|>"),
    "gemma4_v3": gemma("None", "<|tool_response>"),
    "gemma4_v4": gemma("None", "<|tool_response>"),
    "gemma4_v5": gemma("null", "<|tool_response>"),
    "diffusion_gemma": gemma("null", "<|tool_response>"),
    "glm4moe": glm,
    "gptoss": gptoss,
    "lfm2": plain("<|im_end|>"),
    "lfm2_v2": pythonic(escaped),
    "lfm2_2_5": pythonic(between_quotes),
    "lfm2_2_5_v2": pythonic(between_quotes),
    "lfm2_2_5_vl": pythonic(escaped),
    "llama3": plain("<|eot_id|>", str.strip),
    "llama3_1": llama,
    "llama3_2": llama,
    "muse_glimmer": muse,
    "nemotron_3_nano": nemotron("\n</think>\n"),
    "nemotron_3_super": nemotron("\n</think>\n"),
    "nemotron_3_ultra": nemotron("</think>"),
    "nemotron_3_5_lightning": nemotron("</think>"),
    "phi3": plain("<|end|>"),
    "phi3_5": plain("<|end|>"),
    "qwen2_5": hermes(),
    "qwen2_5_vl": plain("<|im_end|>"),
    "qwen3": hermes(thoughts=True, content=lambda text: text.lstrip("\n")),
    "qwen3_instruct_2507": hermes(),
    "qwen3_vl": hermes(),
    "qwen3_5_think": qwen_tags(scalar),
    "qwen3_5_nothink": qwen_tags(scalar),
    "qwen3_6": qwen_tags(bare),
    "qwen3_8": qwen_tags(bare, always_thinks=True),
}
"""How templates spell turns; those that are not here can hold no conversation at all."""

SPACED = " with a space before every text"
for _name in ("unknown", "inst"):
    SPELLINGS[_name + SPACED] = lambda turn, off, one=SPELLINGS[_name]: one(turn, off).replace("<|im_end|>", "</s>")
