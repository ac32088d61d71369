"""What a model's chat template can do, found by rendering probes."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from jinja2 import TemplateError

from gymtrl.errors import UserError
from gymtrl.formats.chats import Chat, in_parts, squeeze
from gymtrl.models.fingerprint import chat_template_of

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase, ProcessorMixin

RENDER_ERRORS = (TemplateError, TypeError, ValueError, KeyError, AttributeError, IndexError)
"""What templates raise on messages that they cannot hold."""

_CONTENT, _REASONING = "qzContentzq", "qzReasoningzq"
_PARAMETERS = {"type": "object", "properties": {"qz": {"type": "string", "description": "qz"}}, "required": ["qz"]}
_ANY_TEXT = ' Two  words,\n\n\tcafé cafe\u0301 \u4e2d \U0001f600 \u200b\ufb01 {"a": 0.10}\n'


@dataclass(frozen=True)
class ModelTemplate:
    """A tokenizer with its chat template and what the two can hold.

    Attributes:
        tokenizer (`PreTrainedTokenizerBase`): The model's tokenizer.
        stock (`str`): The template that the model ships; a server renders prompts with it.
        marked (`str`, *optional*): A template that marks the assistant's part: the stock one where it has generation
            tags, else TRL's training variant of it, else `None`.
        tools (`bool`): Declared tools, calls and tool results all show in the rendering.
        developer (`bool`): The template names the developer role and shows it.
        end_ids (`frozenset[int]`): Tokens that end an assistant turn.
        end_marks (`tuple[str, ...]`): Their texts.
        scaffolds (`frozenset[str]`): What a turn's tokens hold beside its text, such as empty think tags; without
            white space.
        header (`str`): First line of what the generation prompt adds; `""` where it adds nothing.
        lossless (`bool`): Decoding the tokens of a text gives the text back.
        piecewise (`bool`): The tokens of a text's parts are the tokens of a text: no part gets a space before it.
        special (`re.Pattern[str]`): The special tokens in a text.
        keeps_ascii (`bool`): It has tokens for every ASCII character.
        seen (`dict[str, bool]`): Characters that were met so far, and whether the tokenizer keeps them.
        parts (`bool`): The template shows texts only where they stand in parts, beside images.
        processor (`ProcessorMixin`, *optional*): Gives images their tokens; `None` where rows with images are refused.
    """

    tokenizer: PreTrainedTokenizerBase
    stock: str
    marked: str | None
    tools: bool
    developer: bool
    end_ids: frozenset[int] = frozenset()
    end_marks: tuple[str, ...] = ()
    scaffolds: frozenset[str] = frozenset()
    header: str = ""
    lossless: bool = False
    piecewise: bool = False
    special: re.Pattern[str] = re.compile("(?!)")
    keeps_ascii: bool = False
    seen: dict[str, bool] = field(default_factory=dict, compare=False, repr=False)
    parts: bool = False
    processor: ProcessorMixin | None = None

    def render(
        self,
        chats: Sequence[Chat],
        tools: list[dict[str, Any]] | None,
        *,
        template: str,
        generation_prompt: bool = False,
        **variables: Any,
    ) -> list[str]:
        """Renders chats to texts, with further template variables. Raises what the template raises: `RENDER_ERRORS`."""
        from transformers.utils.chat_template_utils import render_jinja_template

        texts, _ = render_jinja_template(
            conversations=[in_parts(chat) for chat in chats] if self.parts else list(chats),
            tools=tools,
            chat_template=template,
            add_generation_prompt=generation_prompt,
            **self.tokenizer.special_tokens_map,
            **variables,
        )
        return [str(text) for text in texts]

    def render_marked(self, chat: Chat, tools: list[dict[str, Any]] | None) -> tuple[str, list[tuple[int, int]]]:
        """Renders with the template that marks the assistant's part: the text, and the characters of each part."""
        from transformers.utils.chat_template_utils import render_jinja_template

        texts, marks = render_jinja_template(
            conversations=[in_parts(chat) if self.parts else chat],
            tools=tools,
            chat_template=self.marked,
            return_assistant_tokens_mask=True,
            **self.tokenizer.special_tokens_map,
        )
        return texts[0], [(start, end) for start, end in marks[0]]

    def encode(self, text: str) -> list[int]:
        """Token ids of a rendered text, which holds its special tokens already."""
        return self.encode_all([text])[0]

    def encode_all(self, texts: list[str]) -> list[list[int]]:
        """Token ids of rendered texts."""
        backend = getattr(self.tokenizer, "backend_tokenizer", None)
        if backend is not None:  # the same ids in half the time: no offsets, no masks
            return [encoding.ids for encoding in backend.encode_batch_fast(texts, add_special_tokens=False)]
        # Not verbose: rows that are too long are dropped with a reason of their own.
        return [list(ids) for ids in self.tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]]

    def decode(self, ids: Sequence[int], *, skip_special: bool = True) -> str:
        """Text of `ids`, spaces left as they are."""
        return str(self.tokenizer.decode(ids, skip_special_tokens=skip_special, clean_up_tokenization_spaces=False))

    def lost_characters(self, text: str) -> list[str]:
        """Characters that the tokenizer has no tokens for: vocabularies may lack bytes that their corpus lacked."""
        if text.isascii() and self.keeps_ascii:
            return []
        met = sorted(set(text))
        unknown = [character for character in met if character not in self.seen]
        for character, ids in zip(unknown, self.encode_all(unknown) if unknown else (), strict=True):
            self.seen[character] = character in self.decode(ids, skip_special=False)
        return [character for character in met if not self.seen[character]]

    def words(self, text: str) -> str:
        """A rendered text without its special tokens."""
        return self.special.sub("", text)


