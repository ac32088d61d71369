"""GRPO on recorded groups, against gradients computed by hand from the model's log-softmax."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import Dataset, Features, List, Value
from peft import LoraConfig
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, TrainerCallback

from gymtrl import RecordedGroupConfig, RecordedGroupTrainer, UserError, recompute_log_probs
from gymtrl.training.groups import advantages

Rows = list[dict[str, Any]]
Gradient = dict[str, torch.Tensor]
WORDS = 40
FEATURES = Features(
    {
        **dict.fromkeys(("prompt_ids", "completion_ids"), List(Value("int32"))),
        "completion_mask": List(Value("int8")),
        "log_probs": List(Value("float64")),
        "reward": Value("float64"),
        "group": Value("string"),
    }
)
REWARDS = {"a": [1.0, 0.0, 0.0], "b": [0.0, 1.0], "c": [0.9, 0.2, 0.6, 0.0]}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Two random Llamas that differ, far from even odds, with a tokenizer of single words."""
    words = {"<pad>": 0, "<eos>": 1, **{f"w{n}": n for n in range(2, WORDS)}}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(WordLevel(words, unk_token="<pad>")), pad_token="<pad>", eos_token="<eos>"
    )
    folders = []
    for seed in (0, 1):
        folder = tmp_path_factory.mktemp("tiny")
        tokenizer.save_pretrained(folder)
        torch.manual_seed(seed)
        config = LlamaConfig(
            vocab_size=WORDS,
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=2,
            max_position_embeddings=128,
            initializer_range=0.3,
            pad_token_id=0,
            eos_token_id=1,
            bos_token_id=None,
        )
        LlamaForCausalLM(config).save_pretrained(folder)
        folders.append(folder)
    return folders[0], folders[1]


def load(model: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(model, dtype="float32")


def recorded(model: Path, rewards: dict[str, list[Any]] = REWARDS, noise: float = 0.0) -> Rows:
    """Rollouts with a result of a tool in their middle, as the model would have recorded them, give or take `noise`."""
    draw = random.Random(0)
    rows: Rows = []
    for group, values in rewards.items():
        prompt = [draw.randrange(2, WORDS) for _ in range(draw.randrange(2, 7))]
        for value in values:
            before, tool, after = (draw.randrange(1, 6) for _ in range(3))
            rows.append(
                {
                    "prompt_ids": prompt,
                    "completion_ids": [draw.randrange(2, WORDS) for _ in range(before + tool + after)],
                    "completion_mask": [1] * before + [0] * tool + [1] * after,
                    "log_probs": None,
                    "reward": value,
                    "group": group,
                }
            )
    rows = recompute_log_probs(load(model), Dataset.from_list(rows, features=FEATURES)).to_list()
    for row in rows:
        row["log_probs"] = [value + draw.uniform(-noise, noise) * (value != 0) for value in row["log_probs"]]
    return rows


class Watch(TrainerCallback):
    """Keeps the gradient of each optimizer step."""

    def __init__(self) -> None:
        self.gradients: list[Gradient] = []

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **options: Any) -> None:
        named = options["model"].named_parameters()
        self.gradients.append({name: p.grad.clone() for name, p in named if p.grad is not None})


def trainer(model: Path, rows: Rows, output: Path, **options: Any) -> RecordedGroupTrainer:
    usual = {
        "per_device_train_batch_size": 9,
        "learning_rate": 1e-2,
        "max_grad_norm": 0.0,
        "model_init_kwargs": {"dtype": "float32"},
        "use_cpu": True,
        "bf16": False,
        "gradient_checkpointing": False,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "stop_ratio": None,
        "stop_kl": None,
    }
    peft = options.pop("peft_config", None)
    return RecordedGroupTrainer(
        model=str(model),
        args=RecordedGroupConfig(output_dir=str(output), **usual | options),
        train_dataset=Dataset.from_list(rows, features=FEATURES),
        processing_class=PreTrainedTokenizerFast.from_pretrained(model),
        peft_config=peft,
    )


def train(model: Path, rows: Rows, output: Path, **options: Any) -> tuple[list[Gradient], RecordedGroupTrainer]:
    made, watch = trainer(model, rows, output, **options), Watch()
    made.add_callback(watch)
    made.train()
    return watch.gradients, made


def losses(made: RecordedGroupTrainer) -> list[float]:
    return [entry["loss"] for entry in made.state.log_history if "loss" in entry]


