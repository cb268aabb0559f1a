"""Decode steps as CUDA graphs: the whole forward pass of a batch size is recorded once and then started with one call.

A decode step of a small model is hundreds of kernels of a few microseconds; starting them from Python takes longer than running them.
"""

from __future__ import annotations

import functools
import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from raycore.engines.torch.device_step import SHORT_CONTEXT, DeviceInput, Heads, TiledStep, splits_for
from raycore.engines.torch.kernels import AttentionTiles, tile_for
from raycore.engines.torch.kv_cache import KVCache
from raycore.engines.torch.scheduler import Chunk

_log = logging.getLogger(__name__)

Forward = Callable[[DeviceInput], torch.Tensor]
"""The model's forward pass: logits [S, vocabulary] in the model's type."""


def bucket_sizes(max_sequences: int) -> list[int]:
    """Batch sizes that are recorded, ascending; a step is padded to the next. Steps of 16 keep the padding of large batches small."""
    sizes = {size for size in (1, 2, 4, 8) if size < max_sequences} | set(range(16, max_sequences, 16)) | {max_sequences}
    return sorted(sizes)


@dataclass(slots=True, frozen=True)
class _Recorded:
    graph: torch.cuda.CUDAGraph
    size: int


class DecodeGraphs:
    """Recorded decode steps of one model on one cache; the input buffers that all of them read."""

    def __init__(self, cache: KVCache, heads: Heads, *, vocab_size: int, max_sequences: int, max_blocks: int, device: torch.device) -> None:
        """`max_blocks`: blocks of the longest sequence."""
        self._cache = cache
        self._heads = heads
        self._tile = tile_for(heads.groups, is_decode=True)
        self._sizes = bucket_sizes(max_sequences)
        largest = self._sizes[-1]
        # Row 0: token ids, 1: positions, 2: slots, 3: lengths.
        self._host = torch.zeros(4, largest, dtype=torch.int64, pin_memory=True)
        self._columns = self._host.numpy()
        self._columns[3] = 1
        self._inputs = self._host.to(device)
        self._host_tables = torch.zeros(largest, max_blocks, dtype=torch.int32)
        self._tables = BlockTables(self._host_tables.numpy())
        self._device_tables = torch.zeros(largest, max_blocks, dtype=torch.int32, device=device)
        self._starts = torch.arange(largest + 1, device=device)
        self._zeros = torch.zeros(largest, dtype=torch.int64, device=device)
        self._logits = torch.zeros(largest, vocab_size, dtype=torch.float32, device=device)
        self._recorded: dict[tuple[int, int], _Recorded] = {}

    @property
    def is_recorded(self) -> bool:
        """Whether there is anything to replay."""
        return bool(self._recorded)

    def accepts(self, chunks: Sequence[Chunk]) -> bool:
        """Whether this step is decodes alone, and not too many."""
        return len(chunks) <= self._sizes[-1] and all(chunk.length == 1 and chunk.is_last and not chunk.has_embeds for chunk in chunks)

    def record(self, forward: Forward) -> None:
        """Record every batch size, the largest first so that the smaller ones fit in its memory; raises what CUDA or the model raises."""
        begin = time.perf_counter()
        pool = torch.cuda.graph_pool_handle()
        stream = _side_stream()
        for size in reversed(self._sizes):
            for splits in {splits_for(size, self._heads.kv, longest) for longest in (1, SHORT_CONTEXT + 1)}:
                self._recorded[size, splits] = self._record(forward, size, splits, pool, stream)
        torch.cuda.synchronize()
        _log.info("recorded %d CUDA graphs in %.1f s", len(self._recorded), time.perf_counter() - begin)

    def replay(self, chunks: Sequence[Chunk]) -> torch.Tensor:
        """Logits [S, vocabulary] float32, good until the next replay."""
        count = len(chunks)
        starts = [chunk.start for chunk in chunks]
        longest = max(starts) + 1
        size = next(size for size in self._sizes if size >= count)
        columns, block_size = self._columns, self._cache.block_size
        columns[0, :count] = [chunk.sequence.tokens[-1] for chunk in chunks]
        columns[1, :count] = starts
        width = self._tables.update([chunk.sequence.blocks for chunk in chunks])
        if width:
            self._device_tables[:count, :width].copy_(self._host_tables[:count, :width].pin_memory(), non_blocking=True)
        position = columns[1, :count]
        columns[2, :count] = (
            self._tables.array[np.arange(count), position // block_size].astype(np.int64) * block_size + position % block_size
        )
        columns[3, :count] = position + 1
        # Rows of padding store to the scratch block and see one token.
        columns[:3, count:size] = 0
        columns[3, count:size] = 1
        self._inputs.copy_(self._host, non_blocking=True)
        self._recorded[size, splits_for(size, self._heads.kv, longest)].graph.replay()
        return self._logits[:count]

    def close(self) -> None:
        """Give the graphs' memory back."""
        for recorded in self._recorded.values():
            recorded.graph.reset()
        self._recorded.clear()

    def _record(self, forward: Forward, size: int, splits: int, pool: Any, stream: torch.cuda.Stream) -> _Recorded:
        ids, positions, slots, lengths = self._inputs[:, :size]
        tiles = AttentionTiles(
            self._device_tables[:size], lengths, self._starts[: size + 1], self._starts[:size], self._zeros[:size], self._tile, splits
        )
        step = DeviceInput(ids[None], positions[None], 0, TiledStep(self._cache, slots, tiles))
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):  # compiles kernels and sets up libraries, which must not happen while recording
            self._logits[:size].copy_(forward(step))
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
            self._logits[:size].copy_(forward(step))
        return _Recorded(graph, size)


@functools.cache
def _side_stream() -> torch.cuda.Stream:
    """One for all recordings: cuBLAS keeps a workspace of 32 MiB for each stream that it has seen, for as long as the process lives."""
    return torch.cuda.Stream()


class BlockTables:
    """Block tables of the batch, row by row, changed only where a sequence is new or has grown."""

    def __init__(self, array: np.ndarray) -> None:
        """`array` [rows, blocks] is written in place."""
        self.array = array
        # Lists are compared by identity: a preempted sequence gets a new one, a growing one is extended in place.
        self._known: list[tuple[list[int], int]] = []

    def update(self, tables: Sequence[list[int]]) -> int:
        """Make row i hold `tables[i]`; the longest table's blocks, or 0 when nothing changed."""
        known, changed, width = self._known, False, 0
        del known[len(tables) :]
        for row, blocks in enumerate(tables):
            count = len(blocks)
            width = max(width, count)
            if row < len(known):
                before, written = known[row]
                if before is blocks and written == count:
                    continue
                first = written if before is blocks and written < count else 0
                known[row] = blocks, count
            else:
                first = 0
                known.append((blocks, count))
            self.array[row, first:count] = blocks[first:]
            changed = True
        return width if changed else 0