def model_template(tokenizer: PreTrainedTokenizerBase, processor: ProcessorMixin | None = None) -> ModelTemplate:
    """Probes the chat template of `tokenizer`.

    Args:
        tokenizer (`PreTrainedTokenizerBase`): The model's tokenizer.
        processor (`ProcessorMixin`, *optional*): Of a model that takes images: what its tokenizer belongs to.

    Raises:
        UserError: The tokenizer has no chat template.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:  # a saved tokenizer may be set to cut or to fill up
        backend.no_truncation()
        backend.no_padding()
    stock = chat_template_of(tokenizer)
    if not stock:
        raise UserError(
            f"the tokenizer {tokenizer.name_or_path} has no chat template",
            remedy="use the instruct variant of the model, or put a chat_template.jinja into its folder",
        )
    bare = ModelTemplate(
        tokenizer=tokenizer,
        stock=stock,
        marked=_marked(processor or tokenizer, stock),
        tools=_holds_tools(processor or tokenizer),
        developer=False,
        processor=processor,
    )
    bare = replace(bare, parts=processor is not None and _wants_parts(bare))
    bare = replace(bare, developer=_holds_developer(bare))
    end_ids, scaffolds = _probe_turns(bare)
    return replace(
        bare,
        end_ids=end_ids,
        end_marks=tuple(bare.decode([token], skip_special=False) for token in sorted(end_ids)),
        scaffolds=scaffolds,
        header=_probe_header(bare),
        lossless=bare.decode(bare.encode(_ANY_TEXT), skip_special=False) == _ANY_TEXT,
        piecewise=_is_piecewise(bare),
        special=_special_tokens(tokenizer),
        keeps_ascii=not bare.lost_characters("".join(map(chr, range(128)))),
    )


def _marked(tokenizer: PreTrainedTokenizerBase | ProcessorMixin, stock: str) -> str | None:
    from trl.chat_template_utils import get_training_chat_template, has_generation_markers

    try:
        training = get_training_chat_template(tokenizer)
    except RENDER_ERRORS:
        training = None  # a template that TRL does not know, or one that its probes break
    if training is not None:
        return str(training)
    return stock if has_generation_markers(stock) else None


def _holds_tools(tokenizer: PreTrainedTokenizerBase | ProcessorMixin) -> bool:
    from trl.chat_template_utils import supports_tool_calling

    try:
        return bool(supports_tool_calling(tokenizer))
    except RENDER_ERRORS:
        return False


def _holds_developer(bare: ModelTemplate) -> bool:
    # Templates that write out any role would show it as well, as a role that the model does not know.
    if "developer" not in bare.stock:
        return False
    chat = [{"role": "developer", "content": _CONTENT}, {"role": "user", "content": "qz"}]
    try:
        return _CONTENT in bare.render([chat], None, template=bare.stock)[0]
    except RENDER_ERRORS:
        return False


def _wants_parts(bare: ModelTemplate) -> bool:
    for probe in (bare, replace(bare, parts=True)):
        try:
            (text,) = probe.render([[{"role": "user", "content": _CONTENT}]], None, template=bare.stock)
        except RENDER_ERRORS:
            continue
        if _CONTENT in text:
            return probe.parts
    return False


def _probe_turns(bare: ModelTemplate) -> tuple[frozenset[int], frozenset[str]]:
    """Finds what stands around an assistant's text: the tokens that end a turn, and the scaffold of a turn."""
    added = set(bare.tokenizer.get_added_vocab().values())
    end_ids: set[int] = set() if bare.tokenizer.eos_token_id is None else {bare.tokenizer.eos_token_id}
    scaffolds = {""}
    user = {"role": "user", "content": "qzUserzq"}
    plain = {"role": "assistant", "content": _CONTENT}
    thinking = {**plain, "reasoning_content": _REASONING}
    for template in {bare.stock, bare.marked or bare.stock}:
        for turn in (plain, thinking):
            ends: list[int] = []
            for after in ([], [user, plain]):
                try:
                    (head,) = bare.render([[user]], None, template=template, generation_prompt=True)
                    (text,) = bare.render([[user, turn, *after]], None, template=template)
                except RENDER_ERRORS:
                    continue
                if _CONTENT not in text:
                    continue
                # With nothing after the turn, all such tokens end it. Where there are none, the next turn's header
                # does; else what is written between turns may be no token that stops the model.
                if not ends:
                    found = [token for token in bare.encode(text.split(_CONTENT, 1)[-1])[:3] if token in added]
                    ends = found[:1] if after else found
                    end_ids.update(ends)
                cut = 0
                while cut < min(len(head), len(text)) and head[cut] == text[cut]:
                    cut += 1
                body = text[cut:].split(_CONTENT, 1)[0].replace(_REASONING, "")
                scaffolds.add(squeeze(bare.decode(bare.encode(body))))
        end_ids |= _probe_calls(bare, template)
    return frozenset(end_ids), frozenset(scaffolds)


