"""The four failures that docs/loss.md shows happen in TRL as installed, and not in our datasets."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PICTURES = ROOT / "docs" / "loss"

pytestmark = pytest.mark.slow


@dataclass(frozen=True)
class Shown:
    """A row as the script prints it: who made it, its whole text, and what of it carries loss."""

    maker: str
    text: str
    trained: str


@dataclass(frozen=True)
class Output:
    """What the script printed and drew."""

    printed: str
    pictures: Path

    def rows(self, case: int) -> list[Shown]:
        (part,) = re.findall(rf"^{case}\. .*?(?=^{case + 1}\. |\Z)", self.printed, flags=re.DOTALL | re.MULTILINE)
        pieces = re.split(r"^─+ ((?:TRL: |gymtrl format )\w+) ─+$", part, flags=re.MULTILINE)
        texts = zip(pieces[1::2], pieces[2::2], strict=True)
        return [Shown(maker, text, "".join(re.findall(r"⟦(.*?)⟧", text, flags=re.DOTALL))) for maker, text in texts]


@pytest.fixture(scope="module")
def output(tmp_path_factory: pytest.TempPathFactory, smollm2_tools_dir: Path) -> Output:
    pictures = tmp_path_factory.mktemp("loss")
    script = ROOT / "examples" / "silent_failures.py"
    env = os.environ | {"COLUMNS": "300", "NO_COLOR": "1"}
    command = [sys.executable, str(script), "--model", str(smollm2_tools_dir), "--svg", str(pictures)]
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return Output(done.stdout, pictures)


def test_trl_trains_results_of_tools(output: Output) -> None:
    sft, our_sft, dpo, our_dpo, kto, our_kto = output.rows(1)
    makers = [row.maker for row in (sft, dpo, kto)]
    assert makers == ["TRL: SFTTrainer", "TRL: DPOTrainer", "TRL: KTOTrainer"]
    for theirs, mine in ((sft, our_sft), (dpo, our_dpo), (kto, our_kto)):
        assert "2.4 kg; label torn" in theirs.trained and "<|im_start|>assistant" in theirs.trained
        assert "2.4 kg; label torn" in mine.text and "label torn" not in mine.trained
        assert "<|im_start|>" not in mine.trained
        assert '{"parcel": 7}' in mine.trained and "Parcel 7 weighs 2.4 kg.<|im_end|>" in mine.trained
        assert "✗" not in mine.text
    assert "31 kg; two straps" in dpo.trained and "two straps" not in our_dpo.trained


def test_plain_datasets_grow_arguments_that_trl_trains(output: Output) -> None:
    theirs, mine = output.rows(2)
    assert '{"parcel": 7, "city": null, "express": null}' in theirs.trained
    assert '{"parcel": 7}' in mine.trained and "null" not in mine.text


def test_trl_cuts_the_answer_off(output: Output) -> None:
    theirs, mine = output.rows(3)
    answer = "Crates 137 and 177 are the heaviest, with 39 kg each.<|im_end|>"
    assert "1,024 tokens" in theirs.text and '{"hall": 2}' in theirs.trained
    assert "Crates 137" not in theirs.text and "cut at the end" in theirs.text
    assert mine.trained.endswith(answer) and "✗" not in mine.text
    assert "line 1 dropped: too_long" in mine.text


def test_templates_lose_or_change_what_was_said(output: Output) -> None:
    stock, training, first, second, developer, our_developer, strings, our_strings = output.rows(4)
    early, late = "Three times four is twelve.", "Twelve and five is seventeen."
    assert early not in stock.text and late in stock.trained
    assert early in training.trained and late in training.trained
    assert early in first.trained and late in second.trained
    # What a server sends with the second query does not hold the reasoning of the first.
    assert early not in second.text

    assert "pounds.<|im_end|>" in developer.trained and "created by Alibaba Cloud" in developer.text
    assert "Give weights in pounds.<|im_end|>" not in developer.text
    assert "system\nGive weights in pounds.<|im_end|>" in our_developer.text

    assert r'"arguments": "{\"parcel\": 7}"' in strings.trained
    assert '"arguments": {"parcel": 7}' in our_strings.trained


def test_pictures_of_the_page_are_what_the_script_draws(output: Output) -> None:
    page = (PICTURES.parent / "loss.md").read_text()
    drawn = sorted(path.name for path in output.pictures.iterdir())
    assert sorted(path.name for path in PICTURES.iterdir()) == drawn == sorted(re.findall(r"\(loss/(.*?)\)", page))
    for name in drawn:
        picture = (PICTURES / name).read_text()
        assert _words(picture) == _words((output.pictures / name).read_text()), "run silent_failures.py --svg docs/loss"
        assert "@font-face" not in picture and "<script" not in picture
    # Every figure of the page is one that the script prints.
    for count in re.findall(r"\d+ of \d[\d,]* tokens", page):
        trained, _, tokens, _ = count.split()
        assert f"{tokens} tokens, {trained} with loss" in output.printed, count


def _words(svg: str) -> list[str]:
    return re.findall(r"<text[^>]*>([^<]*)</text>", svg)
