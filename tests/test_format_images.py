"""Images in `format sft`: for a model that takes them they are in the rows, and only the policy's words carry loss."""

from __future__ import annotations

import base64
import io
import json
import os
import shutil
import struct
import subprocess
import sys
import zlib
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from gymtrl.errors import UserError
from gymtrl.exports.export import export_dataset
from gymtrl.exports.settings import ExportSettings
from gymtrl.formats.settings import FormatSftSettings
from gymtrl.formats.sft import format_sft
from gymtrl.training.data import read_dataset
from gymtrl.training.sft import SFT
from rows import write_rows

TOOL = {"type": "function", "name": "click", "parameters": {"type": "object", "properties": {"x": {"type": "integer"}}}}
PAD = "<|vision_start|><|image_pad|><|vision_end|>"

Part = dict[str, Any]


def image_uri(colour: str, kind: str = "PNG", size: tuple[int, int] = (40, 30)) -> str:
    from PIL import Image

    file = io.BytesIO()
    Image.new("RGB", size, colour).save(file, kind)
    return f"data:image/{kind.lower()};base64,{base64.b64encode(file.getvalue()).decode()}"


def image(uri: str) -> Part:
    return {"type": "input_image", "image_url": uri}


def text(words: str) -> Part:
    return {"type": "input_text", "text": words}


def said(words: str) -> Part:
    return {"type": "message", "role": "assistant", "content": [{"type": "output_text", "text": words}]}


def click(call: str, x: int) -> Part:
    return {"type": "function_call", "call_id": call, "name": "click", "arguments": json.dumps({"x": x})}


def clicked(call: str, output: Any) -> Part:
    return {"type": "function_call_output", "call_id": call, "output": output}


def user(*content: Part) -> Part:
    return {"type": "message", "role": "user", "content": list(content)}


def rollout(given: list[Part], output: list[Part], *, tools: bool = False) -> dict[str, Any]:
    return {
        "responses_create_params": {"input": given, "tools": [TOOL] if tools else []},
        "response": {"output": output, "status": "completed", "model": "m"},
        "reward": 1.0,
        "agent_ref": {"name": "see"},
    }


SCREENS = rollout(
    [user(text("Before "), image(image_uri("red")), text(" after "), image(image_uri("blue", "JPEG")))],
    [
        said("First I look."),
        click("c1", 7),
        clicked("c1", [text("screen: "), image(image_uri("green", "WEBP"))]),
        said("Green, it's done."),
    ],
    tools=True,
)
PLAIN = rollout([user(text("1 + 1 ="))], [said("2")])
ONE = rollout([user(image(image_uri("red")), text("Which colour?"))], [said("Red.")])


def tiny_vlm(folder: Path, tokenizer_of: Path, template: str) -> Path:
    """A random Idefics3 of a few layers: an image is four tokens, and three around them."""
    import torch
    import trl
    from transformers import AutoTokenizer, Idefics3Config, Idefics3ForConditionalGeneration, Idefics3Processor
    from transformers.models.idefics3.image_processing_pil_idefics3 import Idefics3ImageProcessorPil

    tokenizer = AutoTokenizer.from_pretrained(tokenizer_of)
    marks = ["<fake_token_around_image>", "<image>", "<global-img>", "<end_of_utterance>"]
    tokenizer.add_special_tokens({"additional_special_tokens": marks})
    chat = (Path(trl.__file__).parent / "chat_templates" / f"{template}.jinja").read_text(encoding="utf-8")
    shrink = Idefics3ImageProcessorPil(
        size={"longest_edge": 32}, max_image_size={"longest_edge": 32}, do_image_splitting=False
    )
    processor = Idefics3Processor(shrink, tokenizer, image_seq_len=4, chat_template=chat.replace(PAD, "<image>"))
    processor.save_pretrained(folder)
    torch.manual_seed(0)
    layers = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = Idefics3Config(
        image_token_id=tokenizer.convert_tokens_to_ids("<image>"),
        scale_factor=2,
        vision_config={**layers, "image_size": 32, "patch_size": 8},
        text_config={
            **layers,
            "model_type": "llama",
            "vocab_size": len(tokenizer),
            "num_key_value_heads": 2,
            "max_position_embeddings": 1024,
            "pad_token_id": tokenizer.pad_token_id,
        },
    )
    Idefics3ForConditionalGeneration(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def tools_vlm(tmp_path_factory: pytest.TempPathFactory, smollm2_dir: Path) -> Path:
    """With the template of Qwen3-VL, which has a place for tools and shows images in tool results."""
    return tiny_vlm(tmp_path_factory.mktemp("tools_vlm"), smollm2_dir, "qwen3_vl")


@pytest.fixture(scope="module")
def parts_vlm(tmp_path_factory: pytest.TempPathFactory, smollm2_dir: Path) -> Path:
    """With the template of Idefics3, which shows a text only where it is a part."""
    return tiny_vlm(tmp_path_factory.mktemp("parts_vlm"), smollm2_dir, "idefics3")


def made(base: Path, rows: list[dict[str, Any]], model: Path) -> Path:
    format_sft(write_rows(base / "rollouts.jsonl", rows), base / "dataset", FormatSftSettings(model=str(model)))
    return base / "dataset"


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory, tools_vlm: Path) -> Path:
    return made(tmp_path_factory.mktemp("images"), [SCREENS, PLAIN, ONE], tools_vlm)


