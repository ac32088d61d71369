"""What `validate` serves: a run, a model, an adapter, or nothing where an endpoint is named."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from gymtrl.errors import UserError
from gymtrl.serving.hosted import Hosted
from gymtrl.validation.settings import ValidateSettings
from gymtrl.validation.validate import candidate, validate_inputs


def settings(**chosen: Any) -> ValidateSettings:
    return ValidateSettings(**({"baseline": "before.jsonl"} | chosen))


def test_a_folder_is_the_candidate(tmp_path: Path) -> None:
    for holds in ("model/config.json", "adapter/adapter_config.json", "config.json", "adapter_config.json"):
        run = tmp_path / holds.replace("/", "-")
        (run / holds).parent.mkdir(parents=True)
        (run / holds).write_text("{}")
        assert candidate(run, settings()) == (run / holds).parent
    both = tmp_path / "both"
    for name in ("model/config.json", "adapter/adapter_config.json"):
        (both / name).parent.mkdir(parents=True)
        (both / name).write_text("{}")
    assert candidate(both, settings()) == both / "model"


def test_an_endpoint_is_the_candidate(tmp_path: Path) -> None:
    named = settings(
        endpoint="https://host/v1",
        endpoint_model="big",
        baseline=str(tmp_path / "before.jsonl"),
        tasks=tmp_path / "tasks.jsonl",
    )
    for name in ("before", "tasks"):
        (tmp_path / f"{name}.jsonl").write_text("")
    assert candidate(None, named) == Hosted("https://host/v1", "big")
    assert validate_inputs(None, named) == [tmp_path / "before.jsonl", tmp_path / "tasks.jsonl"]


def test_one_candidate_and_no_more(tmp_path: Path) -> None:
    for checkpoint, chosen, message in (
        (None, {}, "nothing to validate"),
        (None, {"endpoint": "https://host/v1"}, "does not say which model"),
        (tmp_path, {"endpoint": "https://host/v1", "endpoint_model": "big"}, "two candidates"),
        (tmp_path, {}, "holds no model"),
    ):
        with pytest.raises(UserError, match=message):
            candidate(checkpoint, settings(**chosen))
