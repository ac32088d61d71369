"""A fixed set of rollouts, and every chat template that the mask engine is proven with.

Each message has words that occur nowhere else, so that what carries loss can be told apart exactly.
"""

from __future__ import annotations

import copy
import json
import re
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

from gymtrl.formats.checks import Refusal
from gymtrl.formats.example import whole
from gymtrl.formats.masks import tokenize
from gymtrl.formats.rows import rows_of
from gymtrl.formats.templates import ModelTemplate, model_template
from gymtrl.rollouts.reader import read_lines
from gymtrl.rollouts.record import Message, Origin, Rollout, ToolCall


def rollout(prompt: list[Message], completion: list[Message], **fields: Any) -> Rollout:
    """A rollout of these messages."""
    values: dict[str, Any] = {
        "origin": Origin("rollouts.jsonl", 1, 0, 1, "0" * 16),
        "prompt": tuple(prompt),
        "completion": tuple(completion),
        "tools": (),
        "reward": 1.0,
        "task_key": "t",
        "input_key": None,
        "cluster_key": "t",
        "turns": sum(m.role == "assistant" for m in completion),
        "n_tool_calls": 0,
        "truncated": False,
        "masked": False,
        "flags": (),
        "recorded": (),
    }
    unknown = ("agent", "environment", "model", "task_index", "rollout_index", "input_tokens", "output_tokens")
    return Rollout(**(values | dict.fromkeys(unknown) | fields))


def call(name: str, arguments: dict[str, Any], call_id: str = "c1") -> ToolCall:
    return ToolCall(id=call_id, name=name, arguments=arguments, arguments_json=json.dumps(arguments))


def user(text: str) -> Message:
    return Message("user", text)


def assistant(text: str = "", *calls: ToolCall, reasoning: str | None = None) -> Message:
    return Message("assistant", text, tool_calls=calls, reasoning_content=reasoning)


def tool(text: str, call_id: str = "c1", name: str = "find_town") -> Message:
    return Message("tool", text, tool_call_id=call_id, name=name)


def _declared(name: str, **properties: str) -> dict[str, Any]:
    shapes = {key: {"type": kind, "description": f"Declared {key}."} for key, kind in properties.items()}
    parameters = {"type": "object", "properties": shapes, "required": list(shapes)}
    return {"type": "function", "function": {"name": name, "description": "Declared.", "parameters": parameters}}


TOOLS = (_declared("find_town", region="string", rank="integer"), _declared("read_sky", town="string"))

_FIND = call("find_town", {"region": "Argnorth", "rank": 7301})
_SKY = call("read_sky", {"town": "Argtown"}, "c2")
_HARD = call(
    "find_town",
    {
        "region": "Arg \"quoted\" <b>&'é'</b>\n\tback\\slash 中😀",
        "rank": -7302,
        "share": 0.7303,
        "small": 1e-12,
        "sure": True,
        "none": None,
        "list": ["Argfirst", {"Argkey": [7304]}],
        "empty": {},
    },
)


def _parts() -> Rollout:
    """Content in several parts, through the reader as every rollout."""
    row = {
        "responses_create_params": {
            "input": [
                {
                    "role": "user",
                    "content": [{"type": "input_text", "text": t} for t in ("Askedone ", "and askedtwo?")],
                }
            ]
        },
        "response": {
            "output": [
                {
                    "type": "message",
                    "role": "assistant",
                    "content": [{"type": "output_text", "text": t} for t in ("Saidone ", "and saidtwo.")],
                }
            ]
        },
        "reward": 1.0,
    }
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "rollouts.jsonl"
        path.write_text(json.dumps(row) + "\n")
        (line,) = read_lines([path])
    assert line.rollout is not None
    return line.rollout