def by_hand(model: Path, rows: Rows, weigh: Any) -> tuple[Gradient, float]:
    """Gradient and value of the sum of `weigh(row, log-probabilities of its marked tokens)` over the rows."""
    policy = load(model)
    total = torch.zeros(())
    for row in rows:
        ids = torch.tensor([row["prompt_ids"] + row["completion_ids"]])
        odds = policy(ids).logits[0].log_softmax(-1)
        start = len(row["prompt_ids"])
        marked = [at for at, mark in enumerate(row["completion_mask"]) if mark]
        total = total + weigh(row, torch.stack([odds[start + at - 1, ids[0, start + at]] for at in marked]))
    total.backward()
    return {name: p.grad for name, p in policy.named_parameters() if p.grad is not None}, total.item()


def assert_same(found: Gradient, expected: Gradient, tolerance: float = 1e-5) -> None:
    assert found.keys() == expected.keys()
    assert max(expected[name].abs().max() for name in expected) > 0.005
    for name in found:
        torch.testing.assert_close(found[name], expected[name], atol=tolerance, rtol=1e-4, msg=name)


def test_advantages_are_of_the_group_however_large_it_is() -> None:
    groups = ["a", "b", "a", "c", "b", "a", "c", "d", "a"]
    rewards = [1.0, 5.0, 0.0, 2.0, 3.0, 0.5, 2.0, 9.0, None]
    found = advantages(groups, rewards, baseline_shift=-0.1)
    # a: mean 0.5, its row without a reward left out; b: mean 4; c: no variance; d: alone
    expected = [0.6, 1.1, -0.4, None, -0.9, 0.1, None, None, None]
    assert [one if one is None else round(one, 9) for one in found] == expected
    scaled = advantages(groups, rewards, baseline_shift=0.0, scale_rewards="group")
    assert scaled[0] == pytest.approx(0.5 / (0.5 + 1e-4)) and scaled[1] == pytest.approx(1 / (2**0.5 + 1e-4))


def test_the_gradient_of_topr(models: tuple[Path, Path], tmp_path: Path) -> None:
    rows = recorded(models[0], noise=0.15)
    (gradient,), made = train(models[0], rows, tmp_path / "out")
    tokens = sum(sum(row["completion_mask"]) for row in rows)
    weights = []

    def weigh(row: dict[str, Any], log_probs: torch.Tensor) -> torch.Tensor:
        rewards = REWARDS[row["group"]]
        advantage = row["reward"] - (sum(rewards) / len(rewards) - 0.1)
        ratio = (log_probs.sum() - sum(row["log_probs"])).exp().item()
        weights.append(1.0 if advantage > 0 else min(ratio, 1.0))
        return -weights[-1] * advantage * log_probs.sum() / tokens

    expected, loss = by_hand(models[0], rows, weigh)
    assert {True, False} == {0.3 < weight < 0.95 for weight in weights}
    assert_same(gradient, expected)
    assert losses(made) == pytest.approx([loss], abs=1e-4)


@pytest.mark.parametrize("loss_type", ["dapo", "cispo", "grpo"])
def test_on_policy_the_losses_of_trl_have_the_plain_gradient(
    loss_type: str, models: tuple[Path, Path], tmp_path: Path
) -> None:
    rows = recorded(models[0])
    options = {"loss_type": loss_type, "baseline_shift": 0.0, "scale_rewards": "group"}
    (gradient,), _ = train(models[0], rows, tmp_path / "out", epsilon_high=5.0, **options)
    tokens = sum(sum(row["completion_mask"]) for row in rows)

    def weigh(row: dict[str, Any], log_probs: torch.Tensor) -> torch.Tensor:
        rewards = torch.tensor(REWARDS[row["group"]])
        advantage = (row["reward"] - rewards.mean()) / (rewards.std() + 1e-4)
        return -advantage * (log_probs.mean() / len(rows) if loss_type == "grpo" else log_probs.sum() / tokens)

    assert_same(gradient, by_hand(models[0], rows, weigh)[0])


