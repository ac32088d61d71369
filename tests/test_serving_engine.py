"""The generation engine against plain transformers: a tiny random Llama for many shapes, the real model for truth."""

from __future__ import annotations

import random
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from scipy import stats
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    FalconConfig,
    FalconForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
    T5Config,
)

from gymtrl.errors import RunError, UserError
from gymtrl.serving import engine as engine_module
from gymtrl.serving.batch import forward_rows
from gymtrl.serving.cache import SlotCache, SlotLayer
from gymtrl.serving.engine import Engine, _free_bytes, _token_bytes
from gymtrl.serving.prefixes import MIN_SHARED_TOKENS, PrefixStore, shared_prefixes
from gymtrl.serving.request import GenerationRequest, GenerationResult
from gymtrl.serving.sampling import Sampling, choose
from gymtrl.serving.suitability import check_slots, refuse_unsuitable

GREEDY = Sampling(temperature=0.0)
TIE = 1e-4
"""Logits closer than this count as tied: another order of summation may swap them."""


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """One word a token: `w0`, `w1`, …, with `w2` for the end of a reply."""
    words = Tokenizer(WordLevel({f"w{i}": i for i in range(97)}, unk_token="w0"))
    words.pre_tokenizer = WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=words, eos_token="w2", pad_token="w1", unk_token="w0")


def tiny_model(hidden_size: int = 48, num_hidden_layers: int = 3) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=97,
        hidden_size=hidden_size,
        intermediate_size=64,
        num_hidden_layers=num_hidden_layers,
        num_attention_heads=6,
        num_key_value_heads=2,
        max_position_embeddings=512,
        initializer_range=0.3,
        bos_token_id=None,
        eos_token_id=2,
        pad_token_id=1,
    )
    return LlamaForCausalLM(config).eval()


@pytest.fixture(scope="module")
def tiny() -> LlamaForCausalLM:
    return tiny_model()


@pytest.fixture
def engine(tiny: LlamaForCausalLM) -> Iterator[Engine]:
    running = Engine(tiny, tiny_tokenizer(), max_batch=8)
    yield running
    running.close()


def request(prompt: tuple[int, ...], new: int = 12, **settings: object) -> GenerationRequest:
    settings.setdefault("sampling", GREEDY)
    return GenerationRequest(prompt, new, **settings)  # type: ignore[arg-type]


def prompts(count: int, *, shared: int = 0, seed: int = 0) -> list[tuple[int, ...]]:
    draw = random.Random(seed)
    head = [draw.randrange(3, 97) for _ in range(shared)]
    return [(*head, *(draw.randrange(3, 97) for _ in range(draw.randint(1, 30)))) for _ in range(count)]


@torch.inference_mode()
def reference(model: PreTrainedModel, prompt: tuple[int, ...], new: int) -> tuple[int, ...]:
    ids = torch.tensor([prompt])
    output = model.generate(
        ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=new, pad_token_id=1
    )
    return tuple(output[0, len(prompt) :].tolist())


@torch.inference_mode()
def logits_after(model: PreTrainedModel, prompt: tuple[int, ...], reply: tuple[int, ...]) -> torch.Tensor:
    """`[len(reply), vocabulary]`: the logits that each token of the reply was chosen from."""
    ids = torch.tensor([[*prompt, *reply]])
    return model(input_ids=ids, logits_to_keep=len(reply) + 1).logits[0, :-1].float()


def parting(
    model: PreTrainedModel, prompt: tuple[int, ...], got: GenerationResult, wanted: tuple[int, ...]
) -> float | None:
    """Checks the log-probabilities, and that the best two logits are in question where the tokens part from others.

    Returns how far apart those two are, or None if the tokens are the same.
    """
    logits = logits_after(model, prompt, got.token_ids)
    expected = logits.log_softmax(-1).gather(-1, torch.tensor(got.token_ids)[:, None])[:, 0]
    torch.testing.assert_close(torch.tensor(got.log_probs), expected, atol=1e-4, rtol=0)
    if got.token_ids == wanted:
        return None
    differing = (i for i, (a, b) in enumerate(zip(got.token_ids, wanted, strict=False)) if a != b)
    place = next(differing, None)
    assert place is not None, f"{len(got.token_ids)} tokens instead of {len(wanted)}"
    best = logits[place].topk(2)
    assert {got.token_ids[place], wanted[place]} == set(best.indices.tolist())
    return float(best.values[0] - best.values[1])