CONVERSATIONS: dict[str, Rollout] = {
    "single turn": rollout([user("Askedone?")], [assistant("Saidone it is.")]),
    "system prompt": rollout([Message("system", "Ruledone."), user("Askedone?")], [assistant("Saidone it is.")]),
    "developer role": rollout([Message("developer", "Ruledone."), user("Askedone?")], [assistant("Saidone it is.")]),
    "earlier turns in the prompt": rollout(
        [user("Askedone?"), assistant("Oldanswer."), user("Askedtwo?")], [assistant("Saidone it is.")]
    ),
    "simulated user": rollout(
        [user("Askedone?")],
        [assistant("Saidone it is."), user("Askedtwo?"), assistant("Saidtwo it is.")],
    ),
    "content in parts": _parts(),
    "tool loop of three turns": rollout(
        [user("Askedone?")],
        [
            assistant("", _FIND),
            tool("Gotone."),
            assistant("", _SKY),
            tool("Gottwo.", "c2", "read_sky"),
            assistant("Saidthree it is."),
        ],
        tools=TOOLS,
    ),
    "words beside a call": rollout(
        [Message("system", "Ruledone."), user("Askedone?")],
        [assistant("Saidone first.", _FIND), tool("Gotone."), assistant("Saidtwo it is.")],
        tools=TOOLS,
    ),
    "parallel calls": rollout(
        [user("Askedone?")],
        [assistant("", _FIND, _SKY), tool("Gotone."), tool("Gottwo.", "c2", "read_sky"), assistant("Saidtwo it is.")],
        tools=TOOLS,
    ),
    "no answer at the end": rollout(
        [user("Askedone?")],
        [assistant("", _FIND), tool("Gotone."), assistant("", _SKY), tool("Gottwo.", "c2", "read_sky")],
        tools=TOOLS,
    ),
    "hard arguments": rollout(
        [user("Askedone?")], [assistant("", _HARD), tool("Gotone."), assistant("Saidtwo it is.")], tools=TOOLS
    ),
    "call without arguments": rollout(
        [user("Askedone?")],
        [assistant("", call("read_sky", {})), tool("Gotone.", name="read_sky"), assistant("Saidtwo it is.")],
        tools=TOOLS,
    ),
    "reasoning": rollout([user("Askedone?")], [assistant("Saidone it is.", reasoning="Thoughtone so.")]),
    "reasoning between calls": rollout(
        [user("Askedone?")],
        [
            assistant("", _FIND, reasoning="Thoughtone so."),
            tool("Gotone."),
            assistant("", _SKY, reasoning="Thoughttwo so."),
            tool("Gottwo.", "c2", "read_sky"),
            assistant("Saidthree it is.", reasoning="Thoughtthree so."),
        ],
        tools=TOOLS,
    ),
    "reasoning in some turns": rollout(
        [user("Askedone?")],
        [assistant("", _FIND, reasoning="Thoughtone so."), tool("Gotone."), assistant("Saidtwo it is.")],
        tools=TOOLS,
    ),
    "reasoning over several queries": rollout(
        [user("Askedone?")],
        [
            assistant("Saidone it is.", reasoning="Thoughtone so."),
            user("Askedtwo?"),
            assistant("", _FIND, reasoning="Thoughttwo so."),
            tool("Gotone."),
            assistant("Saidthree it is.", reasoning="Thoughtthree so."),
        ],
        tools=TOOLS,
    ),
    "white space at the edges": rollout([user("Askedone?")], [assistant("\n  Saidone it is. \n")]),
    "truncated": rollout([user("Askedone?")], [assistant("Saidone it")], truncated=True),
    "image": rollout([Message("user", "Askedone?", images=("data:image/png;base64,",))], [assistant("Saidone it is.")]),
}
"""The rollouts by what is special about them."""

UNKNOWN = (
    "{{ bos_token }}{% if tools %}#tools {{ tools | tojson }}\n{% endif %}{% for m in messages %}"
    "#{{ m.role }}: {% if m.reasoning_content %}({{ m.reasoning_content }}) {% endif %}{{ m.content }}"
    "{% for c in m.tool_calls or [] %} !{{ c.function.name }} {{ c.function.arguments | tojson }}{% endfor %}"
    "{{ eos_token if m.role == 'assistant' }}\n{% endfor %}{% if add_generation_prompt %}#assistant: {% endif %}"
)
"""A template that nobody knows, with everything in it and no marks."""

