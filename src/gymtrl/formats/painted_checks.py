"""What the tokens of a row alone prove: checks of ids and masks against the record that was written beside them.

They repeat no code of the engine that made the tokens, so that a mistake in it shows.
"""

from __future__ import annotations

import json
import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import groupby
from typing import Any

from gymtrl.errors import UserError
from gymtrl.formats.chats import argument_texts
from gymtrl.formats.checks import IGNORED
from gymtrl.formats.templates import RENDER_ERRORS, ModelTemplate

Chat = Sequence[Mapping[str, Any]]

_TELLING = 4  # characters; shorter texts also stand in markup such as "arguments"
_PROBE = "qzUserzq"


@dataclass(frozen=True)
class Check:
    """Something that was looked at.

    Attributes:
        passed (`bool`): It is as it should be.
        words (`str`): What was found; may quote foreign text.
    """

    passed: bool
    words: str


@dataclass(frozen=True)
class Decoder:
    """A tokenizer with what its chat template writes around a turn.

    Attributes:
        template (`ModelTemplate`): Tokenizer, template, and the tokens that end a turn.
    """

    template: ModelTemplate

    def text(self, ids: Sequence[int]) -> str:
        """Text of `ids`, special tokens included.

        Raises:
            UserError: An id is none of this tokenizer.
        """
        if any(not 0 <= token < self._size for token in ids):
            raise UserError(
                "the dataset holds token ids that the tokenizer does not have",
                remedy="give the model that the dataset was made for",
            )
        return self.template.decode(list(ids), skip_special=False)

    @cached_property
    def _size(self) -> int:
        return len(self.template.tokenizer)

    @cached_property
    def headers(self) -> frozenset[int]:
        """Special tokens that stand before a turn and never within what the policy produces."""
        user = {"role": "user", "content": _PROBE}
        answer = {"role": "assistant", "content": _PROBE, "reasoning_content": _PROBE}
        head, whole = self._render([user], generation_prompt=True), self._render([user, answer])
        if head is None:
            return frozenset()
        added = self.template.tokenizer.added_tokens_decoder
        special = {token for token, entry in added.items() if entry.special}
        # Some models open several parts within one turn.
        within = self._ids(whole[len(head) :]) if whole is not None and whole.startswith(head) else []
        return frozenset(special & set(self._ids(head))) - set(within) - self.template.end_ids

    @cached_property
    def first(self) -> int | None:
        """The token that every chat begins with; `None` where it depends on the chat."""
        user, system = {"role": "user", "content": _PROBE}, {"role": "system", "content": _PROBE}
        firsts = {self._ids(text)[0] for chat in ([user], [system, user]) if (text := self._render(chat))}
        return firsts.pop() if len(firsts) == 1 else None

    @cached_property
    def openings(self) -> tuple[str, ...]:
        """What a prompt may end with: the header of the answer, with thinking on and off."""
        user = {"role": "user", "content": _PROBE}
        closed = self._render([user])
        opened = [self._render([user], generation_prompt=True, **more) for more in ({}, {"enable_thinking": False})]
        if closed is None:
            return ()
        return tuple(text[len(closed) :] for text in opened if text is not None and text.startswith(closed))

    def _render(self, chat: list[dict[str, str]], *, generation_prompt: bool = False, **variables: Any) -> str | None:
        try:
            return str(
                self.template.tokenizer.apply_chat_template(
                    chat, tokenize=False, add_generation_prompt=generation_prompt, **variables
                )
            )
        except RENDER_ERRORS:
            return None  # the template has no place for such a chat

    def _ids(self, text: str) -> list[int]:
        return self.template.encode(text)


