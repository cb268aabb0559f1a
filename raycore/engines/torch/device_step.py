"""A step's input on a GPU, and attention over the cache by the kernels of `kernels.py`.

Everything a step needs goes to the device in one copy from pinned memory; nothing waits for the device before the logits are read.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from raycore.engines.torch.attention import AttentionCall
from raycore.engines.torch.batch import lay_out
from raycore.engines.torch.kernels import AttentionTiles, attend, store, tile_for
from raycore.engines.torch.kv_cache import KVCache, LayerShape
from raycore.engines.torch.scheduler import Chunk

SHORT_CONTEXT = 512
"""Tokens up to which a decode's keys are not worth splitting: one program reads them in a few microseconds."""
_PROGRAMS = 264
"""Two per multiprocessor of an H200: with fewer programs than this, long contexts are split."""
_MOST_SPLITS = 16


@dataclass(slots=True, frozen=True)
class Heads:
    """A model's key heads, and the query heads that share each."""

    kv: int
    groups: int


def uniform_heads(layers: Mapping[int, LayerShape]) -> Heads | None:
    """The heads of all layers; None where they differ, since the tiles of a step are laid out once for all."""
    kinds = {(shape.kv_heads, shape.heads) for shape in layers.values()}
    if len(kinds) != 1:
        return None
    kv_heads, heads = kinds.pop()
    return Heads(kv_heads, heads // kv_heads)


@dataclass(slots=True, frozen=True)
class TiledStep:
    """Stores new keys and values and attends with the kernels; a PagedStep."""

    cache: KVCache
    slots: torch.Tensor
    tiles: AttentionTiles

    def attend(self, layer: int, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, call: AttentionCall) -> torch.Tensor:
        """One launch to store, one or two to attend; nothing is copied or waited for."""
        store(self.cache.keys[layer], self.cache.values[layer], self.slots, key, value)
        return self.attend_stored(layer, query, call)

    def attend_stored(self, layer: int, query: torch.Tensor, call: AttentionCall) -> torch.Tensor:
        """The same where the new keys and values are in the cache already."""
        return attend(
            query,
            self.cache.keys[layer],
            self.cache.values[layer],
            self.tiles,
            block_size=self.cache.block_size,
            scale=query.shape[-1] ** -0.5 if call.scale is None else call.scale,
            window=call.window,
            softcap=call.softcap,
        )


@dataclass(slots=True, frozen=True)
class DeviceInput:
    """What the model is called with: ids and positions [1, T], the rows that need logits [S], the attention step, and prompts that are
    embeddings.
    """

    token_ids: torch.Tensor
    positions: torch.Tensor
    logit_rows: torch.Tensor | int
    step: TiledStep
    embeds: Sequence[tuple[int, torch.Tensor]] = ()


def splits_for(sequences: int, kv_heads: int, longest: int) -> int:
    """Programs per key head and sequence: one, unless few sequences with long contexts would leave the device idle."""
    programs = sequences * kv_heads
    if longest <= SHORT_CONTEXT or programs >= _PROGRAMS:
        return 1
    wanted = min(_MOST_SPLITS, -(-_PROGRAMS // programs))
    return 1 << (wanted - 1).bit_length()


def build_input(chunks: Sequence[Chunk], cache: KVCache, heads: Heads, device: torch.device) -> DeviceInput:
    """Lay out a step's chunks for the kernels."""
    layout = lay_out(chunks, cache.block_size)
    counts = np.diff(layout.starts)
    is_decode = layout.decodes == len(counts)
    tile = tile_for(heads.groups, is_decode=is_decode)
    per_tile = tile // (heads.groups)
    tiles_each = -(-counts // per_tile)
    tile_rows = np.repeat(np.arange(len(counts)), tiles_each)
    first_tile = np.cumsum(tiles_each) - tiles_each
    tile_begins = (np.arange(len(tile_rows)) - first_tile[tile_rows]) * per_tile
    splits = splits_for(len(counts), heads.kv, int(layout.lengths.max())) if is_decode else 1
    columns = (
        layout.token_ids,
        layout.positions,
        layout.slots,
        layout.logit_rows,
        layout.lengths,
        layout.starts,
        tile_rows,
        tile_begins,
        layout.tables.reshape(-1),
    )
    packed = torch.from_numpy(np.concatenate(columns))
    if device.type == "cuda":
        packed = packed.pin_memory().to(device, non_blocking=True)
    ids, positions, slots, logit_rows, lengths, starts, rows, begins, tables = packed.split([len(c) for c in columns])
    tiles = AttentionTiles(tables.view(layout.tables.shape), lengths, starts, rows, begins, tile, splits)
    return DeviceInput(ids[None], positions[None], logit_rows, TiledStep(cache, slots, tiles), layout.embeds)
