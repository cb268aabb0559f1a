"""One step's input as tensors: everything that all layers need, computed once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

from raycore.engines.torch.blocks import SCRATCH_BLOCK
from raycore.engines.torch.scheduler import Chunk

NO_WINDOW = 0
"""Key of the masks of layers that see everything before them."""


@dataclass(slots=True, frozen=True)
class PromptSpan:
    """One prompt chunk's place in the flat batch: rows `begin` to `end`, positions `start` to `length`."""

    begin: int
    end: int
    start: int
    length: int
    table: torch.Tensor
    """Block table [1, M] int64."""


@dataclass(slots=True)
class StepBatch:
    """A flat, ragged batch of T tokens: first one row per decoding sequence, then the prompt chunks one after another.

    `token_ids`, `positions` [1, T] int64; `slots` [T] int64: where each token's key and value go; `tables` [D, M] int64 of the decodes,
    padded with the scratch block; `lengths` [D] int64: tokens each decode sees, itself included; `logit_rows` [S] int64.
    """

    token_ids: torch.Tensor
    positions: torch.Tensor
    slots: torch.Tensor
    decodes: int
    tables: torch.Tensor
    lengths: torch.Tensor
    spans: list[PromptSpan]
    logit_rows: torch.Tensor
    block_size: int
    dtype: torch.dtype
    _decode_masks: dict[int, torch.Tensor] = field(default_factory=dict)
    _span_masks: dict[tuple[int, int], torch.Tensor | None] = field(default_factory=dict)

    def decode_mask(self, window: int, groups: int) -> torch.Tensor:
        """What decodes may see: additive, [D, 1, groups, M * block_size]; `groups` query heads share a key head."""
        mask = self._decode_masks.get(window)
        if mask is None:
            places = torch.arange(self.tables.shape[1] * self.block_size, device=self.lengths.device)
            hidden = places >= self.lengths[:, None]
            if window != NO_WINDOW:
                hidden |= places < self.lengths[:, None] - window
            mask = self._decode_masks[window] = _additive(hidden, self.dtype)[:, None, None, :]
        return mask.expand(-1, -1, groups, -1)

    def span_mask(self, index: int, window: int) -> torch.Tensor | None:
        """What a prompt chunk may see: additive, [rows, padded length]; None where plain causal attention over the chunk says it all."""
        span = self.spans[index]
        key = (index, window)
        if key not in self._span_masks:
            sees_all = window == NO_WINDOW or window >= span.length
            self._span_masks[key] = None if span.start == 0 and sees_all else self._build_span_mask(span, 0 if sees_all else window)
        return self._span_masks[key]

    def _build_span_mask(self, span: PromptSpan, window: int) -> torch.Tensor:
        places = torch.arange(span.table.shape[1] * self.block_size, device=self.slots.device)
        rows = torch.arange(span.start, span.length, device=self.slots.device)[:, None]
        hidden = places > rows
        if window != NO_WINDOW:
            hidden |= places <= rows - window
        return _additive(hidden, self.dtype)


def build_batch(chunks: Sequence[Chunk], *, block_size: int, dtype: torch.dtype, device: torch.device) -> StepBatch:
    """Lay out a step's chunks; single tokens come first and are handled as decodes, whatever they are."""
    singles = [chunk for chunk in chunks if chunk.length == 1]
    ordered = singles + [chunk for chunk in chunks if chunk.length > 1]
    starts = np.array([c.start for c in ordered], dtype=np.int64)
    counts = np.array([c.length for c in ordered], dtype=np.int64)
    ends = counts.cumsum()
    owner = np.repeat(np.arange(len(ordered)), counts)
    positions = np.arange(ends[-1]) - (ends - counts)[owner] + starts[owner]
    tables = _padded_tables(ordered, block_size)
    slots = tables[owner, positions // block_size] * block_size + positions % block_size
    ids = np.concatenate([c.sequence.tokens[c.start : c.start + c.length] for c in ordered]).astype(np.int64)

    def tensor(array: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(np.ascontiguousarray(array)).to(device, non_blocking=True)

    last = np.array([c.is_last for c in ordered])
    decodes = len(singles)
    lengths = starts[:decodes] + 1
    width = -(-int(lengths.max()) // block_size) if decodes else 0
    spans = [
        PromptSpan(
            int(ends[i] - counts[i]),
            int(ends[i]),
            c.start,
            c.start + c.length,
            tensor(tables[i : i + 1, : -(-(c.start + c.length) // block_size)]),
        )
        for i, c in enumerate(ordered[decodes:], start=decodes)
    ]
    return StepBatch(
        token_ids=tensor(ids)[None],
        positions=tensor(positions)[None],
        slots=tensor(slots),
        decodes=decodes,
        tables=tensor(tables[:decodes, :width]),
        lengths=tensor(lengths),
        spans=spans,
        logit_rows=tensor(ends[last] - 1),
        block_size=block_size,
        dtype=dtype,
    )


def sampled_chunks(chunks: Sequence[Chunk]) -> list[Chunk]:
    """The chunks that end in logits, in the order of the logits' rows."""
    return [c for c in chunks if c.length == 1 and c.is_last] + [c for c in chunks if c.length > 1 and c.is_last]


def _padded_tables(chunks: Sequence[Chunk], block_size: int) -> np.ndarray:
    widths = [-(-(c.start + c.length) // block_size) for c in chunks]
    tables = np.full((len(chunks), max(widths)), SCRATCH_BLOCK, dtype=np.int64)
    for row, (chunk, width) in enumerate(zip(chunks, widths, strict=True)):
        tables[row, :width] = chunk.sequence.blocks[:width]
    return tables


def _additive(hidden: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return torch.zeros(hidden.shape, dtype=dtype, device=hidden.device).masked_fill_(hidden, float("-inf"))
