"""TRL trains on our ids and masks token for token, and on nothing else; where all is marked, it is plain TRL."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset, Features, Json, List, Value, load_dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM
from trl import DPOConfig, DPOTrainer, KTOConfig, KTOTrainer, SFTConfig, SFTTrainer

from gymtrl import TokenDPOTrainer, TokenKTOTrainer, UserError

Rows = list[dict[str, Any]]
TYPES = {
    **dict.fromkeys(("prompt", "chosen", "rejected", "completion"), List(Json())),
    **dict.fromkeys(("input_ids", "labels"), List(Value("int32"))),
    **dict.fromkeys(("prompt_ids", "chosen_ids", "rejected_ids", "completion_ids"), List(Value("int32"))),
    **dict.fromkeys(("chosen_mask", "rejected_mask", "completion_mask"), List(Value("int8"))),
    **dict.fromkeys(("file", "chosen_file", "rejected_file"), Value("string")),
    **dict.fromkeys(("line", "chosen_line", "rejected_line"), Value("int64")),
    "label": Value("bool"),
}
TEXT = ("prompt", "chosen", "rejected", "completion")
CONFIGS = {DPOTrainer: DPOConfig, TokenDPOTrainer: DPOConfig, KTOTrainer: KTOConfig, TokenKTOTrainer: KTOConfig}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory, smollm2_dir: Path) -> tuple[Path, Path]:
    """A policy and a reference: random Llamas that differ, with the real tokenizer and a template that knows tools."""
    import trl

    tokenizer = AutoTokenizer.from_pretrained(smollm2_dir)
    template = Path(trl.__file__).parent / "chat_templates" / "qwen2_5.jinja"
    tokenizer.chat_template = template.read_text(encoding="utf-8")
    folders = []
    for seed in (0, 1):
        folder = tmp_path_factory.mktemp("tiny")
        tokenizer.save_pretrained(folder)
        torch.manual_seed(seed)
        config = LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=2,
            max_position_embeddings=512,
            tie_word_embeddings=True,
            initializer_range=0.3,  # far from even odds, so that a wrong token shows
        )
        LlamaForCausalLM(config).save_pretrained(folder)
        folders.append(folder)
    return folders[0], folders[1]


def completion(answer: str) -> Rows:
    call = {"type": "function", "function": {"name": "weigh", "arguments": {"what": "the stone"}}}
    return [
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "name": "weigh", "content": f"The scales show this: {answer}"},
        {"role": "assistant", "content": answer},
    ]


def tokens(prompt: Rows, said: Rows, model: Path) -> tuple[list[int], list[int], list[int]]:
    """Ids of prompt and completion, and which of the latter the assistant wrote, by TRL's own marked template."""
    from trl.chat_template_utils import get_training_chat_template

    tokenizer = AutoTokenizer.from_pretrained(model)
    marked = tokenizer.apply_chat_template(
        prompt + said,
        chat_template=get_training_chat_template(tokenizer),
        return_dict=True,
        return_assistant_tokens_mask=True,
    )
    start = len(tokenizer.apply_chat_template(prompt, add_generation_prompt=True)["input_ids"])
    return marked["input_ids"][:start], marked["input_ids"][start:], marked["assistant_masks"][start:]


@pytest.fixture(scope="module")
def pairs(models: tuple[Path, Path]) -> Rows:
    """Four rows of a DPO dataset, of different lengths, with a tool result on both sides."""
    rows = []
    for n in range(4):
        prompt = [{"role": "user", "content": f"How heavy is stone {n}? " + "Look again. " * n}]
        sides = {"chosen": completion("Twelve kilograms." + " Sure." * n), "rejected": completion(f"Light {n}.")}
        row: dict[str, Any] = {"prompt": prompt} | sides
        for side, said in sides.items():
            row["prompt_ids"], row[f"{side}_ids"], row[f"{side}_mask"] = tokens(prompt, said, models[0])
            assert {0, 1} == set(row[f"{side}_mask"])
            row |= {f"{side}_file": "rollouts.jsonl", f"{side}_line": n + 1}
        rows.append(row)
    return rows


