"""Triton kernels of the paged cache on a GPU: storing new keys and values, and attention over block tables.

One attention kernel serves decodes and prompt chunks alike, so a mixed step is one launch per layer, without a copy of the cache, a mask or
a synchronisation. A program takes one tile of query rows of one sequence and one key head; the query heads that share the key head are rows
of the same tile, so keys are read once per group (as FlashDecoding and grouped-query kernels do, Dao et al., 2023). Long contexts of few
sequences are split over programs whose partial softmaxes a second kernel adds up.

Triton comes with torch for CUDA only, so this module is imported where a CUDA device is used. Under TRITON_INTERPRET=1 it runs on the CPU.
"""

# A kernel is launched as kernel[grid](...), which the type of Triton's decorator does not say:
# pyright: reportIndexIssue=false

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton  # pyright: ignore[reportMissingImports]

from raycore.engines.torch import triton_kernels

DECODE_TILE = 16
"""Query rows of a decode's tile at least: tl.dot's smallest."""
PREFILL_TILE = 64
_TILE_BYTES = 16_384
"""Of keys, and of values, that a program holds at a time: with two stages it stays well inside a multiprocessor's shared memory."""
_SPLIT_TILES = 4
"""Key tiles that a split gets at least: fewer cost more in the second kernel than they gain."""


_WIDE_ROW = 4096
"""Elements of a row above which more warps normalise it."""
_GATE_BLOCK = 1024


@dataclass(slots=True, frozen=True)
class AttentionTiles:
    """Which query rows each program takes, and what they may see; int64 tensors on the device.

    `tables` [R, M]: block table per sequence. `lengths` [R]: tokens that a sequence's last query row sees, itself included.
    `starts` [R + 1]: where its query rows begin. `tile_rows`, `tile_begins` [P]: each tile's sequence and its first query row there.
    `tile`: query rows times grouped heads of a tile, a power of two. `splits`: programs that share a tile's keys.
    """

    tables: torch.Tensor
    lengths: torch.Tensor
    starts: torch.Tensor
    tile_rows: torch.Tensor
    tile_begins: torch.Tensor
    tile: int
    splits: int


def tile_for(groups: int, *, is_decode: bool) -> int:
    """Rows of a tile: a power of two that holds at least one token's grouped heads."""
    return max(DECODE_TILE if is_decode else PREFILL_TILE, triton.next_power_of_2(groups))