def trained(row: dict[str, Any], model: Path) -> list[str]:
    """The texts that carry loss."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    shown = "".join("\0" if label < 0 else tokenizer.decode([label]) for label in row["labels"])
    return [part for part in shown.split("\0") if part]


def test_rows_hold_images_and_loss_on_the_policys_words(dataset: Path, tools_vlm: Path, tmp_path: Path) -> None:
    from datasets import load_dataset

    screens, plain, one = load_dataset(str(dataset), split="train", cache_dir=str(tmp_path))
    assert [image.getpixel((0, 0)) for image in screens["images"][:1]] == [(255, 0, 0)]
    assert [len(row["images"]) for row in (screens, plain, one)] == [3, 0, 1]
    assert [part.get("text", part["type"]) for part in screens["prompt"][0]["content"]] == [
        "Before ",
        "image",
        " after ",
        "image",
    ]
    assert plain["prompt"][0]["content"] == "1 + 1 ="
    call = '<tool_call>\n{"name": "click", "arguments": {"x": 7}}\n</tool_call>'
    assert trained(screens, tools_vlm) == [f"First I look.\n{call}<|im_end|>", "Green, it's done.<|im_end|>"]
    assert trained(plain, tools_vlm) == ["2<|im_end|>"] and trained(one, tools_vlm) == ["Red.<|im_end|>"]


def test_the_rows_tokens_are_the_processors_and_the_script_trains_on_them(
    dataset: Path, tools_vlm: Path, tmp_path: Path
) -> None:
    """The folder's own script runs; then its trainer's batch and loss are computed by hand."""
    probe = f"""
import runpy, sys
import torch
sys.argv = ["train", {str(tools_vlm)!r}, {str(tmp_path / "out")!r}]
names = runpy.run_path({str(dataset / "train_with_trl.py")!r})
trainer, rows = names["trainer"], list(names["dataset"]["train"])
assert trainer.state.global_step == 2, trainer.state
batch = trainer.data_collator(rows)
for number, row in enumerate(rows):
    length = len(row["labels"])
    assert batch["labels"][number, :length].tolist() == row["labels"]
    assert batch["labels"][number, length:].eq(-100).all()
    assert batch["input_ids"][number, :length].tolist() == row["input_ids"]
model = trainer.model.eval()
given = {{name: value for name, value in batch.items() if name != "labels"}}
with torch.no_grad():
    logits = model(**given).logits[:, :-1].flatten(0, 1)
    blind = model(**given | {{"pixel_values": -given["pixel_values"]}}).logits[:, :-1].flatten(0, 1)
    expected = torch.nn.functional.cross_entropy(logits, batch["labels"][:, 1:].flatten())
    loss = trainer.compute_loss(model, dict(batch))
assert torch.allclose(loss, expected, atol=1e-4), (loss, expected)
assert not torch.allclose(logits, blind)
rows[0]["input_ids"][0] += 1
try:
    trainer.data_collator(rows)
except SystemExit as error:
    assert "other tokens" in str(error)
else:
    raise AssertionError("tokens of another processor were taken")