@pytest.fixture(scope="module")
def unpaired(pairs: Rows) -> Rows:
    """The same as rows of a KTO dataset, good and bad mixed; five, so that the last batch is a smaller one."""
    rows = []
    for n, side in enumerate(("chosen", "rejected", "rejected", "chosen")):
        pair = pairs[n]
        parts = {"completion": pair[side], "completion_ids": pair[f"{side}_ids"]}
        parts |= {"completion_mask": pair[f"{side}_mask"], "prompt_ids": pair["prompt_ids"]}
        told = {"prompt": pair["prompt"], "file": "rollouts.jsonl", "line": n + 1}
        rows.append(parts | told | {"label": side == "chosen"})
    return [*rows, rows[0] | {"label": False}]


def load(rows: Rows, folder: Path) -> Dataset:
    """Writes the rows as a dataset folder and loads it as users do."""
    features = Features({name: TYPES[name] for name in rows[0]})
    (folder / "data").mkdir(parents=True)
    Dataset.from_list(rows, features=features).to_parquet(folder / "data" / "train-00000.parquet")
    return load_dataset(str(folder), cache_dir=str(folder / "cache"))["train"]


def config(kind: Any, output: Path, **options: Any) -> Any:
    usual = {
        "per_device_train_batch_size": 3,
        "per_device_eval_batch_size": 3,
        "train_sampling_strategy": "sequential",
        "learning_rate": 1e-2,
        "num_train_epochs": 1,
        "max_length": None,
        "use_cpu": True,
        "bf16": False,
        "gradient_checkpointing": False,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
    }
    return kind(output_dir=str(output), **usual | options)


def trainer(kind: Any, models: tuple[Path, Path], rows: Dataset, output: Path, **options: Any) -> Any:
    """A trainer with a reference that is not the policy: else the first loss would be the same for all rows."""
    return kind(
        model=AutoModelForCausalLM.from_pretrained(models[0], dtype="float32"),
        ref_model=AutoModelForCausalLM.from_pretrained(models[1], dtype="float32"),
        args=config(CONFIGS[kind], output, **options),
        train_dataset=rows,
        processing_class=AutoTokenizer.from_pretrained(models[0]),
    )


def run(made: Any, work: Callable[[], Any] | None = None) -> tuple[list[dict[str, Any]], list[float]]:
    """Trains, or does the given work, and returns the batches that reached the loss, with their losses."""
    plain, batches, losses = made.compute_loss, [], []

    def compute_loss(model: Any, inputs: dict[str, Any], **options: Any) -> Any:
        batches.append({name: value.clone() for name, value in inputs.items()})
        loss = plain(model, inputs, **options)
        losses.append((loss[0] if isinstance(loss, tuple) else loss).item())
        return loss

    made.compute_loss = compute_loss
    (work or made.train)()
    return batches, losses


def unpadded(batch: dict[str, Any], kind: str = "") -> list[tuple[list[int], list[int]]]:
    """Ids and marked positions of each row of a batch, after a check that padding is on the right and unmarked."""
    rows = []
    columns = (batch[f"{kind}{name}"] for name in ("input_ids", "attention_mask", "completion_mask"))
    for ids, real, mask in zip(*columns, strict=True):
        length = int(real.sum())
        assert real[:length].all() and not mask[length:].any()
        rows.append((ids[:length].tolist(), mask[:length].tolist()))
    return rows


def joined(row: dict[str, Any], side: str, other: dict[str, Any] | None = None) -> tuple[list[int], list[int]]:
    """A row's prompt with a completion, its own or another row's, and the mask of both."""
    said = other or row
    return row["prompt_ids"] + said[f"{side}_ids"], [0] * len(row["prompt_ids"]) + said[f"{side}_mask"]


def log_probability(model: Path, ids: list[int], mask: list[int]) -> float:
    """The masked sum over the model's log-softmax, by hand."""
    with torch.no_grad():
        logits = AutoModelForCausalLM.from_pretrained(model, dtype="float32")(torch.tensor([ids])).logits[0]
    odds = logits.double().log_softmax(-1)
    return sum(odds[at - 1, ids[at]].item() for at in range(1, len(ids)) if mask[at])


