"""Generation for many requests at once: continuous batching on one thread.

The loop admits waiting requests, computes what is new in their prompts, then takes one decoding step for every row,
again and again. Rows leave after any step; new ones join at once where few run, else a few together. Three things spare
work that a plain padded batch does: a prompt's beginning that was seen before (shared instructions, or the earlier
turns of a conversation) is copied instead of computed, identical prompts are computed once, and a finished row leaves
the batch at once.
"""

from __future__ import annotations

import copy
import os
import random
import threading
import time
from collections import deque
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from gymtrl.errors import RunError, UserError
from gymtrl.serving.batch import forward_rows
from gymtrl.serving.cache import SlotCache
from gymtrl.serving.prefixes import PrefixStore, Tokens, shared_prefixes
from gymtrl.serving.request import GenerationRequest, GenerationResult
from gymtrl.serving.sampling import choose
from gymtrl.serving.suitability import check_slots

GATHER_SECONDS = 0.005
"""An idle engine waits this long after a request for the others of its group."""

TOGETHER = 8
"""New rows wait for others until they are one to this many running ones: computing a few prompts takes nearly as long
as computing many."""

PATIENCE = 8
"""Decoding steps that a new row waits for others at most."""

PREFIX_BYTES = 512 * 2**20
"""Keys and values of past sequences that are remembered."""

CGROUP_LIMIT = Path("/sys/fs/cgroup/memory.max")
"""Where a container finds how much of the machine's memory is its own."""


@dataclass(slots=True, eq=False)
class _Row:
    request: GenerationRequest
    future: Future[GenerationResult]
    generator: random.Random
    generated: list[int] = field(default_factory=list)
    log_probs: list[float] = field(default_factory=list)
    cached_tokens: int | None = None

    @property
    def tokens(self) -> Tokens:
        return (*self.request.prompt_ids, *self.generated)

    @property
    def length(self) -> int:
        return len(self.request.prompt_ids) + len(self.generated)