def store(keys: torch.Tensor, values: torch.Tensor, slots: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> None:
    """Write key and value [T, kv_heads, dim] to the cache [slots, kv_heads, dim] at `slots` [T] int64."""
    kv_heads, key_dim = keys.shape[1:]
    value_dim = values.shape[2]
    key, value = _unit_stride(key), _unit_stride(value)
    triton_kernels.store_tokens[(key.shape[0],)](
        keys,
        values,
        key,
        value,
        slots,
        key.stride(0),
        key.stride(1),
        value.stride(0),
        value.stride(1),
        KEY_DIM=key_dim,
        VALUE_DIM=value_dim,
        KEY_ROW=kv_heads * key_dim,
        VALUE_ROW=kv_heads * value_dim,
        KEY_BLOCK=triton.next_power_of_2(kv_heads * key_dim),
        VALUE_BLOCK=triton.next_power_of_2(kv_heads * value_dim),
    )


def rotate_and_store(
    keys: torch.Tensor,
    values: torch.Tensor,
    slots: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
) -> torch.Tensor:
    """`store` after rotating the keys; returns the rotated query [T, heads, dim].

    Query, key and value [T, heads, dim] have heads and dim side by side in memory. `cos`, `sin` [T, 1, dim], the sine negated in its first
    half. An even dim.
    """
    tokens, heads, dim = query.shape
    kv_heads, value_dim = values.shape[1:]
    query, key, value = (t if t.stride(1) == t.shape[2] and t.stride(2) == 1 else t.contiguous() for t in (query, key, value))
    rotated = torch.empty(tokens, heads, dim, dtype=query.dtype, device=query.device)
    triton_kernels.rotate_and_store[(tokens,)](
        rotated,
        keys,
        values,
        query,
        key,
        value,
        cos.contiguous(),
        sin.contiguous(),
        slots,
        query.stride(0),
        key.stride(0),
        value.stride(0),
        HEADS=heads,
        KV_HEADS=kv_heads,
        DIM=dim,
        VALUE_DIM=value_dim,
        BLOCK_H=triton.next_power_of_2(max(heads, kv_heads)),
        BLOCK_D=triton.next_power_of_2(dim),
        BLOCK_V=triton.next_power_of_2(value_dim),
    )
    return rotated


def normalise(hidden: torch.Tensor, weight: torch.Tensor, epsilon: float, *, more: torch.Tensor | None = None) -> torch.Tensor:
    """Root-mean-square normalisation over the last dimension; `more`, of the same shape, is first added to `hidden` in place."""
    size = hidden.shape[-1]
    if not hidden.is_contiguous():
        assert more is None  # noqa: S101 -- what is added to a copy would be lost
        hidden = hidden.contiguous()
    output = torch.empty_like(hidden)
    triton_kernels.normalise_rows[(hidden.numel() // size,)](
        output,
        hidden,
        hidden if more is None else more.contiguous(),
        weight,
        epsilon,
        SIZE=size,
        BLOCK=triton.next_power_of_2(size),
        ADD=more is not None,
        num_warps=8 if size > _WIDE_ROW else 4,
    )
    return output


def gate(values: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """silu(values) * up."""
    values, up = values.contiguous(), up.contiguous()
    output = torch.empty_like(values)
    count = values.numel()
    triton_kernels.gate_rows[(triton.cdiv(count, _GATE_BLOCK),)](output, values, up, count, BLOCK=_GATE_BLOCK)
    return output


def attend(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    tiles: AttentionTiles,
    *,
    block_size: int,
    scale: float,
    window: int = 0,
    softcap: float | None = None,
) -> torch.Tensor:
    """Causal attention of query [T, heads, dim] over the cache [slots, kv_heads, dim]; returns [T, heads, value_dim].

    `window`: tokens a row sees at most, itself included; 0 for all. `softcap` bounds the scores by tanh.
    """
    tokens, heads, key_dim = query.shape
    kv_heads, value_dim = keys.shape[1], values.shape[2]
    groups = heads // kv_heads
    query = _unit_stride(query)
    block_k, block_v = max(16, triton.next_power_of_2(key_dim)), max(16, triton.next_power_of_2(value_dim))
    output = torch.empty(tokens, heads, value_dim, dtype=query.dtype, device=query.device)
    splits = tiles.splits
    if splits > 1:
        partial = torch.empty(tokens, heads, splits, value_dim, dtype=torch.float32, device=query.device)
        peaks = torch.empty(2, tokens, heads, splits, dtype=torch.float32, device=query.device)
        sums, maxima = peaks[0], peaks[1]
    else:
        partial = sums = maxima = output
    row_bytes = max(block_k, block_v) * query.element_size()
    tile_n = max(16, min(64, _TILE_BYTES // row_bytes))
    triton_kernels.attend_tile[(tiles.tile_rows.shape[0], kv_heads, splits)](
        output,
        partial,
        maxima,
        sums,
        query,
        keys,
        values,
        tiles.tables,
        tiles.lengths,
        tiles.starts,
        tiles.tile_rows,
        tiles.tile_begins,
        scale,
        softcap or 0.0,
        query.stride(0),
        query.stride(1),
        tiles.tables.stride(0),
        HEADS=heads,
        KV_HEADS=kv_heads,
        GROUPS=groups,
        KEY_DIM=key_dim,
        VALUE_DIM=value_dim,
        BLOCK_K=block_k,
        BLOCK_V=block_v,
        TILE_M=tiles.tile,
        TILE_N=tile_n,
        BLOCK_SIZE=block_size,
        WINDOW=window,
        HAS_SOFTCAP=softcap is not None,
        SPLITS=splits,
        SPLIT_TILES=_SPLIT_TILES,
        num_warps=4,
        num_stages=2,
    )
    if splits > 1:
        triton_kernels.merge_splits[(tokens, heads)](
            output,
            partial,
            maxima,
            sums,
            HEADS=heads,
            VALUE_DIM=value_dim,
            BLOCK_V=block_v,
            SPLITS=splits,
            BLOCK_S=triton.next_power_of_2(splits),
        )
    return output


def _unit_stride(tensor: torch.Tensor) -> torch.Tensor:
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()