"""
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "hf")}
    done = subprocess.run(
        [sys.executable, "-c", probe], env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=200
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert (tmp_path / "out" / "processor_config.json").is_file()


def test_template_that_shows_texts_in_parts_alone(tmp_path: Path, parts_vlm: Path) -> None:
    rows = pq.read_table(made(tmp_path, [ONE, PLAIN], parts_vlm) / "data").to_pylist()
    assert [row["route"] for row in rows] == ["template", "template"]
    assert rows[0]["text"].startswith("<|begin_of_text|>User:<image>Which colour?<end_of_utterance>")
    assert [trained(row, parts_vlm) for row in rows] == [[" Red.<end_of_utterance>"], [" 2<end_of_utterance>"]]


def bomb(side: int) -> str:
    """A PNG of a few bytes that says it is a large square."""
    head = struct.pack(">IIBBBBB", side, side, 8, 0, 0, 0, 0)
    chunks = ((b"IHDR", head), (b"IDAT", zlib.compress(b"")), (b"IEND", b""))
    data = b"".join(struct.pack(">I", len(d)) + n + d + struct.pack(">I", zlib.crc32(n + d)) for n, d in chunks)
    return f"data:image/png;base64,{base64.b64encode(bytes.fromhex('89504e470d0a1a0a') + data).decode()}"


def test_images_that_cannot_be_used_are_refused(tmp_path: Path, tools_vlm: Path) -> None:
    png = image_uri("red")
    uris = {
        "https://example.com/a.png": "image_not_embedded",
        "file:///etc/passwd": "image_not_embedded",
        "data:image/png,%89PNG": "image_unreadable",
        "data:image/png;base64,????": "image_unreadable",
        "data:image/png;base64,aGVsbG8=": "image_unreadable",
        png[:-40]: "image_unreadable",
        image_uri("red", "BMP"): "image_unreadable",
        bomb(10_000): "image_too_large",
        bomb(20_000): "image_too_large",
    }
    rows = [rollout([user(image(uri), text(f"{i}?"))], [said("Red.")]) for i, uri in enumerate(uris)]
    fake = [user(image(png), text("What is <image>?")), user(text("What is <image>?"))]
    unseen = {"type": "message", "role": "system", "content": [image(png), text("Be kind.")]}
    rows += [rollout([entry], [said("A tag.")]) for entry in fake]
    rows += [rollout([unseen, user(text("Hi"))], [said("Hello.")]), ONE]
    dropped = pq.read_table(made(tmp_path, rows, tools_vlm) / "dropped.parquet").to_pylist()
    reasons = [*uris.values(), "image_token_in_text", "image_token_in_text", "images_lost"]
    assert [entry["reason"] for entry in dropped] == reasons


def test_text_models_keep_refusing_and_other_data_stays_as_it_was(
    tmp_path: Path, smollm2_dir: Path, tools_vlm: Path
) -> None:
    with pytest.raises(UserError, match="1 images_in_text_model"):
        made(tmp_path / "text", [ONE], smollm2_dir)
    folder = made(tmp_path / "plain", [PLAIN], tools_vlm)
    assert "images" not in pq.read_schema(next((folder / "data").glob("*"))).names
    assert read_dataset(folder, SFT.made_by, SFT.sequences).train.rows == 1


def test_processor_that_does_not_load_is_told(tmp_path: Path, tools_vlm: Path) -> None:
    broken = Path(shutil.copytree(tools_vlm, tmp_path / "broken"))
    (broken / "processor_config.json").write_text("{")
    assert made(tmp_path / "plain", [PLAIN], broken).is_dir()
    with pytest.raises(UserError, match="hold images, and the processor of model"):
        made(tmp_path / "images", [ONE], broken)


def test_what_would_not_show_the_model_the_images_is_refused(dataset: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="holds images"):
        read_dataset(dataset, SFT.made_by, SFT.sequences)
    with pytest.raises(UserError, match="with images"):
        export_dataset(dataset, tmp_path / "tokens", ExportSettings(to="tokens"))


@pytest.mark.slow
def test_rollouts_that_gym_ships(tmp_path: Path, tools_vlm: Path, gym_site_packages: Path) -> None:
    servers = gym_site_packages / "resources_servers"
    for name in ("circle_click", "circle_count", "vlm_eval_kit"):
        source = servers / name / "data" / "example_rollouts.jsonl"
        format_sft(source, tmp_path / name, FormatSftSettings(model=str(tools_vlm), max_length=4096))
        rows = pq.read_table(tmp_path / name / "data").to_pylist()
        assert len(rows) == 5 and all(len(row["images"]) == 1 for row in rows)
        for row in rows:
            (said,) = json.loads(row["record_json"])["completion"][:1]
            (loss,) = trained(row, tools_vlm)
            words = [part["text"] for part in said["content"]]
            words += [call["function"]["name"] for call in said.get("tool_calls", ())]
            assert loss.endswith("<|im_end|>") and all(word in loss for word in words)
