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
    padded with the scratch block; `lengths` [D] int64: tokens each decode sees, itself included; `logit_rows` [S + Q] int64: the rows of
    `sampled_chunks`, then those of `prompt_logit_chunks`; `embeds`: (first row, [rows, hidden]) of prompts that are no token ids.
    """

    token_ids: torch.Tensor
    positions: torch.Tensor
    slots: torch.Tensor
    decodes: int
    tables: torch.Tensor
    lengths: torch.Tensor
    spans: list[PromptSpan]
    logit_rows: torch.Tensor
    embeds: list[tuple[int, torch.Tensor]]
    block_size: int
    dtype: torch.dtype
    run: slice | None = None
    """Slots of the tokens of the only decode, where its blocks lie one after another: they can be seen without being gathered."""
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

    def lone_run(self, window: int) -> slice | None:
        """What the only decode may see, as a run of slots; None where there are several decodes or their blocks are scattered."""
        run = self.run
        if run is None or window == NO_WINDOW or run.stop - run.start <= window:
            return run
        return slice(run.stop - window, run.stop)

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


@dataclass(slots=True, frozen=True)
class Layout:
    """A step's chunks as one flat batch of T tokens in R sequences, on the host; all arrays int64.

    `token_ids`, `positions`, `slots` [T]; `tables` [R, M], padded with the scratch block; `starts` [R + 1]: where each sequence's rows
    begin; `lengths` [R]: tokens that its last row sees; `logit_rows` [S + Q]: rows whose logits are wanted, those of `sampled_chunks`, then
    those of `prompt_logit_chunks`. The first `decodes` sequences have one row. `embeds`: first row and [rows, hidden] of prompts that are
    no token ids.
    """

    token_ids: np.ndarray
    positions: np.ndarray
    slots: np.ndarray
    tables: np.ndarray
    starts: np.ndarray
    lengths: np.ndarray
    logit_rows: np.ndarray
    decodes: int
    embeds: list[tuple[int, torch.Tensor]]


def lay_out(chunks: Sequence[Chunk], block_size: int) -> Layout:
    """Single tokens come first and are handled as decodes, whatever they are; then the longer chunks in order."""
    singles = [chunk for chunk in chunks if chunk.length == 1]
    ordered = singles + [chunk for chunk in chunks if chunk.length > 1]
    begins = np.array([c.start for c in ordered], dtype=np.int64)
    counts = np.array([c.length for c in ordered], dtype=np.int64)
    starts = np.concatenate([np.zeros(1, dtype=np.int64), counts.cumsum()])
    owner = np.repeat(np.arange(len(ordered)), counts)
    positions = np.arange(starts[-1]) + (begins - starts[:-1])[owner]
    tables = _padded_tables(ordered, block_size)
    last = np.array([c.is_last for c in ordered])
    begin_rows = starts[:-1].tolist()
    prompt_rows = [np.arange(row, row + c.prompt_logits) for row, c in zip(begin_rows, ordered, strict=True) if c.prompt_logits]
    return Layout(
        token_ids=np.concatenate([c.sequence.tokens[c.start : c.start + c.length] for c in ordered]).astype(np.int64),
        positions=positions,
        slots=tables[owner, positions // block_size] * block_size + positions % block_size,
        tables=tables,
        starts=starts,
        lengths=begins + counts,
        logit_rows=np.concatenate([starts[1:][last] - 1, *prompt_rows]),
        decodes=len(singles),
        embeds=[
            (row, c.sequence.embeds[c.start : c.start + c.length]) for row, c in zip(starts.tolist(), ordered, strict=False) if c.has_embeds
        ],
    )


def build_batch(chunks: Sequence[Chunk], *, block_size: int, dtype: torch.dtype, device: torch.device) -> StepBatch:
    """A step's chunks as tensors."""
    layout = lay_out(chunks, block_size)

    def tensor(array: np.ndarray) -> torch.Tensor:
        return torch.from_numpy(np.ascontiguousarray(array)).to(device, non_blocking=True)

    decodes = layout.decodes
    lengths = layout.lengths[:decodes]
    width = -(-int(lengths.max()) // block_size) if decodes else 0
    spans = []
    for i in range(decodes, len(layout.lengths)):
        begin, end, length = int(layout.starts[i]), int(layout.starts[i + 1]), int(layout.lengths[i])
        table = tensor(layout.tables[i : i + 1, : -(-length // block_size)])
        spans.append(PromptSpan(begin, end, length - (end - begin), length, table))
    run = None
    if decodes == 1:
        table = layout.tables[0, :width]
        if bool((np.diff(table) == 1).all()):
            first = int(table[0]) * block_size
            run = slice(first, first + int(lengths[0]))
    return StepBatch(
        token_ids=tensor(layout.token_ids)[None],
        positions=tensor(layout.positions)[None],
        slots=tensor(layout.slots),
        decodes=decodes,
        tables=tensor(layout.tables[:decodes, :width]),
        lengths=tensor(lengths),
        spans=spans,
        logit_rows=tensor(layout.logit_rows),
        embeds=layout.embeds,
        block_size=block_size,
        dtype=dtype,
        run=run,
    )


def sampled_chunks(chunks: Sequence[Chunk]) -> list[Chunk]:
    """The chunks that end in logits, in the order of the logits' rows."""
    return [c for c in chunks if c.length == 1 and c.is_last] + [c for c in chunks if c.length > 1 and c.is_last]


def prompt_logit_chunks(chunks: Sequence[Chunk]) -> list[Chunk]:
    """The chunks whose prompt tokens' log probabilities are due, in the order of the logits' further rows."""
    return [c for c in chunks if c.length == 1 and c.prompt_logits] + [c for c in chunks if c.length > 1 and c.prompt_logits]


def in_row_order(chunks: Sequence[Chunk]) -> list[Chunk]:
    """The chunks as they lie in the flat batch."""
    return [c for c in chunks if c.length == 1] + [c for c in chunks if c.length > 1]


def _padded_tables(chunks: Sequence[Chunk], block_size: int) -> np.ndarray:
    widths = [-(-(c.start + c.length) // block_size) for c in chunks]
    tables = np.full((len(chunks), max(widths)), SCRATCH_BLOCK, dtype=np.int64)
    for row, (chunk, width) in enumerate(zip(chunks, widths, strict=True)):
        tables[row, :width] = chunk.sequence.blocks[:width]
    return tables


def _additive(hidden: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    return torch.zeros(hidden.shape, dtype=dtype, device=hidden.device).masked_fill_(hidden, float("-inf"))
