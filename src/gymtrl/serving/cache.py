"""Keys and values of the rows that are being generated, in buffers that are written in place.

Row `i` of the batch owns slot `i` and fills its columns from the left: token `j` of the row lies in column `j`. A step
therefore writes one column a row, wherever that row happens to be, and nothing is concatenated or moved.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from transformers.cache_utils import Cache, CacheLayerMixin

COLUMN_STEP = 64
"""Columns are allocated in multiples of this many tokens."""


class SlotLayer(CacheLayerMixin):  # type: ignore[misc]  # untyped base
    """Keys and values of one attention layer, each `[slots, kv_heads, columns, head_dim]`.

    `SlotCache.aim` says which rows the next `update` belongs to.
    """

    is_sliding = False

    def __init__(self) -> None:
        super().__init__()
        self.keys: torch.Tensor | None = None
        self.values: torch.Tensor | None = None
        self.size = (0, 0)
        self.rows = slice(0, 0)
        self.index: tuple[torch.Tensor, torch.Tensor] | None = None
        self.width = 0

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        # Zeros, not uninitialised memory: masked columns get weight 0, and 0 times a stray NaN is NaN.
        self.keys = _grown(None, key_states, self.size)
        self.values = _grown(None, value_states, self.size)
        self.is_initialized = True

    def resize(self, slots: int, columns: int) -> None:
        self.size = (slots, columns)
        if self.keys is not None and self.values is not None:
            self.keys = _grown(self.keys, self.keys, self.size)
            self.values = _grown(self.values, self.values, self.size)

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: object, **kwargs: object
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if self.keys is None or self.values is None:
            self.lazy_initialization(key_states, value_states)
        assert self.keys is not None and self.values is not None and self.index is not None
        row, column = self.index
        keys, values = self.keys[self.rows], self.values[self.rows]
        # Index tensors around a slice put the indexed dimensions first: [rows, tokens, kv_heads, head_dim].
        keys[row, :, column] = key_states.transpose(1, 2)
        values[row, :, column] = value_states.transpose(1, 2)
        return keys[:, :, : self.width], values[:, :, : self.width]

    def get_seq_length(self) -> int:
        return self.width

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.width, 0

    def get_max_length(self) -> int:
        return -1


class SlotCache(Cache):  # type: ignore[misc]  # untyped base
    """Keys and values of every row in the batch, one slot a row.

    Args:
        layers (`int`): Attention layers of the model.
        limit (`int`, *optional*, defaults to 2**62): Slots times columns that are allocated ahead of need at most. What
            is needed is allocated in any case: see `fits` and `trim`.
    """

    def __init__(self, layers: int, limit: int = 2**62) -> None:
        super().__init__(layers=[SlotLayer() for _ in range(layers)])
        self.limit = limit
        self.slots = 0
        self.columns = 0

    def fits(self, slots: int, columns: int) -> bool:
        """Whether `slots` rows of `columns` tokens stay within the limit when nothing more is allocated."""
        return slots * _rounded(columns) <= self.limit

    def reserve(self, slots: int, columns: int) -> None:
        """Makes room for `slots` rows of `columns` tokens; what is stored stays where it is."""
        if slots <= self.slots and columns <= self.columns:
            return
        # Growing copies what is there, so it goes in steps that keep the number of copies logarithmic.
        ahead_slots = max(slots, 2 * self.slots) if slots > self.slots else self.slots
        ahead = max(columns, self.columns + self.columns // 4) if columns > self.columns else self.columns
        if self.fits(ahead_slots, ahead):
            self._resize(ahead_slots, _rounded(ahead))
        else:
            self._resize(max(slots, self.slots), max(_rounded(columns), self.columns))

    def trim(self, slots: int, columns: int) -> None:
        """Gives back all but the first `slots` slots and the columns that `columns` tokens need."""
        self._resize(min(slots, self.slots), min(_rounded(columns), self.columns))

    def _resize(self, slots: int, columns: int) -> None:
        if (slots, columns) == (self.slots, self.columns):
            return
        self.slots, self.columns = slots, columns
        for layer in self.layers:
            layer.resize(slots, columns)

    def release(self) -> None:
        """Gives all memory back. Only for an empty batch."""
        for layer in self.layers:
            layer.keys = layer.values = None
            layer.is_initialized = False
            layer.size = (0, 0)
        self.slots = self.columns = 0

    def aim(self, first: int, columns: torch.Tensor, width: int) -> None:
        """Says where the next forward pass writes and how far it reads.

        Args:
            first (`int`): Slot of the batch's first row; the others follow it.
            columns (`torch.Tensor`): `[rows, tokens]` int64, the column of every new token.
            width (`int`): Columns that attention sees, counted from the left.
        """
        count = columns.shape[0]
        row = torch.arange(count, device=columns.device)[:, None]
        for layer in self.layers:
            layer.rows, layer.index, layer.width = (
                slice(first, first + count),
                (row, columns),
                width,
            )

    def read(self, slot: int, length: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Copies the first `length` tokens of a row: keys and values, each `[layers, kv_heads, length, head_dim]`."""
        return (
            torch.stack([layer.keys[slot, :, :length] for layer in self.layers]),
            torch.stack([layer.values[slot, :, :length] for layer in self.layers]),
        )

    def write(self, slots: Sequence[int], saved: tuple[torch.Tensor, torch.Tensor], length: int) -> None:
        """Puts the first `length` tokens of what `read` returned at the start of every row in `slots`."""
        keys, values = saved
        for index, layer in enumerate(self.layers):
            if layer.keys is None:
                layer.lazy_initialization(keys[index][None], values[index][None])
            for slot in slots:
                layer.keys[slot, :, :length] = keys[index, :, :length]
                layer.values[slot, :, :length] = values[index, :, :length]

    def copy(self, source: int, target: int, length: int) -> None:
        """Copies the first `length` tokens of one row over another."""
        for layer in self.layers:
            layer.keys[target, :, :length] = layer.keys[source, :, :length]
            layer.values[target, :, :length] = layer.values[source, :, :length]


def _grown(old: torch.Tensor | None, like: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    slots, columns = size
    new = torch.zeros((slots, like.shape[1], columns, like.shape[3]), dtype=like.dtype, device=like.device)
    if old is not None:
        kept = slice(min(slots, old.shape[0])), slice(None), slice(min(columns, old.shape[2]))
        new[kept] = old[kept]
    return new


def _rounded(columns: int) -> int:
    return -(-columns // COLUMN_STEP) * COLUMN_STEP