def ones(rows: Rows) -> Rows:
    return [row | {name: [1] * len(row[name]) for name in row if name.endswith("_mask")} for row in rows]


def chat_columns(rows: Rows) -> Rows:
    return [{name: row[name] for name in row if name in (*TEXT, "label")} for row in rows]


def untimed(logged: dict[str, float]) -> dict[str, float]:
    return {name: value for name, value in logged.items() if not name.endswith(("_runtime", "_per_second"))}


def weights(made: Any) -> torch.Tensor:
    return torch.cat([parameter.detach().flatten() for parameter in made.model.parameters()])


def test_sft_takes_ids_and_labels_as_they_are(models: tuple[Path, Path], unpaired: Rows, tmp_path: Path) -> None:
    rows = []
    for ids, mask in (joined(row, "completion") for row in unpaired):
        labels = [token if marked else -100 for token, marked in zip(ids, mask, strict=True)]
        rows.append({"input_ids": ids, "labels": labels, "prompt": unpaired[0]["prompt"]})
    made = SFTTrainer(
        model=str(models[0]),
        args=config(SFTConfig, tmp_path / "out", max_steps=1),
        train_dataset=load(rows, tmp_path / "data"),
    )
    batches, _ = run(made)
    assert len(batches) == 1
    for at, row in enumerate(rows[:3]):
        length = len(row["input_ids"])
        assert batches[0]["input_ids"][at, :length].tolist() == row["input_ids"]
        assert batches[0]["labels"][at, :length].tolist() == row["labels"]
        assert (batches[0]["labels"][at, length:] == -100).all()


def test_dpo_sees_our_tokens_and_scores_the_marked_ones(models: tuple[Path, Path], pairs: Rows, tmp_path: Path) -> None:
    rows = load(pairs, tmp_path / "data")
    made = trainer(TokenDPOTrainer, models, rows, tmp_path / "out", max_steps=1, pad_to_multiple_of=8)
    batches, losses = run(made)
    expected = [joined(row, side) for side in ("chosen", "rejected") for row in pairs[:3]]
    assert [unpadded(batch) for batch in batches] == [expected]
    assert batches[0]["input_ids"].shape[1] % 8 == 0
    policy, reference = ([log_probability(model, *row) for row in expected] for model in models)
    logged = made.state.log_history[0]
    assert logged["logps/chosen"] == pytest.approx(sum(policy[:3]) / 3, abs=1e-4)
    assert logged["logps/rejected"] == pytest.approx(sum(policy[3:]) / 3, abs=1e-4)
    ratios = [mine - theirs for mine, theirs in zip(policy, reference, strict=True)]
    margins = [0.1 * (ratios[n] - ratios[n + 3]) for n in range(3)]
    assert losses[0] == pytest.approx(sum(math.log1p(math.exp(-margin)) for margin in margins) / 3, abs=1e-5)


def test_kto_pairs_each_prompt_with_the_completion_and_mask_of_the_row_before(
    models: tuple[Path, Path], unpaired: Rows, tmp_path: Path
) -> None:
    rows = load(unpaired, tmp_path / "data")
    made = trainer(TokenKTOTrainer, models, rows, tmp_path / "out", desirable_weight=1.5)
    batches, losses = run(made)
    chunks = [unpaired[:3], unpaired[3:]]
    assert [unpadded(batch) for batch in batches] == [[joined(row, "completion") for row in rows] for rows in chunks]
    turned = [[joined(row, "completion", rows[at - 1]) for at, row in enumerate(rows)] for rows in chunks]
    assert [unpadded(batch, "KL_") for batch in batches] == turned
    policy, reference = (
        [log_probability(model, *row) for row in [joined(row, "completion") for row in chunks[0]] + turned[0]]
        for model in models
    )
    ratios = [mine - theirs for mine, theirs in zip(policy, reference, strict=True)]
    kl = max(sum(ratios[3:]) / 3, 0.0)
    assert made.state.log_history[0]["kl"] == pytest.approx(kl, abs=1e-4) and kl > 0
    signs = [1.0 if row["label"] else -1.0 for row in chunks[0]]
    gains = [1 / (1 + math.exp(-0.1 * sign * (ratio - kl))) for sign, ratio in zip(signs, ratios, strict=False)]
    weighted = [(1 - gain) * (1.5 if sign > 0 else 1.0) for sign, gain in zip(signs, gains, strict=True)]
    assert losses[0] == pytest.approx(sum(weighted) / 3, abs=1e-5)