def check_lengths(
    ids: Sequence[int],
    mask: Sequence[int],
    *,
    labels: bool = False,
    log_probs: Sequence[float | None] | None = None,
) -> Check:
    """Checks what stands beside the ids.

    Args:
        ids (`Sequence[int]`): The ids that a mask belongs to.
        mask (`Sequence[int]`): 1 where a token carries loss; or labels.
        labels (`bool`, *optional*, defaults to `False`): `mask` holds labels: the id itself, or -100.
        log_probs (`Sequence[float | None]`, *optional*): Recorded log-probabilities of the ids.
    """
    name = "labels" if labels else "mask"
    if len(ids) != len(mask):
        return Check(False, f"lengths differ: {len(ids):,} ids, {len(mask):,} entries of the {name}")
    if labels and any(label not in (IGNORED, token) for token, label in zip(ids, mask, strict=True)):
        return Check(False, "a label is neither the token's id nor -100")
    if not labels and any(entry not in (0, 1) for entry in mask):
        return Check(False, "the mask holds something other than 0 and 1")
    if log_probs is not None:
        if len(log_probs) != len(ids):
            return Check(False, f"lengths differ: {len(ids):,} ids, {len(log_probs):,} log-probabilities")
        if any(value for value, entry in zip(log_probs, mask, strict=True) if not entry):
            return Check(False, "a token without loss has a log-probability")
        name = "mask and log-probabilities"
    return Check(True, f"ids and {name} have the same length ({len(ids):,})")


def check_prompt(ids: Sequence[int], prompt: Chat, decoder: Decoder) -> tuple[Check, ...]:
    """Checks a prompt that the model has yet to answer.

    Args:
        ids (`Sequence[int]`): All tokens of the row.
        prompt (`Chat`): The messages that they stand for.
        decoder (`Decoder`): Of the model.
    """
    text = decoder.text(ids)
    opened = not decoder.openings or text.endswith(decoder.openings)
    words = "the prompt ends with the header of the answer" if opened else "the header of the answer is missing"
    return _texts_there(text, prompt), _begins(ids, decoder), Check(opened, words)


def check_side(
    ids: Sequence[int], trained: Sequence[bool] | None, prompt: Chat, completion: Chat, decoder: Decoder
) -> tuple[Check, ...]:
    """Checks a conversation.

    Args:
        ids (`Sequence[int]`): All its tokens.
        trained (`Sequence[bool]`, *optional*): Which of them carry loss; `None` where the row is scored as a whole.
        prompt, completion (`Chat`): The messages that it stands for.
        decoder (`Decoder`): Of the model.
    """
    text = decoder.text(ids)
    whole = (_texts_there(text, (*prompt, *completion)), _begins(ids, decoder), _ends(ids, completion, decoder))
    if trained is None:
        return whole
    runs = [
        [token for token, _ in run]
        for loss, run in groupby(zip(ids, trained, strict=True), key=lambda pair: pair[1])
        if loss
    ]
    turns = [message for message in completion if message["role"] == "assistant"]
    others = [message for message in (*prompt, *completion) if message["role"] != "assistant"]
    texts = [_normal(decoder.text(run)) for run in runs]
    return (
        _counted(runs, turns),
        _run_ends(runs, decoder),
        _no_headers(runs, decoder),
        _words_trained(texts, turns),
        _others_untrained(texts, turns, others),
        *whole,
    )


def _counted(runs: Sequence[Sequence[int]], turns: Chat) -> Check:
    counts = f"{len(runs)} part{_s(runs)} with loss for {len(turns)} turn{_s(turns)} of the policy"
    return Check(bool(runs) and len(runs) == len(turns), counts)


def _run_ends(runs: Sequence[Sequence[int]], decoder: Decoder) -> Check:
    for number, run in enumerate(runs, 1):
        if run[-1] not in decoder.template.end_ids:
            return Check(False, f"part {number} ends with {decoder.text(run[-1:])!r}, which ends no turn")
        if run[-1] in run[:-1]:
            return Check(False, f"part {number} goes on behind the token that ends a turn")
    return Check(True, "every part with loss ends with the token that ends a turn")


def _no_headers(runs: Sequence[Sequence[int]], decoder: Decoder) -> Check:
    found = next((token for run in runs for token in run if token in decoder.headers), None)
    if found is not None:
        return Check(False, f"a header carries loss: {decoder.text([found])!r}")
    return Check(True, "no header carries loss")