def check_reply(
    model: PreTrainedModel, prompt: tuple[int, ...], got: GenerationResult, wanted: tuple[int, ...]
) -> None:
    """Checks tokens, ties aside, and log-probabilities."""
    apart = parting(model, prompt, got, wanted)
    assert apart is None or apart < TIE


@pytest.mark.parametrize("shared", [0, 40])
@pytest.mark.parametrize("count", [1, 7, 30])
def test_greedy_equals_generate(engine: Engine, tiny: LlamaForCausalLM, count: int, shared: int) -> None:
    asked = prompts(count, shared=shared)
    futures = [engine.submit(request(prompt)) for prompt in asked]
    for prompt, future in zip(asked, futures, strict=True):
        check_reply(tiny, prompt, future.result(30), reference(tiny, prompt, 12))


def test_rows_join_and_leave_while_others_run(engine: Engine, tiny: LlamaForCausalLM) -> None:
    asked = prompts(20, seed=1)
    lengths = [3 + 7 * (i % 6) for i in range(20)]
    futures = []
    for prompt, new in zip(asked, lengths, strict=True):
        futures.append(engine.submit(request(prompt, new)))
        time.sleep(0.01)
    for prompt, new, future in zip(asked, lengths, futures, strict=True):
        check_reply(tiny, prompt, future.result(30), reference(tiny, prompt, new))