def test_losses_of_trl_take_the_recorded_log_probs(models: tuple[Path, Path], tmp_path: Path) -> None:
    rows = recorded(models[0], noise=0.15)
    options = {"loss_type": "dapo", "epsilon": 0.05, "epsilon_high": 0.05}
    (gradient,), made = train(models[0], rows, tmp_path / "out", **options)
    tokens = sum(sum(row["completion_mask"]) for row in rows)

    def weigh(row: dict[str, Any], log_probs: torch.Tensor) -> torch.Tensor:
        rewards = REWARDS[row["group"]]
        advantage = row["reward"] - (sum(rewards) / len(rewards) - 0.1)
        old = torch.tensor([p for p, mark in zip(row["log_probs"], row["completion_mask"], strict=True) if mark])
        ratio = (log_probs - old).exp()
        return -torch.min(ratio * advantage, ratio.clamp(0.95, 1.05) * advantage).sum() / tokens

    assert_same(gradient, by_hand(models[0], rows, weigh)[0])
    assert made.state.log_history[0]["clip_ratio/region_mean"] > 0.1


@pytest.mark.parametrize("loss_type", ["topr", "dapo", "grpo", "dr_grpo", "cispo", "vespo", "sapo", "luspo"])
def test_micro_batches_change_no_step(loss_type: str, models: tuple[Path, Path], tmp_path: Path) -> None:
    rows = recorded(models[0], noise=0.15)
    # Adam would make much of the last bits of small gradients; dr_grpo divides by the length.
    options: dict[str, Any] = {"loss_type": loss_type, "optim": "sgd", "max_completion_length": 12}
    options["epsilon_high"] = 5.0 if loss_type == "cispo" else 0.2
    if loss_type == "luspo":
        options["importance_sampling_level"] = "sequence"
    whole, first = train(models[0], rows, tmp_path / "out", num_train_epochs=2, **options)
    assert len(whole) == 2 and losses(first)[0] != losses(first)[1]
    for batch, accumulation in ((1, 9), (2, 5)):  # the latter leaves one row for the last batch
        splits = {"per_device_train_batch_size": batch, "gradient_accumulation_steps": accumulation}
        parts, made = train(models[0], rows, tmp_path / "out", num_train_epochs=2, **options | splits)
        for found, expected in zip(parts, whole, strict=True):
            assert_same(found, expected)
        assert losses(made) == pytest.approx(losses(first), abs=1e-5)


def test_steps_take_the_same_rows_with_any_micro_batch(models: tuple[Path, Path], tmp_path: Path) -> None:
    rows = recorded(models[0])
    found = []
    for batch, accumulation in ((4, 1), (2, 2), (1, 4)):
        splits = {"per_device_train_batch_size": batch, "gradient_accumulation_steps": accumulation}
        _, made = train(models[0], rows, tmp_path / "out", num_train_epochs=2, **splits)
        assert made.state.global_step == 6  # 4, 4 and 1 rows, twice
        found.append(losses(made))
    assert found[1] == pytest.approx(found[0], abs=1e-5) and found[2] == pytest.approx(found[0], abs=1e-5)
    _, other = train(models[0], rows, tmp_path / "out", num_train_epochs=2, per_device_train_batch_size=4, seed=7)
    assert losses(other)[0] != pytest.approx(found[0][0], abs=1e-4)


def test_rows_regrouped_by_length_make_the_same_step(models: tuple[Path, Path], tmp_path: Path) -> None:
    rows = recorded(models[0], noise=0.15)
    (whole,), _ = train(models[0], rows, tmp_path / "out")
    splits = {"per_device_train_batch_size": 3, "gradient_accumulation_steps": 3}
    (parts,), _ = train(models[0], rows, tmp_path / "out", train_sampling_strategy="batch_rebalance", **splits)
    assert_same(parts, whole)


def test_rows_without_a_reward_and_groups_without_variance_are_left_out(
    models: tuple[Path, Path], tmp_path: Path
) -> None:
    some = {"a": [1.0, None, 0.0, 0.0], "same": [0.3, 0.3], "b": [0.0, 1.0], "alone": [None, 1.0]}
    rows = recorded(models[0], some, noise=0.15)
    kept = [row for row in rows if row["group"] in "ab" and row["reward"] is not None]
    (found,), made = train(models[0], rows, tmp_path / "out")
    (expected,), _ = train(models[0], kept, tmp_path / "out")
    assert_same(found, expected)
    left = made.train_groups
    assert (len(left.rows), left.groups, left.without_variance, left.without_reward) == (5, 4, 2, 2)
    assert made.state.log_history[0]["frac_reward_zero_std"] == 0.5


def test_no_group_with_variance_is_refused(models: tuple[Path, Path], tmp_path: Path) -> None:
    with pytest.raises(UserError, match="nothing to learn from"):
        trainer(models[0], recorded(models[0], {"a": [1.0, 1.0]}), tmp_path / "out")


