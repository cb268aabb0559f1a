"""A dense copy of what the decoding sequences have in the cache, on a CPU: it grows by a token a step, where a gather would copy all of it.

Attention wants keys and values of a batch in one padded tensor. Gathering them from blocks in every layer of every step is a tenth of a
decode step of 32 sequences; the copy is kept instead while sequences go on, and only what is new or has moved is copied. The paged cache
stays the truth: it is written as ever, and a row that does not fit its sequence any more is filled from it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

from raycore.engines.torch.kv_cache import KVCache
from raycore.engines.torch.scheduler import Chunk

MEMORY_SHARE = 0.25
"""Of the cache's own memory that the copy takes at most; beyond it decodes are gathered."""
_ROW_STEP, _TOKEN_STEP = 8, 64
"""Capacity grows in these steps."""
_AHEAD = 32
"""Tokens that a new copy has room for beyond the longest sequence."""


@dataclass(slots=True)
class WindowStep:
    """One step's view of the copy. Row r of it belongs to decode `order[r]`; None where that is r itself.

    `slots` [D] int64: where each decode's new token goes, rows and tokens flattened. `lengths` [D] int64: tokens that each row sees.
    """

    keys: dict[int, torch.Tensor]
    values: dict[int, torch.Tensor]
    order: torch.Tensor | None
    places: torch.Tensor | None
    slots: torch.Tensor
    lengths: torch.Tensor
    longest: int
    is_level: bool
    """Whether all rows see equally many tokens."""
    _masks: dict[int, torch.Tensor | None] = field(default_factory=dict)

    def append(self, layer: int, key: torch.Tensor, value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Store each decode's key and value [D, kv_heads, dim]; everything that rows hold, each as [D, kv_heads, longest, dim]."""
        views = []
        for store, new in ((self.keys[layer], key), (self.values[layer], value)):
            store.view(-1, *store.shape[2:]).index_copy_(0, self.slots, new)
            views.append(store[: len(self.lengths), : self.longest].transpose(1, 2))
        return views[0], views[1]

    def mask(self, window: int, groups: int, dtype: torch.dtype) -> torch.Tensor | None:
        """What rows may see: additive, [D, 1, groups, longest]; None where each sees all. `window`: 0, or tokens seen at most."""
        if window not in self._masks:
            self._masks[window] = self._build_mask(window, dtype)
        mask = self._masks[window]
        return None if mask is None else mask.expand(-1, -1, groups, -1)

    def _build_mask(self, window: int, dtype: torch.dtype) -> torch.Tensor | None:
        if self.is_level and not 0 < window < self.longest:
            return None
        tokens = torch.arange(self.longest)
        hidden = tokens >= self.lengths[:, None]
        if window:
            hidden |= tokens < self.lengths[:, None] - window
        return torch.zeros(hidden.shape, dtype=dtype).masked_fill_(hidden, float("-inf"))[:, None, None, :]


class DecodeWindow:
    """Keeps the copy of one cache; rows are dense, and the last ones move into the places of sequences that are gone."""

    def __init__(self, cache: KVCache) -> None:
        self._cache = cache
        self._keys: dict[int, torch.Tensor] = {}
        self._values: dict[int, torch.Tensor] = {}
        # Lists are compared by identity, as in `graphs.py`: a preempted sequence gets a new one.
        self._tables: list[list[int]] = []
        self._lengths: list[int] = []

    def arrange(self, decodes: Sequence[Chunk]) -> WindowStep | None:
        """Have a row for each of these single tokens, without the token itself; None, and no copy, where it would take too much memory."""
        count, longest = len(decodes), max(chunk.start for chunk in decodes) + 1
        if not self._has_room(count, longest) and not self._allocate(count, longest):
            self.release()
            return None
        decode_of = {id(chunk.sequence.blocks): i for i, chunk in enumerate(decodes)}
        order = self._keep(decodes, decode_of)
        present = set(order)
        missing = [i for i in range(count) if i not in present]
        self._fill(range(len(order), count), [decodes[i] for i in missing])
        order += missing
        self._tables = [decodes[i].sequence.blocks for i in order]
        self._lengths = [decodes[i].start + 1 for i in order]
        places = np.empty(count, dtype=np.int64)
        places[order] = np.arange(count)
        starts = np.array([chunk.start for chunk in decodes], dtype=np.int64)
        is_ordered = order == list(range(count))
        return WindowStep(
            self._keys,
            self._values,
            None if is_ordered else torch.tensor(order),
            None if is_ordered else torch.from_numpy(places),
            torch.from_numpy(places * self._capacity[1] + starts),
            torch.tensor(self._lengths),
            longest,
            min(self._lengths) == longest,
        )

    def release(self) -> None:
        """Free the copy."""
        self._keys.clear()
        self._values.clear()
        self._tables, self._lengths = [], []

    @property
    def total_bytes(self) -> int:
        """Memory of the copy."""
        return sum(tensor.nbytes for part in (self._keys, self._values) for tensor in part.values())

    @property
    def _capacity(self) -> tuple[int, int]:
        first = next(iter(self._keys.values()), None)
        return (0, 0) if first is None else (first.shape[0], first.shape[1])

    def _has_room(self, rows: int, tokens: int) -> bool:
        capacity = self._capacity
        return rows <= capacity[0] and tokens <= capacity[1]

    def _allocate(self, count: int, longest: int) -> bool:
        """Room to grow, with what is there; False where that is too much."""
        cache, (old_rows, old_tokens) = self._cache, self._capacity
        rows = max(old_rows, -(-count // _ROW_STEP) * _ROW_STEP)
        tokens = max(old_tokens, -(-(longest + _AHEAD) // _TOKEN_STEP) * _TOKEN_STEP)
        slots = next(iter(cache.keys.values())).shape[0]
        if rows * tokens > slots * MEMORY_SHARE:
            return False
        for store, source in ((self._keys, cache.keys), (self._values, cache.values)):
            for layer, tensor in source.items():
                grown = tensor.new_zeros(rows, tokens, *tensor.shape[1:])
                if layer in store:
                    grown[:old_rows, :old_tokens] = store[layer]
                store[layer] = grown
        return True

    def _keep(self, decodes: Sequence[Chunk], decode_of: dict[int, int]) -> list[int]:
        """Move the rows that still fit to the front, each at most once; which decode each of them belongs to."""
        fits: list[int | None] = []
        for table, length in zip(self._tables, self._lengths, strict=True):
            i = decode_of.get(id(table))
            fits.append(i if i is not None and decodes[i].start == length else None)
        kept = sum(i is not None for i in fits)
        order = fits[:kept]
        holes = [row for row, i in enumerate(order) if i is None]
        movers = [row for row in range(kept, len(fits)) if fits[row] is not None]
        if holes:
            source, target = torch.tensor(movers), torch.tensor(holes)
            for part in (self._keys, self._values):
                for tensor in part.values():
                    tensor.index_copy_(0, target, tensor.index_select(0, source))
            for row, mover in zip(holes, movers, strict=True):
                order[row] = fits[mover]
        return [i for i in order if i is not None]

    def _fill(self, rows: range, chunks: Sequence[Chunk]) -> None:
        """Copy what the cache holds of these sequences, and zeros behind it: a masked NaN would still be a NaN after attention."""
        size = self._cache.block_size
        for row, chunk in zip(rows, chunks, strict=True):
            table = torch.tensor(chunk.sequence.blocks[: -(-chunk.start // size)], dtype=torch.int64)[None]
            for layer, store in self._keys.items():
                key, value = self._cache.gather(layer, table)
                for target, source in ((store[row], key), (self._values[layer][row], value)):
                    target[: chunk.start] = source[0, :, : chunk.start].transpose(0, 1)
                    target[chunk.start :] = 0
