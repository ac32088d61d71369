"""What Gym writes beside X.jsonl: the rows that were asked for, and the attempts that failed."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

from .codec import decode_json, to_utf8
from .keys import EXTRA_BODY, input_key, named_cluster

INPUTS_SUFFIX = "_materialized_inputs"
FAILURES_SUFFIX = "_failures"
SIDECAR_SUFFIXES = (INPUTS_SUFFIX, FAILURES_SUFFIX, "_reward_profiling")


class InputRow(NamedTuple):
    """Where an input row stands in the sidecar, and its keys."""

    offset: int
    length: int
    input_key: str
    cluster_key: str | None


class Sidecar(NamedTuple):
    """The input rows of one run by (`_ng_task_index`, `_ng_rollout_index`): places and keys only, to save memory.

    Attributes:
        path (`Path`, *optional*): The sidecar, `None` where the run has none.
        rows (`dict`): The rows.
    """

    path: Path | None
    rows: dict[tuple[int, int], InputRow]

    def find(self, task_index: int | None, rollout_index: int | None) -> InputRow | None:
        """The input row of a rollout, where there is one."""
        if task_index is None or rollout_index is None:
            return None
        return self.rows.get((task_index, rollout_index))

    def read(self, row: InputRow) -> dict[str, Any]:
        """An input row as a later collection takes it: without `_ng_*` keys and without the seed of its repeat."""
        assert self.path is not None
        with self.path.open("rb") as stream:
            stream.seek(row.offset)
            value = decode_json(stream.read(row.length))
        return _without_seed({key: item for key, item in value.items() if not key.startswith("_ng_")})


def is_sidecar(path: Path) -> bool:
    """Whether Gym wrote the file beside a rollout file."""
    return path.name.partition(".jsonl")[0].endswith(SIDECAR_SUFFIXES)


def load_sidecar(rollouts: Path, cluster: str | None = None) -> Sidecar:
    """Reads the keys of `X_materialized_inputs.jsonl` beside X.jsonl.

    Args:
        rollouts (`Path`): X.jsonl.
        cluster (`str`, *optional*): Dotted path whose value is to be looked up in the input rows.

    Returns:
        `Sidecar`: Empty where there is no such file. Lines that are no input rows are left out.
    """
    path = inputs_beside(rollouts)
    if path is None:
        return Sidecar(None, {})
    state = path.stat()
    return _load(path, cluster, state.st_mtime_ns, state.st_size)


def inputs_beside(rollouts: Path) -> Path | None:
    """The path of `X_materialized_inputs.jsonl` beside X.jsonl, `None` where there is no such file."""
    path = rollouts.with_name(f"{rollouts.stem}{INPUTS_SUFFIX}.jsonl")
    return path if path.is_file() else None


def count_failures(rollouts: Path) -> dict[str, int]:
    """Counts the attempts that the world failed, by class, from `X_failures.jsonl` beside X.jsonl."""
    path = rollouts.with_name(f"{rollouts.stem}{FAILURES_SUFFIX}.jsonl")
    counts: Counter[str] = Counter()
    if path.is_file():
        for _, _, row in _rows(path):
            if row.get("_ng_failure_class") is not None:
                counts[to_utf8(str(row["_ng_failure_class"]))] += 1
    return dict(counts)


@lru_cache(maxsize=4)
def _load(path: Path, cluster: str | None, _modified: int, _size: int) -> Sidecar:
    rows: dict[tuple[int, int], InputRow] = {}
    for offset, length, row in _rows(path):
        task, repeat = row.get("_ng_task_index"), row.get("_ng_rollout_index")
        if type(task) is int and type(repeat) is int:
            try:
                named = named_cluster(cluster, row, None) if cluster else None
                rows[task, repeat] = InputRow(offset, length, input_key(row), named)
            except RecursionError:
                continue  # nested too deeply to have a key
    return Sidecar(path, rows)


def _rows(path: Path) -> Iterator[tuple[int, int, dict[str, Any]]]:
    offset = 0
    with path.open("rb") as stream:
        for line in stream:
            start, offset = offset, offset + len(line)
            if line.isspace():
                continue
            try:
                row = decode_json(line)
            except ValueError:
                continue
            if isinstance(row, dict):
                yield start, len(line), row


def _without_seed(row: dict[str, Any]) -> dict[str, Any]:
    """The seed belongs to one repeat; left in, every repeat of a later collection would be the same."""
    request = row.get("responses_create_params")
    metadata = request.get("metadata") if isinstance(request, dict) else None
    if not isinstance(request, dict) or not isinstance(metadata, dict) or not isinstance(metadata.get(EXTRA_BODY), str):
        return row
    try:
        extra = json.loads(metadata[EXTRA_BODY])
    except ValueError:
        return row
    if not isinstance(extra, dict) or "seed" not in extra:
        return row
    extra = {key: value for key, value in extra.items() if key != "seed"}
    metadata = {key: value for key, value in metadata.items() if key != EXTRA_BODY}
    if extra:
        metadata[EXTRA_BODY] = json.dumps(extra)
    request = {key: value for key, value in request.items() if key != "metadata"}
    if metadata:
        request["metadata"] = metadata
    return {**row, "responses_create_params": request}