def test_results_of_tools_have_no_gradient(models: tuple[Path, Path], tmp_path: Path) -> None:
    rows = recorded(models[0], noise=0.15)
    other = [
        row | {"log_probs": [p if m else -9.0 for p, m in zip(row["log_probs"], row["completion_mask"], strict=True)]}
        for row in rows
    ]
    for loss_type in ("topr", "dapo"):
        (expected,), _ = train(models[0], rows, tmp_path / "out", loss_type=loss_type)
        (found,), _ = train(models[0], other, tmp_path / "out", loss_type=loss_type)
        assert_same(found, expected, tolerance=0.0)


def test_another_policy_is_refused_before_the_first_step(models: tuple[Path, Path], tmp_path: Path) -> None:
    rows = recorded(models[1])
    made = trainer(models[0], rows, tmp_path / "out")
    before = {name: p.clone() for name, p in made.model.named_parameters()}
    with pytest.raises(UserError, match=r"tokens they differ by \d.* on average, more than 0.1"):
        made.train()
    assert all(torch.equal(p, before[name]) for name, p in made.model.named_parameters())
    with pytest.raises(UserError, match=r"at temperature 0.7"):
        trainer(models[1], rows, tmp_path / "out", temperature=0.7).train()


def test_log_probs_at_another_temperature(models: tuple[Path, Path], tmp_path: Path) -> None:
    rows = [row | {"log_probs": None} for row in recorded(models[0])]
    cooler = recompute_log_probs(load(models[0]), Dataset.from_list(rows, features=FEATURES), temperature=0.7)
    _, made = train(models[0], cooler.to_list(), tmp_path / "out", temperature=0.7)
    assert made.state.log_history[0]["kl"] < 1e-9
    assert made.state.log_history[0]["ratio/negatives"] == pytest.approx(1)


def test_missing_log_probs_are_filled_in_and_the_others_kept(models: tuple[Path, Path], tmp_path: Path) -> None:
    rows = recorded(models[0], noise=0.05)
    gap = [*rows[:3], rows[3] | {"log_probs": None}, *rows[4:]]
    with pytest.raises(UserError, match="1 of 9 train rows have no recorded log_probs") as caught:
        trainer(models[0], gap, tmp_path / "out")
    assert "recompute_log_probs" in str(caught.value.remedy)
    filled = recompute_log_probs(load(models[0]), Dataset.from_list(gap, features=FEATURES)).to_list()
    assert [row for at, row in enumerate(filled) if at != 3] == [row for at, row in enumerate(gap) if at != 3]
    row, found = gap[3], filled[3]["log_probs"]
    assert [value != 0 for value in found] == [mark == 1 for mark in row["completion_mask"]]
    _, total = by_hand(models[0], [row], lambda row, log_probs: log_probs.sum())
    assert sum(found) == pytest.approx(total, abs=1e-4)
    column = Dataset.from_list(rows, features=FEATURES).remove_columns("log_probs")
    assert len(recompute_log_probs(load(models[0]), column)["log_probs"]) == 9


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        ({"log_probs": [-1.0]}, "do not fit"),
        ({"log_probs": [float("nan")]}, "no numbers"),
        ({"completion_mask": [1]}, "entries for"),
    ],
)
def test_spoiled_rows_are_refused(
    spoil: dict[str, Any], message: str, models: tuple[Path, Path], tmp_path: Path
) -> None:
    rows = recorded(models[0])
    if message == "no numbers":
        spoil = {"log_probs": [*rows[0]["log_probs"][:-1], float("nan")]}
    with pytest.raises(UserError, match=message):
        trainer(models[0], [rows[0] | spoil, *rows[1:]], tmp_path / "out")


@pytest.mark.parametrize(
    ("options", "reason"),
    [({"stop_ratio": 0.1}, "mean ratio on negatives"), ({"stop_kl": 0.5}, "nats a token")],
)
def test_training_stops_when_the_policy_has_moved_too_far(
    options: dict[str, Any], reason: str, models: tuple[Path, Path], tmp_path: Path
) -> None:
    rows = recorded(models[0])
    _, made = train(models[0], rows, tmp_path / "out", num_train_epochs=60, **options)
    assert made.stop_reason is not None and reason in made.stop_reason
    assert 2 < made.state.global_step < 60
    steps = [entry for entry in made.state.log_history if "loss" in entry]
    assert len(steps) == made.state.global_step
    beyond = [step["ratio/negatives"] < 0.1 if "stop_ratio" in options else step["kl"] > 0.5 for step in steps]
    assert beyond == [False] * (len(steps) - 1) + [True]