def test_new_rows_wait_for_each_other_a_few_steps_and_no_more(
    tiny: LlamaForCausalLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    passes: list[int] = []

    def counted(*given: Any) -> torch.Tensor:
        passes.append(len(given[3]))
        return forward_rows(*given)

    def steps(count: int) -> None:
        """Waits until the rows that run took so many steps more."""
        end, wanted = time.monotonic() + 10, len(passes) + count
        while len(passes) < wanted and time.monotonic() < end:
            time.sleep(0.001)

    monkeypatch.setattr("gymtrl.serving.engine.forward_rows", counted)
    monkeypatch.setattr("gymtrl.serving.engine.PATIENCE", 60)
    running = Engine(tiny, tiny_tokenizer(), max_batch=64)
    running.eos_ids = frozenset()
    try:
        first = [running.submit(request(prompt, 400)) for prompt in prompts(32, seed=3)]
        while running.running < 32 and not first[0].done():
            time.sleep(0.001)
        before = len(passes)
        lone = running.submit(request(prompts(1, seed=4)[0], 1))
        assert lone.result(30).token_ids and not first[0].done()
        assert passes.index(1, before) - before >= 60  # by itself in the end

        monkeypatch.setattr("gymtrl.serving.engine.PATIENCE", 10**6)
        before = len(passes)
        asked = []
        for prompt in prompts(4, seed=5):  # one to eight of those that run
            asked.append(running.submit(request(prompt, 1)))
            steps(3)
        assert all(future.result(30).token_ids for future in asked) and not first[0].done()
        assert set(passes[before:]) == {32, 4}
    finally:
        running.close(5)


def test_passes_take_the_threads_they_are_given_and_the_callers_stay(
    tiny: LlamaForCausalLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: set[int] = set()

    def noted(*given: Any) -> torch.Tensor:
        seen.add(torch.get_num_threads())
        return forward_rows(*given)

    monkeypatch.setattr("gymtrl.serving.engine.forward_rows", noted)
    before = torch.get_num_threads()
    running = Engine(tiny, tiny_tokenizer(), threads=before + 1)
    running.submit(request((5, 6, 7), 2)).result(30)
    assert running.close(5)
    assert seen == {before + 1} and torch.get_num_threads() == before
    with pytest.raises(UserError, match="threads is 0"):
        Engine(tiny, tiny_tokenizer(), threads=0)


def test_next_turn_reuses_the_last_one(engine: Engine, tiny: LlamaForCausalLM) -> None:
    prompt = prompts(1, shared=20)[0]
    known = 0
    for turn in range(4):
        result = engine.submit(request(prompt, 9)).result(30)
        check_reply(tiny, prompt, result, reference(tiny, prompt, 9))
        assert result.cached_tokens == known
        # All but the last token of a reply has been fed, so its keys and values are there.
        known = len(prompt) + len(result.token_ids) - 1
        prompt = (*prompt, *result.token_ids, 11 + turn, 12, 13)


def test_identical_prompts_are_computed_once(engine: Engine, tiny: LlamaForCausalLM) -> None:
    prompt = prompts(1, shared=30)[0]
    results = [future.result(30) for future in [engine.submit(request(prompt)) for _ in range(6)]]
    for result in results:
        check_reply(tiny, prompt, result, reference(tiny, prompt, 12))
    assert sum(result.cached_tokens >= len(prompt) - 1 for result in results) >= 5


# Room for one row; for fewer at their full length than at first; for all, but not for growth ahead of need.
@pytest.mark.parametrize("limit", [100, 1000, 1024])
def test_rows_that_outgrow_memory_are_computed_again(
    tiny: LlamaForCausalLM, monkeypatch: pytest.MonkeyPatch, limit: int
) -> None:
    allocated: list[tuple[int, int]] = []
    resize = SlotLayer.resize

    def recording(layer: SlotLayer, slots: int, columns: int) -> None:
        allocated.append((slots, columns))
        resize(layer, slots, columns)

    engine = Engine(tiny, tiny_tokenizer(), max_batch=8, cache_tokens=limit, prefix_bytes=0)
    monkeypatch.setattr(SlotLayer, "resize", recording)
    try:
        asked = prompts(8, seed=2)
        futures = [engine.submit(request(prompt, 40)) for prompt in asked]
        for prompt, future in zip(asked, futures, strict=True):
            check_reply(tiny, prompt, future.result(60), reference(tiny, prompt, 40))
    finally:
        engine.close()
    assert allocated and all(slots * columns <= limit for slots, columns in allocated if slots > 1)


def test_room_of_long_rows_is_given_back_to_many_short_ones(tiny: LlamaForCausalLM) -> None:
    engine = Engine(tiny, tiny_tokenizer(), max_batch=8, cache_tokens=1024, prefix_bytes=0)
    try:
        long = engine.submit(request(tuple(range(3, 90)) * 5, 60, sampling=Sampling(), seed=1))
        asked = prompts(12, seed=9)
        futures = [engine.submit(request(prompt, 70)) for prompt in asked]
        assert long.result(60).token_ids
        for prompt, future in zip(asked, futures, strict=True):
            check_reply(tiny, prompt, future.result(60), reference(tiny, prompt, 70))
    finally:
        engine.close()


def test_padding_needs_one_column(tiny: LlamaForCausalLM) -> None:
    cache = SlotCache(3)
    rows = [list(prompt) for prompt in ([5] * 120, [7, 8, 9] * 40)]
    with torch.inference_mode():
        forward_rows(tiny, cache, 0, [rows[0][:110]], [0])
        got = forward_rows(tiny, cache, 0, [rows[0][110:], rows[1]], [110, 0])
        assert cache.columns == 128
        for row, logits in zip(rows, got, strict=True):
            torch.testing.assert_close(logits, tiny(torch.tensor([row])).logits[0, -1], atol=1e-4, rtol=1e-4)


def test_remembered_prefixes_are_bounded_in_bytes(tiny: LlamaForCausalLM) -> None:
    limit = 50 * _token_bytes(tiny) + 1
    engine = Engine(tiny, tiny_tokenizer(), prefix_bytes=limit)
    try:
        for prompt in prompts(8, seed=10):
            engine.submit(request(prompt, 20)).result(30)
    finally:
        assert engine.close(30)  # what a finished row leaves behind is stored after its result is given
    held = [tensor for saved in engine._store._saved.values() for tensor in saved]
    assert held and sum(tensor.nbytes for tensor in held) <= limit


def test_a_containers_memory_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine_module, "CGROUP_LIMIT", tmp_path / "memory.max")
    whole = _free_bytes(torch.device("cpu"))
    for text, wanted in (("max\n", whole), ("1048576\n", 2**19), (f"{2**60}\n", whole)):
        (tmp_path / "memory.max").write_text(text)
        assert _free_bytes(torch.device("cpu")) == wanted


def test_long_prompts_are_fed_in_pieces(tiny: LlamaForCausalLM, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("gymtrl.serving.batch.MAX_FORWARD_TOKENS", 7)
    rows = [list(prompt) for prompt in prompts(5, seed=3)]
    with torch.inference_mode():
        got = forward_rows(tiny, SlotCache(3), 0, rows, [0] * 5)
        for row, logits in zip(rows, got, strict=True):
            torch.testing.assert_close(logits, tiny(torch.tensor([row])).logits[0, -1], atol=1e-4, rtol=1e-4)


def test_cancelled_rows_leave(engine: Engine, tiny: LlamaForCausalLM) -> None:
    long = [engine.submit(request(prompt, 450)) for prompt in prompts(8, seed=4)]
    waiting = engine.submit(request((5, 6, 7)))
    time.sleep(0.1)
    for future in long:
        future.cancel()
    assert waiting.result(10).token_ids == reference(tiny, (5, 6, 7), 12)
    deadline = time.monotonic() + 5
    while engine.running and time.monotonic() < deadline:
        time.sleep(0.01)
    assert (engine.running, engine.waiting) == (0, 0)


def test_end_of_sequence_is_a_token_of_the_reply(tiny: LlamaForCausalLM, engine: Engine) -> None:
    ends = [
        result
        for prompt in prompts(40, seed=5)
        if (result := engine.submit(request(prompt, 200, sampling=Sampling(), seed=1)).result(30)).ended
    ]
    assert ends
    for result in ends:
        assert result.token_ids[-1] == 2 and 2 not in result.token_ids[:-1]
        assert result.finish_reason == "stop"


def test_stop_text(tiny: LlamaForCausalLM, engine: Engine) -> None:
    replies = ((prompt, engine.submit(request(prompt, 20)).result(30).token_ids) for prompt in prompts(40, seed=6))
    prompt, whole = next((prompt, reply) for prompt, reply in replies if len(reply) > 9)
    stop = f"w{whole[4]} w{whole[5]}"
    result = engine.submit(request(prompt, 20, stop=(stop,))).result(30)
    assert result.token_ids == whole[: len(result.token_ids)] and len(result.token_ids) <= 6
    assert (result.finish_reason, result.ended) == ("stop", False)


def test_close_fails_what_is_running(tiny: LlamaForCausalLM) -> None:
    engine = Engine(tiny, tiny_tokenizer())
    futures = [engine.submit(request(prompt, 450)) for prompt in prompts(3)]
    assert engine.close(timeout=5)
    for future in futures:
        with pytest.raises(RunError, match="closed"):
            future.result(1)
    with pytest.raises(RunError, match="closed"):
        engine.submit(request((5, 6)))


def test_a_crash_reaches_every_request_and_later_ones() -> None:
    model = tiny_model()
    engine = Engine(model, tiny_tokenizer())
    futures = [engine.submit(request(prompt, 450)) for prompt in prompts(3)]
    # Real damage to a real model: half of a weight is gone from the next step on.
    model.lm_head.weight.data = model.lm_head.weight.data[:, :24]
    for future in futures:
        with pytest.raises(RunError, match="generation failed"):
            future.result(10)
    assert engine.failure
    with pytest.raises(RunError, match="generation failed"):
        engine.submit(request((5, 6)))
    engine.close()


def test_requests_that_do_not_fit_are_refused(engine: Engine) -> None:
    for bad in (request((), 5), request((5,), 0), request((5,) * 500, 13)):
        with pytest.raises(UserError, match="do not fit"):
            engine.submit(bad)


@pytest.mark.parametrize("settings", [Sampling(), Sampling(0.7, top_p=0.9), Sampling(1.3, top_k=20, min_p=0.01)])
def test_a_seed_repeats_alone_and_in_a_crowd(engine: Engine, settings: Sampling) -> None:
    asked = prompts(8, shared=20, seed=7)
    seeded = [request(prompt, 20, sampling=settings, seed=i) for i, prompt in enumerate(asked)]
    alone = [engine.submit(one).result(30) for one in seeded]
    crowd = [future.result(30) for future in [engine.submit(one) for one in seeded]]
    assert [r.token_ids for r in alone] == [r.token_ids for r in crowd]
    other = engine.submit(request(asked[0], 20, sampling=settings, seed=99)).result(30)
    assert other.token_ids != alone[0].token_ids
    unseeded = {engine.submit(request(asked[0], 20)).result(30).token_ids for _ in range(2)}
    assert len(unseeded) == 1  # greedy needs no seed


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_frequencies_follow_the_softmax(temperature: float) -> None:
    torch.manual_seed(0)
    logits = torch.randn(12) * 2
    draw = random.Random(0)
    count = 20_000
    tokens, log_probs = choose(
        logits.expand(count, -1), [Sampling(temperature)] * count, [draw.random() for _ in range(count)]
    )
    expected = (logits / temperature).softmax(-1).double()
    seen = Counter(tokens)
    test = stats.chisquare([seen[i] for i in range(12)], (expected / expected.sum() * count).numpy())
    assert test.pvalue > 0.01
    torch.testing.assert_close(torch.tensor(log_probs), expected.log().float()[tokens], atol=1e-5, rtol=0)


def test_cuts_keep_what_they_say_and_log_probs_ignore_them() -> None:
    logits = torch.tensor([0.5, 0.3, 0.15, 0.04, 0.01]).log()[None]
    draw = random.Random(0)

    def kept(settings: Sampling) -> set[int]:
        tokens, log_probs = choose(logits.expand(2000, -1), [settings] * 2000, [draw.random() for _ in range(2000)])
        for token, log_prob in zip(tokens, log_probs, strict=True):
            assert log_prob == pytest.approx(float(logits[0, token]), abs=1e-5)
        return set(tokens)

    assert kept(Sampling(top_k=2)) == {0, 1}
    assert kept(Sampling(top_p=0.9)) == {0, 1, 2}
    assert kept(Sampling(min_p=0.2)) == {0, 1, 2}
    assert kept(Sampling(temperature=0)) == {0}


def test_extreme_draws_stay_inside_the_kept_tokens() -> None:
    logits = torch.full((2, 5000), -50.0)
    logits[:, 17], logits[:, 4000] = 1.0, 1.0
    tokens, _ = choose(logits, [Sampling(top_k=2)] * 2, [0.0, 1 - 2**-53])
    assert tokens == [17, 4000]


def test_prefix_store() -> None:
    def saved(length: int) -> tuple[torch.Tensor, torch.Tensor]:
        return torch.zeros(1, 1, length, 1), torch.zeros(1, 1, length, 1)

    store = PrefixStore(10)
    store.put((1, 2, 3), saved(3))
    store.put((1, 2, 3, 4), saved(4))
    assert store.tokens == 4  # the shorter one said nothing more
    store.put((1, 2), saved(2))
    assert store.tokens == 4
    assert store.match((1, 2, 3, 9), 10)[1] == 3
    assert store.match((1, 2, 3, 4), 3)[1] == 3
    assert store.match((7,), 10) == (None, 0)
    store.put((5, 6, 7, 8), saved(4))
    store.match((1,), 1)
    store.put((9, 9, 9, 9), saved(4))  # drops the least recently used one, 5 6 7 8
    assert store.match((5, 6), 10)[1] == 0
    assert store.match((1, 2), 10)[1] == 2
    store.put(tuple(range(11)), saved(11))
    assert store.tokens == 8


def test_shared_prefixes() -> None:
    system, other = tuple(range(100, 120)), tuple(range(200, 230))
    found = shared_prefixes([(*system, 1), (*other, 1, 2), (*system, 2), (*other, 3), (5, 6, 7), (5, 6, 8)])
    assert sorted(found) == [system, other]
    # The whole of the shortest prompt is never the prefix: its last token must be fed.
    assert shared_prefixes([system, (*system, 1)]) == [system[:-1]]


class CountsForItself(LlamaForCausalLM):
    """Numbers its positions by the cache's length, whatever it is told."""

    def forward(self, *args: object, position_ids: object = None, **kwargs: object) -> object:
        return super().forward(*args, **kwargs)


def test_models_that_would_be_served_wrong_are_refused(tiny: LlamaForCausalLM) -> None:
    check_slots(tiny)
    # Its position bias is built from a padding mask, which the slots have none of.
    alibi = FalconForCausalLM(
        FalconConfig(vocab_size=50, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, alibi=True)
    ).eval()
    with pytest.raises(UserError, match="cache") as caught:
        check_slots(alibi)
    assert "vLLM" in str(caught.value.remedy)
    counting = CountsForItself(tiny.config).eval()
    counting.load_state_dict(tiny.state_dict())
    with pytest.raises(UserError, match="other logits"):
        check_slots(counting)
    refuse_unsuitable(tiny.config)
    for config in (
        T5Config(),
        MistralConfig(sliding_window=4096, max_position_embeddings=32768),
        LlamaConfig(rope_parameters={"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}),
    ):
        with pytest.raises(UserError):
            refuse_unsuitable(config)


def test_many_threads_submit(engine: Engine, tiny: LlamaForCausalLM) -> None:
    asked = prompts(32, seed=8)
    results: dict[int, GenerationResult] = {}

    def ask(index: int) -> None:
        results[index] = engine.submit(request(asked[index], 6)).result(30)

    threads = [threading.Thread(target=ask, args=(i,)) for i in range(32)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for index, prompt in enumerate(asked):
        check_reply(tiny, prompt, results[index], reference(tiny, prompt, 6))


@pytest.fixture(scope="module")
def real(smollm2_dir: Path) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    model = AutoModelForCausalLM.from_pretrained(smollm2_dir, dtype=torch.float32).eval()
    return model, AutoTokenizer.from_pretrained(smollm2_dir)


def chat(tokenizer: PreTrainedTokenizerBase, messages: list[dict[str, str]]) -> tuple[int, ...]:
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    return tuple(tokenizer(text, add_special_tokens=False).input_ids)


def real_prompts(tokenizer: PreTrainedTokenizerBase, count: int, shared: bool) -> list[tuple[int, ...]]:
    """Chats that share a system prompt, or little more than the header that all of them begin with."""
    subjects = ["a river", "seven", "the moon landing of 1969", "bread", "x", "why cats sleep all day long, in short"]
    asked = []
    for i in range(count):
        system = "You write short texts on whatever the user names." if shared else f"{i * 7919 % 1000} is your number."
        user = f"Write about {subjects[i % 6]} and the number {i * 37 % 101}."
        asked.append(
            chat(tokenizer, [{"role": "system", "content": system}, {"role": "user", "content": user}]),
        )
    return asked


def references(
    model: PreTrainedModel, asked: list[tuple[int, ...]], new: int, ends: frozenset[int]
) -> list[tuple[int, ...]]:
    """Replies by plain `generate`: one prompt at a time, and many in a left-padded batch, which takes minutes less."""
    if len(asked) <= 7:
        return [reference(model, prompt, new) for prompt in asked]
    longest = max(map(len, asked))
    ids = torch.tensor([[2] * (longest - len(prompt)) + list(prompt) for prompt in asked])
    mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in asked])
    with torch.inference_mode():
        batch = model.generate(ids, attention_mask=mask, do_sample=False, max_new_tokens=new)[:, longest:].tolist()
    # What follows the end of a reply is padding.
    return [tuple(row[: next((i + 1 for i, token in enumerate(row) if token in ends), new)]) for row in batch]


@pytest.mark.slow
@pytest.mark.parametrize("shared", [False, True], ids=["apart", "shared"])
@pytest.mark.parametrize(("count", "new"), [(1, 16), (7, 16), (64, 8)])
def test_real_model_greedy_equals_generate(
    real: tuple[PreTrainedModel, PreTrainedTokenizerBase],
    record_property: Callable[[str, object], None],
    count: int,
    new: int,
    shared: bool,
) -> None:
    model, tokenizer = real
    asked = real_prompts(tokenizer, count, shared)
    engine = Engine(model, tokenizer)
    try:
        results = [f.result(300) for f in [engine.submit(request(prompt, new)) for prompt in asked]]
    finally:
        engine.close()
    for result in results:
        assert len(result.token_ids) == new or result.token_ids[-1] in engine.eos_ids
    if count > 1:
        assert (sum(result.cached_tokens >= MIN_SHARED_TOKENS for result in results) == count) == shared
    wanted = references(model, asked, new, engine.eos_ids)
    apart = [parting(model, *each) for each in zip(asked, results, wanted, strict=True)]
    parted = [gap for gap in apart if gap is not None]
    ties = sum(gap < TIE for gap in parted)
    record_property("ties", ties)
    assert ties == len(parted), f"of {count} replies, {ties} part at a tie and others at logits {max(parted)} apart"