INST = (
    "{% if messages[0].role == 'system' %}{% set system = '<<SYS>>\n' + messages[0].content + '\n<</SYS>>\n\n' %}"
    "{% set messages = messages[1:] %}{% else %}{% set system = '' %}{% endif %}{% for m in messages %}"
    "{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('Roles must alternate') }}{% endif %}"
    "{% if m.role == 'user' %}{{ bos_token + '[INST] ' + (system if loop.first else '') + m.content + ' [/INST]' }}"
    "{% else %}{{ ' ' + m.content + ' ' + eos_token }}{% endif %}{% endfor %}"
)
"""Markers that are plain text, a turn ended by eos alone, and nothing for a generation prompt, as Llama 2 has it."""


def word_tokenizer() -> Any:
    """A tokenizer that puts a space before every text, as Llama 2's does: parts of a text have other tokens."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    made = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    spaces = decoders.Replace("\u2581", " ")
    made.decoder = decoders.Sequence([spaces, decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    special = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    texts = [INST, UNKNOWN, *map(str, CONVERSATIONS.values())]
    made.train_from_iterator(texts, trainers.BpeTrainer(vocab_size=700, special_tokens=special, show_progress=False))
    return PreTrainedTokenizerFast(tokenizer_object=made, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


_SPECIAL = re.compile(r"<[|\uff5c][^<>{}'\"\s]{2,60}?[|\uff5c]>|<(?:start|end)_of_[a-z]+>|<[a-z]+\|>|<\|[a-z_]+>")


@cache
def trl_sources() -> dict[str, str]:
    """The chat templates that TRL carries, by name; its training variants of them left out."""
    import trl

    paths = sorted((Path(trl.__file__).parent / "chat_templates").glob("*.jinja"))
    return {path.stem: path.read_text("utf-8") for path in paths if not path.stem.endswith("_training")}


def with_source(tokenizer: Any, source: str) -> ModelTemplate:
    """A tokenizer with a chat template and the special tokens that this template writes."""
    tokenizer = copy.deepcopy(tokenizer)
    found = sorted({*_SPECIAL.findall(source), "<|END_RESPONSE|>", "<|END_OF_TURN_TOKEN|>"})
    tokenizer.add_special_tokens({"additional_special_tokens": found})
    tokenizer.chat_template = source
    return model_template(tokenizer)


def outcome(rollout: Rollout, template: ModelTemplate) -> str:
    """How many rows a rollout gives, with what is remarked on them, or the short form of its refusal."""
    (made,) = rows_of([rollout], template)
    if isinstance(made, Refusal):
        return REFUSALS[made.reason][0]
    flags = {flag for row in made for flag in row.tokens.flags}
    apart = isinstance(tokenize(whole(rollout), template), Refusal)
    remarks = [short for flag, short in REMARKS.items() if flag in flags]
    return " ".join([str(len(made)), *remarks, *(["s"] if apart else [])])


REMARKS = {"thinking_off": "off", "developer_as_system": "sys"}

REFUSALS = {
    "template_without_tools": ("tools", "the template does not show tools, calls or results"),
    "reasoning_lost": ("think", "the template drops the reasoning of a turn; `--reasoning drop` trains without it"),
    "template_not_prefix_preserving": (
        "prompt",
        "no rendering begins with what a server sends before the turn; token ids that were recorded still fit",
    ),
    "loss_text_differs": ("words", "the template loses words or calls of a turn, or moves them elsewhere"),
    "turn_end_missing": ("end", "the template writes no token that ends the turn, or nothing of the turn"),
    "template_error": ("error", "the template itself refuses such messages"),
    "truncated": ("truncated", "the last turn was cut off"),
    "images_in_text_model": ("images", "images need a model with an image processor"),
}
"""Short forms for the table of outcomes, and what each refusal means."""


def outcomes(tokenizer: Any) -> dict[str, dict[str, str]]:
    """The outcome of each conversation with each template of TRL, the tokenizer's own and two made up."""
    sources = {"SmolLM2": tokenizer.chat_template, "unknown": UNKNOWN, "inst": INST, **trl_sources()}
    made: dict[str, dict[str, str]] = {}
    for name, source in sources.items():
        template = with_source(tokenizer, source)
        made[name] = {conversation: outcome(rollout, template) for conversation, rollout in CONVERSATIONS.items()}
    return made