@pytest.mark.long
@pytest.mark.parametrize("plain, ours", [(DPOTrainer, TokenDPOTrainer), (KTOTrainer, TokenKTOTrainer)])
def test_where_all_is_marked_it_is_plain_trl(
    plain: Any, ours: Any, models: tuple[Path, Path], pairs: Rows, unpaired: Rows, tmp_path: Path
) -> None:
    rows = pairs if plain is DPOTrainer else unpaired
    chats = load(chat_columns(rows), tmp_path / "chats")
    marked = load(ones(rows), tmp_path / "tokens")
    first = trainer(plain, models, chats, tmp_path / "a")
    second = trainer(ours, models, marked, tmp_path / "b")
    names = [name for name in first.train_dataset.column_names if name.endswith("_ids")]
    assert [first.train_dataset[name][:] for name in names] == [second.train_dataset[name][:] for name in names]
    (_, expected), (_, losses) = run(first), run(second)
    assert losses == pytest.approx(expected, abs=1e-5) and len(losses) == 2
    assert torch.allclose(weights(first), weights(second), atol=1e-5)
    first.evaluate(chats.select(range(3)))
    second.evaluate(marked.select(range(3)))
    for mine, theirs in zip(second.state.log_history, first.state.log_history, strict=True):
        assert untimed(mine) == pytest.approx(untimed(theirs), abs=1e-4)


@pytest.mark.long
def test_plain_trl_gives_tool_results_loss_and_takes_no_ids(
    models: tuple[Path, Path], pairs: Rows, unpaired: Rows, tmp_path: Path
) -> None:
    """Why there are trainers of our own. When this fails, TRL may have learnt what they do."""
    plain = trainer(DPOTrainer, models, load(chat_columns(pairs), tmp_path / "chats"), tmp_path / "a", max_steps=1)
    batches, losses = run(plain)
    everything = [joined(row, side) for side in ("chosen", "rejected") for row in ones(pairs[:3])]
    assert unpadded(batches[0]) == everything
    ours = trainer(TokenDPOTrainer, models, load(pairs, tmp_path / "tokens"), tmp_path / "b", max_steps=1)
    assert abs(run(ours)[1][0] - losses[0]) > 0.01
    assert plain.state.log_history[0]["logps/chosen"] < ours.state.log_history[0]["logps/chosen"] - 10
    for kind, rows in ((DPOTrainer, pairs), (KTOTrainer, unpaired)):
        ids = [{name: row[name] for name in row if name not in TEXT} for row in rows]
        with pytest.raises(KeyError):
            trainer(kind, models, load(ids, tmp_path / kind.__name__), tmp_path / "c")


def test_dpo_evaluates_the_marked_tokens_only(models: tuple[Path, Path], pairs: Rows, tmp_path: Path) -> None:
    rows = load(pairs, tmp_path / "data")
    made = trainer(TokenDPOTrainer, models, rows.select([0]), tmp_path / "out")
    batches, _ = run(made, lambda: made.evaluate(rows.select([1, 2])))
    assert [unpadded(b) for b in batches] == [[joined(row, side) for side in TEXT[1:3] for row in pairs[1:3]]]