def _probe_calls(bare: ModelTemplate, template: str) -> set[int]:
    """Finds the tokens that end a turn of calls, where these differ from those that end an answer."""
    special = {token for token, added in bare.tokenizer.added_tokens_decoder.items() if added.special}
    tool = {"type": "function", "function": {"name": "qz", "description": "qz", "parameters": _PARAMETERS}}
    user = {"role": "user", "content": "qzUserzq"}
    one, two = (
        {"id": f"qz{i}", "type": "function", "function": {"name": "qz", "arguments": {"qz": f"qzValue{i}zq"}}}
        for i in (1, 2)
    )
    result = {"role": "tool", "content": "qzResultzq", "tool_call_id": "qz1", "name": "qz"}

    def rendered(calls: list[Any], *after: Any) -> str:
        turn = {"role": "assistant", "content": "", "tool_calls": calls}
        try:
            return bare.render([[user, turn, *after]], [tool], template=template)[0]
        except RENDER_ERRORS:
            return ""

    def tokens(text: str) -> list[int]:
        return bare.encode(text.strip())

    found: set[int] = set()
    _, shown, tail = rendered([one]).rpartition("qzValue1zq")
    if not shown:
        return found
    # What stands between two calls closes a call, not the turn.
    both = rendered([one, two])
    inside = set(tokens(both.partition("qzValue1zq")[2].partition("qzValue2zq")[0])) if "qzValue2zq" in both else None
    last = tokens(tail)[-1:]
    found.update(token for token in last if token in special and token not in (inside or ()))
    following = rendered([one], result).partition("qzResultzq")[0].rpartition("qzValue1zq")[2]
    if inside is not None and not found:
        # Ended by the header that follows, as some templates end their answers.
        found.update([token for token in tokens(following) if token in special and token not in inside][:1])
    return found


def _probe_header(bare: ModelTemplate) -> str:
    user = [{"role": "user", "content": "qz"}]
    try:
        (without,) = bare.render([user], None, template=bare.stock)
        (head,) = bare.render([user], None, template=bare.stock, generation_prompt=True)
    except RENDER_ERRORS:
        return ""
    return head[len(without) :].strip().partition("\n")[0] if head.startswith(without) else ""


def _is_piecewise(bare: ModelTemplate) -> bool:
    user, answer = {"role": "user", "content": "qz"}, "Yes, two words"
    try:
        (head,) = bare.render([[user]], None, template=bare.stock, generation_prompt=True)
    except RENDER_ERRORS:
        return False
    first, second = bare.encode_all([head, answer])
    return bare.decode(first + second, skip_special=False) == head + answer


def _special_tokens(tokenizer: PreTrainedTokenizerBase) -> re.Pattern[str]:
    tokens = [token.content for token in tokenizer.added_tokens_decoder.values() if token.special]
    longest_first = sorted(tokens, key=len, reverse=True)
    return re.compile("|".join(map(re.escape, longest_first)) or "(?!)")
