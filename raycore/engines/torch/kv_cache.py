"""The tensors of the paged KV cache, and how many tokens of it fit in memory."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from raycore.engines.torch.options import TorchEngineOptions
from raycore.errors import ConfigurationError

CPU_KV_TOKENS = 32_768
"""Default capacity on CPU: more than a CPU serves at once; see also the share below."""
CPU_MEMORY_SHARE = 0.25
"""Share of the free memory that the default capacity takes at most on CPU, where other processes live too."""


@dataclass(slots=True, frozen=True)
class LayerShape:
    """What one attention layer stores per token, and how many query heads read it."""

    kv_heads: int
    key_dim: int
    value_dim: int
    heads: int

    def bytes_per_token(self, dtype: torch.dtype) -> int:
        """Bytes of one token's key and value."""
        return self.kv_heads * (self.key_dim + self.value_dim) * dtype.itemsize


class KVCache:
    """Keys and values by slot: per layer [blocks * block_size, kv_heads, dim], zero at first.

    Zero, not uninitialised: block tables are padded, and a masked NaN would still be a NaN after attention.
    """

    def __init__(self, layers: Mapping[int, LayerShape], *, blocks: int, block_size: int, dtype: torch.dtype, device: torch.device) -> None:
        self.block_size = block_size
        self.layers = dict(layers)
        self._blocks, self._dtype, self._device = blocks, dtype, device
        self.allocate()

    def allocate(self) -> None:
        """Make the tensors, again after `release`; what they held before is gone."""
        slots, dtype, device = self._blocks * self.block_size, self._dtype, self._device
        self.keys = {i: torch.zeros(slots, s.kv_heads, s.key_dim, dtype=dtype, device=device) for i, s in self.layers.items()}
        self.values = {i: torch.zeros(slots, s.kv_heads, s.value_dim, dtype=dtype, device=device) for i, s in self.layers.items()}
        # One row per block: gathering whole blocks copies kilobytes at a time, slots would copy a few hundred bytes.
        self._key_rows = {i: k.view(self._blocks, -1) for i, k in self.keys.items()}
        self._value_rows = {i: v.view(self._blocks, -1) for i, v in self.values.items()}

    def release(self) -> None:
        """Free the tensors; nothing may be written or gathered until `allocate`."""
        for part in (self.keys, self.values, self._key_rows, self._value_rows):
            part.clear()

    @property
    def total_bytes(self) -> int:
        """Memory of all layers; 0 while released."""
        return sum(t.nbytes for part in (self.keys, self.values) for t in part.values())

    def write(self, layer: int, slots: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> None:
        """Store new tokens: slots [T] int64, key and value [T, kv_heads, dim]."""
        self.keys[layer].index_copy_(0, slots, key)
        self.values[layer].index_copy_(0, slots, value)

    def gather(self, layer: int, tables: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values of block tables [B, M] int64, each as [B, kv_heads, M * block_size, dim] (a transposed view)."""
        batch, width = tables.shape
        rows = tables.flatten()
        length = width * self.block_size
        _, heads, key_dim = self.keys[layer].shape
        key = self._key_rows[layer].index_select(0, rows).view(batch, length, heads, key_dim).transpose(1, 2)
        value = self._value_rows[layer].index_select(0, rows).view(batch, length, heads, self.values[layer].shape[2]).transpose(1, 2)
        return key, value

    def view(self, layer: int, run: slice) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values of a run of slots, each as [1, kv_heads, length, dim], without a copy."""
        return self.keys[layer][None, run].transpose(1, 2), self.values[layer][None, run].transpose(1, 2)

    def clear(self, blocks: Sequence[int]) -> None:
        """Zero these blocks: a NaN left behind would reach the next holder through its masked slots."""
        rows = list(blocks)
        for part in (self._key_rows, self._value_rows):
            for tensor in part.values():
                tensor[rows] = 0


def choose_kv_tokens(
    options: TorchEngineOptions, layers: Mapping[int, LayerShape], *, dtype: torch.dtype, device: torch.device, model_limit: int
) -> int:
    """Capacity in tokens, a multiple of the block size; raises ConfigurationError when not even one block fits."""
    if options.kv_tokens is not None:
        return options.kv_tokens // options.block_size * options.block_size
    per_token = sum(shape.bytes_per_token(dtype) for shape in layers.values())
    if device.type == "cuda":
        free_bytes, total_bytes = torch.cuda.mem_get_info(device)
        budget_bytes = free_bytes - int(total_bytes * (1 - options.gpu_memory_utilization))
        tokens = min(budget_bytes // per_token, options.max_sequences * model_limit)
    else:
        budget_bytes = int(_free_memory_bytes() * CPU_MEMORY_SHARE)
        tokens = min(budget_bytes // per_token, CPU_KV_TOKENS)
    blocks = tokens // options.block_size
    if blocks < 1:
        raise ConfigurationError(
            f"no memory for a KV cache: a block takes {per_token * options.block_size} bytes, {max(budget_bytes, 0)} bytes are free for it"
        )
    return blocks * options.block_size


def _free_memory_bytes() -> int:
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