@pytest.mark.long
def test_reference_of_a_lora_run_is_precomputed_and_the_run_resumes(
    models: tuple[Path, Path], pairs: Rows, tmp_path: Path
) -> None:
    from peft import LoraConfig

    rows = load(pairs, tmp_path / "data")

    def fresh(output: str) -> Any:
        return TokenDPOTrainer(
            model=str(models[0]),
            args=config(
                DPOConfig, tmp_path / output, precompute_ref_log_probs=True, save_strategy="steps", save_steps=1
            ),
            train_dataset=rows,
            processing_class=AutoTokenizer.from_pretrained(models[0]),
            peft_config=LoraConfig(r=2, init_lora_weights=False),
        )

    whole = fresh("a")
    for side in ("chosen", "rejected"):
        by_hand = [log_probability(models[0], *joined(row, side)) for row in pairs]
        assert whole.train_dataset[f"ref_{side}_logps"][:] == pytest.approx(by_hand, abs=1e-4)
    whole.train()
    again = fresh("b")
    _, losses = run(again, lambda: again.train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-1")))
    assert len(losses) == 1 and again.state.global_step == 2
    assert torch.allclose(weights(whole), weights(again), atol=1e-6)


@pytest.mark.long
def test_kto_reference_is_precomputed_with_turned_masks(
    models: tuple[Path, Path], unpaired: Rows, tmp_path: Path
) -> None:
    rows = load(unpaired[:3], tmp_path / "data")
    made = trainer(TokenKTOTrainer, models, rows, tmp_path / "out", precompute_ref_log_probs=True)
    own = [log_probability(models[1], *joined(row, "completion")) for row in unpaired[:3]]
    turned = [
        log_probability(models[1], *joined(row, "completion", unpaired[:3][n - 1]))
        for n, row in enumerate(unpaired[:3])
    ]
    assert made.train_dataset["ref_logps"][:] == pytest.approx(own, abs=1e-4)
    assert made.train_dataset["ref_KL_logps"][:] == pytest.approx(turned, abs=1e-4)


@pytest.mark.long
def test_rows_that_do_not_fit_are_told_before_training(
    models: tuple[Path, Path], pairs: Rows, unpaired: Rows, tmp_path: Path
) -> None:
    def refused(kind: Any, rows: Rows, **options: Any) -> str:
        data = load(rows, tmp_path / str(len(list(tmp_path.iterdir()))))
        with pytest.raises(UserError) as caught:
            trainer(kind, models, data, tmp_path, **options)
        assert caught.value.remedy
        return str(caught.value)

    longest = len(joined(pairs[3], "chosen")[0])
    told = refused(TokenDPOTrainer, pairs, max_length=longest - 1)
    limit = f"{longest} tokens, more than max_length={longest - 1}"
    assert told == f"train row 3 (rollouts.jsonl:4): {limit}; nothing is cut here"
    told = refused(TokenKTOTrainer, unpaired, max_length=longest - 1)
    assert told == f"train row 3 (rollouts.jsonl:4): {limit}; nothing is cut here"
    short = [*pairs[:2], pairs[2] | {"rejected_mask": pairs[2]["rejected_mask"][1:]}]
    assert "train row 2 (rollouts.jsonl:3): rejected_mask has " in refused(TokenDPOTrainer, short)
    silent = [unpaired[0], unpaired[1] | {"completion_mask": [0] * len(unpaired[1]["completion_mask"])}]
    assert "no token of completion_ids carries loss" in refused(TokenKTOTrainer, silent)
    assert "no column 'prompt_ids'" in refused(TokenDPOTrainer, chat_columns(pairs))


def test_what_would_undo_the_masks_is_refused(models: tuple[Path, Path], pairs: Rows, tmp_path: Path) -> None:
    rows = load(pairs, tmp_path / "data")
    made = trainer(TokenDPOTrainer, models, rows, tmp_path / "out", max_length=512)
    assert made.data_collator.max_length is None
    with pytest.raises(UserError, match="makes its batches itself"):
        made.data_collator = made.data_collator
    with pytest.raises(UserError, match="streamed"):
        made.evaluate(rows.to_iterable_dataset())


def test_kto_weights_that_do_not_balance_are_told(models: tuple[Path, Path], unpaired: Rows, tmp_path: Path) -> None:
    rows = load(unpaired, tmp_path / "data")  # two good, three bad
    with pytest.warns(UserWarning, match="2 good and 3 bad rows"):
        trainer(TokenKTOTrainer, models, rows, tmp_path / "out")
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        trainer(TokenKTOTrainer, models, rows, tmp_path / "out", desirable_weight=1.5)