def _words_trained(texts: Sequence[str], turns: Chat) -> Check:
    everything = "\0".join(texts)
    silent = 0
    for number, turn in enumerate(turns):
        text = texts[number] if len(texts) == len(turns) else everything
        if _words(turn) not in text:
            return Check(False, f"not all words of turn {number + 1} carry loss")
        for call in _calls(turn):
            spellings = [(call["name"],), *argument_texts(call["arguments"])]
            if not all(any(_normal(spelling) in text for spelling in each) for each in spellings):
                return Check(False, f"not all of the call of '{call['name']}' in turn {number + 1} carries loss")
        silent += _normal(turn.get("reasoning_content") or "").strip() not in text
    reasoning = f"; the reasoning of {silent} turn{'s' if silent > 1 else ''} is left out" if silent else ""
    return Check(True, f"the policy's words carry loss{reasoning}")


def _others_untrained(texts: Sequence[str], turns: Chat, others: Chat) -> Check:
    everything = "\0".join(texts)
    compared = 0
    for message in others:
        text = _words(message)
        if len(text) < _TELLING:
            continue
        compared += 1
        # The policy may quote what it read.
        said = sum(max(spelling.count(text) for spelling in _spoken(turn)) for turn in turns)
        if everything.count(text) > said:
            return Check(False, f"the text of a {message['role']} message carries loss: {text[:60]!r}")
    return Check(True, f"no text that the policy was given carries loss ({compared} compared)")


def _spoken(turn: Mapping[str, Any]) -> Iterator[str]:
    """All that a turn says, once for each way in which templates write calls."""
    base = f"{_normal(turn.get('reasoning_content') or '')}\0{_words(turn)}"
    calls = [{"name": call["name"], "arguments": call["arguments"]} for call in _calls(turn)]
    leaves = [spellings[0] for call in calls for spellings in argument_texts(call["arguments"])]
    for spelled in (json.dumps(calls, ensure_ascii=False), json.dumps(calls), "\0".join(leaves)):
        yield f"{base}\0{_normal(spelled)}"


def _texts_there(text: str, messages: Chat) -> Check:
    text = _normal(text)
    for message in messages:
        if any(words not in text for words in _texts(message)) or any(
            call["name"] not in text for call in _calls(message)
        ):
            return Check(False, f"text of a {message['role']} message is missing: {_words(message)[:60]!r}")
    return Check(True, f"the text of every message is there ({len(messages)})")


def _begins(ids: Sequence[int], decoder: Decoder) -> Check:
    if decoder.first is not None and list(ids[:1]) != [decoder.first]:
        return Check(False, "cut at the beginning: no chat of this model begins so")
    return Check(True, "nothing was cut at the beginning")


def _ends(ids: Sequence[int], completion: Chat, decoder: Decoder) -> Check:
    last = max((i for i, token in enumerate(ids) if token in decoder.template.end_ids), default=-1)
    if last < 0 or (completion and completion[-1]["role"] == "assistant" and decoder.text(ids[last + 1 :]).strip()):
        return Check(False, "cut at the end: the last turn is not ended")
    return Check(True, "nothing was cut at the end")


def _calls(message: Mapping[str, Any]) -> list[dict[str, Any]]:
    return [call["function"] for call in message.get("tool_calls") or ()]


def _words(message: Mapping[str, Any]) -> str:
    return "".join(_texts(message))


def _texts(message: Mapping[str, Any]) -> list[str]:
    """The message's text, in parts where images stand in it."""
    content = message.get("content") or ""
    texts = [content] if isinstance(content, str) else [part.get("text", "") for part in content]
    return [_normal(text).strip() for text in texts]


def _normal(text: str) -> str:
    # Several tokenizers compose characters (NFC); the words stay the same.
    return unicodedata.normalize("NFC", text)


def _s(items: Sequence[Any]) -> str:
    return "" if len(items) == 1 else "s"
