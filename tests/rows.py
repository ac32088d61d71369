"""Rollout rows as Gym writes them, made by hand."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any


def row(
    question: str, answer: str, reward: float | None, *, index: int = 0, repeat: int = 0, **more: Any
) -> dict[str, Any]:
    """A single-turn rollout."""
    made: dict[str, Any] = {
        "responses_create_params": {"input": [{"role": "user", "content": question}], "temperature": 1.0},
        "response": {
            "output": [
                {"type": "message", "role": "assistant", "content": [{"type": "output_text", "text": answer}]},
            ],
            "model": "m",
        },
        "reward": reward,
        "_ng_task_index": index,
        "_ng_rollout_index": repeat,
        "agent_ref": {"name": "agent"},
    }
    if reward is None:
        del made["reward"]
    return made | more


def write_rows(path: Path, rows: Iterable[dict[str, Any]]) -> Path:
    """Writes rows as JSONL."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    return path