def test_training_goes_to_its_end_near_the_recorded_policy(models: tuple[Path, Path], tmp_path: Path) -> None:
    options = {"stop_ratio": 0.1, "stop_kl": 0.5, "learning_rate": 1e-4}
    _, made = train(models[0], recorded(models[0]), tmp_path / "out", num_train_epochs=3, **options)
    assert made.stop_reason is None and made.state.global_step == 3


@pytest.mark.parametrize("lora", [False, True])
def test_training_resumes_where_it_was(lora: bool, models: tuple[Path, Path], tmp_path: Path) -> None:
    rows = recorded(models[0])
    options: dict[str, Any] = {"per_device_train_batch_size": 2, "num_train_epochs": 3, "save_strategy": "steps"}
    options |= {"save_steps": 1, "save_total_limit": None}
    if lora:
        options["peft_config"] = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")
    _, whole = train(models[0], rows, tmp_path / "out", **options)
    assert whole.state.global_step == 15
    again = trainer(models[0], rows, tmp_path / "out", **options)
    again.train(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-7"))  # within the second epoch
    assert losses(again) == losses(whole)
    for (name, found), expected in zip(again.model.named_parameters(), whole.model.parameters(), strict=True):
        assert torch.equal(found, expected), name


def test_evaluation_takes_held_out_groups(models: tuple[Path, Path], tmp_path: Path) -> None:
    rows = recorded(models[0])
    made = trainer(models[0], rows, tmp_path / "out", per_device_eval_batch_size=9)
    held_out = recorded(models[0], {"d": [1.0, 0.0]})
    from gymtrl.training.groups import group_rows

    split = group_rows(Dataset.from_list(held_out, features=FEATURES), "x", baseline_shift=-0.1, scale_rewards="none")
    found = made.evaluate(split.rows)["eval_loss"]
    tokens = sum(sum(row["completion_mask"]) for row in held_out)
    _, expected = by_hand(models[0], held_out, lambda row, log_probs: -(row["reward"] - 0.4) * log_probs.sum() / tokens)
    assert found == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize(
    "options", [{"loss_type": "bnpo"}, {"scale_rewards": "batch"}, {"beta": 0.1}, {"entropy_coef": 0.01}]
)
def test_settings_that_have_no_meaning_are_refused(options: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(UserError):
        RecordedGroupConfig(output_dir=str(tmp_path), use_cpu=True, bf16=False, **options)


TWO = """
import json, sys
sys.path.insert(0, sys.argv[1])
from pathlib import Path
from test_replay import load, losses, recorded, train
model, out = Path(sys.argv[2]), Path(sys.argv[3])
options = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 2, "num_train_epochs": 2}
gradients, made = train(model, recorded(model, noise=0.15), out, loss_type=sys.argv[4], **options)
told = {"losses": losses(made), "processes": made.accelerator.num_processes}
told["weights"] = [p.double().sum().item() for p in made.model.parameters()]
told["kl"] = [entry["kl"] for entry in made.state.log_history if "kl" in entry]
if made.accelerator.is_main_process:
    print(json.dumps(told))
"""


@pytest.mark.long
@pytest.mark.parametrize("loss_type", ["topr", "dapo", "grpo"])
def test_two_processes_are_one_with_twice_the_accumulation(
    loss_type: str, models: tuple[Path, Path], tmp_path: Path
) -> None:
    script = tmp_path / "two.py"
    script.write_text(TWO, encoding="utf-8")
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [*launcher, str(script), str(Path(__file__).parent), str(models[0]), str(tmp_path / "out"), loss_type],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    told = json.loads(next(line for line in done.stdout.splitlines() if line.startswith('{"losses"')))
    assert told["processes"] == 2
    splits = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 4, "num_train_epochs": 2}
    rows = recorded(models[0], noise=0.15)
    _, one = train(models[0], rows, tmp_path / "one", loss_type=loss_type, **splits)
    assert len(told["losses"]) == 6
    assert told["losses"] == pytest.approx(losses(one), abs=1e-5)
    assert told["kl"] == pytest.approx([entry["kl"] for entry in one.state.log_history if "kl" in entry], abs=1e-5)
    assert told["weights"] == pytest.approx([p.double().sum().item() for p in one.model.parameters()], abs=1e-3)