class Engine:
    """Generates for requests that arrive at any time, from any thread.

    Args:
        model (`PreTrainedModel`): A causal language model with full attention in every layer.
        tokenizer (`PreTrainedTokenizerBase`): Its tokenizer.
        max_batch (`int`, *optional*, defaults to 64): Rows decoded together at most.
        prefix_bytes (`int`, *optional*, defaults to 512 MB): Keys and values that are remembered after use, at most.
        cache_tokens (`int`, *optional*): Tokens that the slots of all rows have room for, used or not; when rows grow
            beyond it, the batch's last row goes back to the queue and is computed again later. A row alone may exceed
            it. By default a quarter of the memory of machine or container, or half of what is free on the GPU.
        threads (`int`, *optional*): CPU threads of a forward pass. Torch's choice by default.

    Raises:
        UserError: The model cannot be served this way.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        max_batch: int = 64,
        prefix_bytes: int = PREFIX_BYTES,
        cache_tokens: int | None = None,
        threads: int | None = None,
    ) -> None:
        if max_batch < 1:
            raise UserError(f"max_batch is {max_batch}", remedy="give at least 1")
        if threads is not None and threads < 1:
            raise UserError(f"threads is {threads}", remedy="give at least 1, or none for torch's choice")
        self.model = model.eval()
        self.tokenizer = tokenizer
        self.max_length: int = model.config.max_position_embeddings
        self.max_batch = max_batch
        self.eos_ids = eos_ids(model, tokenizer)
        self.failure: str | None = None
        """Why the engine died, if it did."""
        check_slots(model)
        # Fast tokenizers refuse use from two threads at once; the caller keeps using its own.
        self._tokenizer = copy.deepcopy(tokenizer)
        limit = cache_tokens or _free_bytes(model.device) // 2 // _token_bytes(model)
        self._cache = SlotCache(model.config.num_hidden_layers, limit)
        self._store = PrefixStore(prefix_bytes // _token_bytes(model))
        self._rows: list[_Row] = []
        self._waiting: deque[_Row] = deque()
        self._open: set[_Row] = set()
        self._waited = 0
        self._threads = threads
        self._wake = threading.Condition()
        self._stopping = False
        self._thread = threading.Thread(target=self._run, name="gymtrl-engine", daemon=True)
        self._thread.start()

    @property
    def running(self) -> int:
        """Rows in the batch."""
        return len(self._rows)

    @property
    def waiting(self) -> int:
        """Requests that are not in the batch yet."""
        return len(self._waiting)

    def submit(self, request: GenerationRequest) -> Future[GenerationResult]:
        """Queues a request. Cancelling the future takes its row out of the batch.

        Raises:
            UserError: The request does not fit the model's context.
            RunError: The engine is closed or has failed.
        """
        total = len(request.prompt_ids) + request.max_new_tokens
        if not request.prompt_ids or request.max_new_tokens < 1 or total > self.max_length:
            raise UserError(
                f"{len(request.prompt_ids)} prompt tokens and {request.max_new_tokens} new ones do not fit: "
                f"at least one each, {self.max_length} together at most"
            )
        row = _Row(request, Future(), random.Random(request.seed))
        with self._wake:
            if self._stopping or self.failure:
                raise RunError(self.failure or "the engine is closed")
            self._open.add(row)
            self._waiting.append(row)
            self._wake.notify()
        return row.future

    def close(self, timeout: float = 1.0) -> bool:
        """Fails what is queued or running and ends the thread.

        Args:
            timeout (`float`, *optional*, defaults to 1.0): Seconds to wait for a forward pass in progress.

        Returns:
            `bool`: Whether the thread has ended.
        """
        with self._wake:
            self._stopping = True
            self._wake.notify()
        # Here and not on the engine's thread: callers need not wait for a long forward pass to learn it.
        self._fail(RunError("the engine was closed"))
        self._thread.join(timeout)
        return not self._thread.is_alive()

    def _fail(self, error: Exception) -> None:
        with self._wake:
            failed, self._open = self._open, set()
            self._waiting.clear()
        for row in failed:
            if row.future.set_running_or_notify_cancel():
                row.future.set_exception(error)

    def _run(self) -> None:
        try:
            if self._threads is not None:
                torch.set_num_threads(self._threads)
            with torch.inference_mode():
                while self._gather():
                    self._step()
        except Exception as error:
            # Whatever broke, the batch's state can no longer be trusted: say so to everyone instead of hanging.
            self.failure = f"generation failed: {type(error).__name__}: {error}"
            self._fail(RunError(self.failure))

    def _gather(self) -> bool:
        """Waits for work; False when the engine is to end."""
        with self._wake:
            if not self._rows and not self._waiting and not self._stopping:
                self._cache.release()
                self._wake.wait_for(lambda: self._waiting or self._stopping)
                idle = True
            else:
                idle = False
        if idle:
            time.sleep(GATHER_SECONDS)
        return not self._stopping

    def _step(self) -> None:
        for index in reversed(range(len(self._rows))):
            if self._rows[index].future.cancelled():
                with self._wake:
                    self._open.discard(self._rows[index])
                self._remove(index)
        admitted = self._admit()
        if admitted:
            self._advance(admitted, self._prefill(admitted))
        while len(self._rows) > 1 and self._overfull(len(self._rows)):
            last = self._rows[-1]
            self._remove(len(self._rows) - 1)
            with self._wake:
                self._waiting.appendleft(last)
        if self._rows:
            self._reserve(len(self._rows), self._longest())
            logits = forward_rows(
                self.model,
                self._cache,
                0,
                [row.generated[-1:] for row in self._rows],
                [row.length - 1 for row in self._rows],
            )
            self._advance(self._rows, logits)

    def _longest(self) -> int:
        return max((row.length for row in self._rows), default=0)

    def _overfull(self, rows: int, longest: int = 0) -> bool:
        return not self._cache.fits(rows, max(longest, self._longest()) + 1)

    def _reserve(self, slots: int, tokens: int) -> None:
        """Makes room for rows of so many tokens and one column more, which padding uses."""
        columns = max(tokens + 1, self._cache.columns)
        if not self._cache.fits(max(slots, self._cache.slots), columns):
            # Room that earlier rows left behind goes first.
            self._cache.trim(len(self._rows), self._longest() + 1)
        self._cache.reserve(slots, tokens + 1)

    def _admit(self) -> list[_Row]:
        admitted: list[_Row] = []
        with self._wake:
            could = min(len(self._waiting), self.max_batch - len(self._rows))
            if could < len(self._rows) // TOGETHER and self._waited < PATIENCE:
                if could:
                    self._waited += 1
                return []
            self._waited = 0
            longest = 0
            while self._waiting and len(self._rows) + len(admitted) < self.max_batch:
                row = self._waiting[0]
                longest = max(longest, row.length)
                count = len(self._rows) + len(admitted) + 1
                if count > 1 and self._overfull(count, longest):
                    break
                self._waiting.popleft()
                if row.future.cancelled():
                    self._open.discard(row)
                else:
                    admitted.append(row)
        return admitted

    def _prefill(self, admitted: list[_Row]) -> torch.Tensor:
        """Computes the prompts of new rows in the slots behind the batch, and makes them part of it.

        Returns the logits after the last token of each, in the order of `admitted`, which is reordered.
        """
        base = len(self._rows)
        alike: dict[Tokens, list[_Row]] = {}
        for row in admitted:
            alike.setdefault(row.tokens, []).append(row)
        for prefix in shared_prefixes(list(alike)):
            self._remember_prefix(prefix, base)
        known = {tokens: self._store.match(tokens, len(tokens) - 1) for tokens in alike}
        # By length of what is left to compute: neighbours in a batch then need little padding.
        order = sorted(alike, key=lambda tokens: len(tokens) - known[tokens][1])
        self._reserve(base + len(admitted), max(map(len, order)))
        for slot, tokens in enumerate(order, base):
            saved, length = known[tokens]
            if saved is not None:
                self._cache.write([slot], saved, length)
        starts = [known[tokens][1] for tokens in order]
        logits = forward_rows(
            self.model,
            self._cache,
            base,
            [tokens[start:] for tokens, start in zip(order, starts, strict=True)],
            starts,
        )
        firsts = [alike[tokens][0] for tokens in order]
        twins = [(row, place) for place, tokens in enumerate(order) for row in alike[tokens][1:]]
        for slot, (row, place) in enumerate(twins, base + len(order)):
            self._cache.copy(base + place, slot, row.length)
        for row, start in zip(firsts, starts, strict=True):
            row.cached_tokens = start if row.cached_tokens is None else row.cached_tokens
        for row, _ in twins:
            row.cached_tokens = row.length if row.cached_tokens is None else row.cached_tokens
        admitted[:] = [*firsts, *(row for row, _ in twins)]
        self._rows += admitted
        return logits[[*range(len(order)), *(place for _, place in twins)]]

    def _remember_prefix(self, prefix: Tokens, slot: int) -> None:
        if len(prefix) > self._store.max_tokens or self._store.covers(prefix):
            return
        saved, start = self._store.match(prefix, len(prefix) - 1)
        self._reserve(slot + 1, len(prefix))
        if saved is not None:
            self._cache.write([slot], saved, start)
        forward_rows(self.model, self._cache, slot, [prefix[start:]], [start])
        self._store.put(prefix, self._cache.read(slot, len(prefix)))

    def _advance(self, rows: list[_Row], logits: torch.Tensor) -> None:
        """Chooses the next token of some rows and removes those that are done."""
        tokens, log_probs = choose(
            logits,
            [row.request.sampling for row in rows],
            [row.generator.random() for row in rows],
        )
        done: list[tuple[_Row, GenerationResult]] = []
        for row, token, log_prob in zip(rows, tokens, log_probs, strict=True):
            row.generated.append(token)
            row.log_probs.append(log_prob)
            ended = token in self.eos_ids
            stopped = ended or self._at_stop(row)
            if stopped or len(row.generated) == row.request.max_new_tokens:
                result = GenerationResult(
                    token_ids=tuple(row.generated),
                    log_probs=tuple(row.log_probs),
                    finish_reason="stop" if stopped else "length",
                    ended=ended,
                    cached_tokens=row.cached_tokens or 0,
                )
                done.append((row, result))
        for row, result in done:
            with self._wake:
                # `close` may be failing the same future from its own thread; whoever takes it out settles it.
                mine = row in self._open
                self._open.discard(row)
            if mine and row.future.set_running_or_notify_cancel():
                row.future.set_result(result)
            self._remove(self._rows.index(row))

    def _at_stop(self, row: _Row) -> bool:
        for text in row.request.stop:
            # The newest token can only complete a stop text that began within as many tokens as it has bytes.
            tail = row.generated[-len(text.encode()) - 8 :]
            if text in decode(self._tokenizer, tail):
                return True
        return False

    def _remove(self, index: int) -> None:
        """Takes a row out of the batch, remembers its tokens, and moves the last row into its slot."""
        row = self._rows[index]
        # The newest token was chosen but never fed, so it has no keys and values yet.
        seen = row.tokens[:-1]
        if len(seen) <= self._store.max_tokens and not self._store.covers(seen):
            self._store.put(seen, self._cache.read(index, len(seen)))
        last = self._rows.pop()
        if last is not row:
            self._cache.copy(len(self._rows), index, last.length)
            self._rows[index] = last


def decode(tokenizer: PreTrainedTokenizerBase, ids: list[int] | Tokens, *, special: bool = False) -> str:
    """Text of token ids, special tokens left out unless asked for, spaces as they are."""
    text = tokenizer.decode(list(ids), skip_special_tokens=not special, clean_up_tokenization_spaces=False)
    assert isinstance(text, str)
    return text


def eos_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    """Ids that end a reply: those of the generation config and the tokenizer's own."""
    configured = getattr(model.generation_config, "eos_token_id", None)
    ids = configured if isinstance(configured, list) else [configured]
    return frozenset(i for i in [*ids, tokenizer.eos_token_id] if isinstance(i, int))


def _free_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    # Not what is unused right now: most of the rest holds files that the system gives up when asked.
    machine = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    try:
        allowed = CGROUP_LIMIT.read_text().strip()
    except OSError:
        allowed = ""
    return min(machine, int(allowed) if allowed.isdecimal() else machine) // 2


def _token_bytes(model: PreTrainedModel) -> int:
    """Bytes of keys and values for one token, all layers together."""
    config = model.config
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return int(2 * config.num_hidden_layers * heads * size * model.dtype.itemsize)
