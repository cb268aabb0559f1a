"""What the kernels of `kernels.py` do on the device, in Triton's language; `kernels.py` says what the arguments mean."""

# Triton kernels have no annotations but constexpr, constants in capitals, and are one function each.
# ruff: noqa: ANN001, ANN201, D103, N803, PLR0915
# pyright: basic

from __future__ import annotations

import triton  # pyright: ignore[reportMissingImports]
import triton.language as tl  # pyright: ignore[reportMissingImports]


@triton.jit
def store_tokens(
    keys,
    values,
    key,
    value,
    slots,
    key_token,
    key_head,
    value_token,
    value_head,
    KEY_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    KEY_ROW: tl.constexpr,
    VALUE_ROW: tl.constexpr,
    KEY_BLOCK: tl.constexpr,
    VALUE_BLOCK: tl.constexpr,
):
    token = tl.program_id(0)
    slot = tl.load(slots + token).to(tl.int64)
    i = tl.arange(0, KEY_BLOCK)
    row = tl.load(key + token * key_token + (i // KEY_DIM) * key_head + i % KEY_DIM, mask=i < KEY_ROW)
    tl.store(keys + slot * KEY_ROW + i, row, mask=i < KEY_ROW)
    j = tl.arange(0, VALUE_BLOCK)
    row = tl.load(value + token * value_token + (j // VALUE_DIM) * value_head + j % VALUE_DIM, mask=j < VALUE_ROW)
    tl.store(values + slot * VALUE_ROW + j, row, mask=j < VALUE_ROW)


@triton.jit
def rotate_and_store(
    rotated,
    keys,
    values,
    query,
    key,
    value,
    cos,
    sin,
    slots,
    query_token,
    key_token,
    value_token,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    token = tl.program_id(0).to(tl.int64)
    slot = tl.load(slots + token).to(tl.int64)
    h = tl.arange(0, BLOCK_H)[:, None]
    d = tl.arange(0, BLOCK_D)[None, :]
    other = (d + DIM // 2) % DIM
    c = tl.load(cos + token * DIM + d, mask=d < DIM, other=0.0).to(tl.float32)
    s = tl.load(sin + token * DIM + d, mask=d < DIM, other=0.0).to(tl.float32)
    is_query = (h < HEADS) & (d < DIM)
    here = tl.load(query + token * query_token + h * DIM + d, mask=is_query, other=0.0).to(tl.float32)
    there = tl.load(query + token * query_token + h * DIM + other, mask=is_query, other=0.0).to(tl.float32)
    tl.store(rotated + (token * HEADS + h) * DIM + d, (here * c + there * s).to(rotated.dtype.element_ty), mask=is_query)
    is_key = (h < KV_HEADS) & (d < DIM)
    here = tl.load(key + token * key_token + h * DIM + d, mask=is_key, other=0.0).to(tl.float32)
    there = tl.load(key + token * key_token + h * DIM + other, mask=is_key, other=0.0).to(tl.float32)
    tl.store(keys + (slot * KV_HEADS + h) * DIM + d, (here * c + there * s).to(keys.dtype.element_ty), mask=is_key)
    e = tl.arange(0, BLOCK_V)[None, :]
    is_value = (h < KV_HEADS) & (e < VALUE_DIM)
    row = tl.load(value + token * value_token + h * VALUE_DIM + e, mask=is_value)
    tl.store(values + (slot * KV_HEADS + h) * VALUE_DIM + e, row, mask=is_value)


@triton.jit
def normalise_rows(output, hidden, more, weight, epsilon, SIZE: tl.constexpr, BLOCK: tl.constexpr, ADD: tl.constexpr):
    row = tl.program_id(0).to(tl.int64) * SIZE
    i = tl.arange(0, BLOCK)
    x = tl.load(hidden + row + i, mask=i < SIZE, other=0.0)
    if ADD:
        x = x + tl.load(more + row + i, mask=i < SIZE, other=0.0)
        tl.store(hidden + row + i, x, mask=i < SIZE)
    x = x.to(tl.float32)
    scale = 1.0 / tl.sqrt(tl.sum(x * x, 0) / SIZE + epsilon)
    w = tl.load(weight + i, mask=i < SIZE, other=0.0).to(tl.float32)
    tl.store(output + row + i, (x * scale * w).to(output.dtype.element_ty), mask=i < SIZE)


@triton.jit
def gate_rows(output, gate, up, count, BLOCK: tl.constexpr):
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    g = tl.load(gate + i, mask=i < count, other=0.0).to(tl.float32)
    u = tl.load(up + i, mask=i < count, other=0.0).to(tl.float32)
    tl.store(output + i, (g / (1.0 + tl.exp(-g)) * u).to(output.dtype.element_ty), mask=i < count)


@triton.jit
def attend_tile(
    output,
    partial,
    maxima,
    sums,
    query,
    keys,
    values,
    tables,
    lengths,
    starts,
    tile_rows,
    tile_begins,
    scale,
    softcap,
    query_token,
    query_head,
    table_row,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    GROUPS: tl.constexpr,
    KEY_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_V: tl.constexpr,
    TILE_M: tl.constexpr,
    TILE_N: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    WINDOW: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    SPLITS: tl.constexpr,
    SPLIT_TILES: tl.constexpr,
):
    tile = tl.program_id(0)
    kv_head = tl.program_id(1)
    split = tl.program_id(2)
    sequence = tl.load(tile_rows + tile)
    begin = tl.load(tile_begins + tile).to(tl.int32)
    length = tl.load(lengths + sequence).to(tl.int32)
    first_row = tl.load(starts + sequence).to(tl.int32)
    count = tl.load(starts + sequence + 1).to(tl.int32) - first_row

    m = tl.arange(0, TILE_M)
    per_tile: tl.constexpr = TILE_M // GROUPS
    token = begin + m // GROUPS
    head = kv_head * GROUPS + m % GROUPS
    is_row = (token < count) & (m < per_tile * GROUPS)
    position = length - count + token
    row = (first_row + token).to(tl.int64)

    d = tl.arange(0, BLOCK_K)
    e = tl.arange(0, BLOCK_V)
    q = tl.load(
        query + row[:, None] * query_token + head[:, None] * query_head + d[None, :],
        mask=is_row[:, None] & (d[None, :] < KEY_DIM),
        other=0.0,
    )
    end = length - count + tl.minimum(begin + per_tile, count)
    low = 0
    if WINDOW > 0:
        low = tl.maximum(length - count + begin - WINDOW + 1, 0) // TILE_N
    high = tl.cdiv(end, TILE_N)
    if SPLITS > 1:
        share = tl.maximum(tl.cdiv(high - low, SPLITS), SPLIT_TILES)
        low = low + split * share
        high = tl.minimum(low + share, high)

    peak = tl.full([TILE_M], float("-inf"), dtype=tl.float32)
    total = tl.zeros([TILE_M], dtype=tl.float32)
    acc = tl.zeros([TILE_M, BLOCK_V], dtype=tl.float32)
    for n in range(low, high):
        place = n * TILE_N + tl.arange(0, TILE_N)
        is_key = place < end
        block = tl.load(tables + sequence * table_row + place // BLOCK_SIZE, mask=is_key, other=0)
        slot = block.to(tl.int64) * BLOCK_SIZE + place % BLOCK_SIZE
        k = tl.load(
            keys + slot[None, :] * (KV_HEADS * KEY_DIM) + kv_head * KEY_DIM + d[:, None],
            mask=is_key[None, :] & (d[:, None] < KEY_DIM),
            other=0.0,
        )
        scores = tl.dot(q, k, input_precision="ieee") * scale
        if HAS_SOFTCAP:
            bounded = scores / softcap
            # tanh by exponentials of a number that is never positive, so that none overflows
            small = tl.exp(-2.0 * tl.abs(bounded))
            scores = tl.where(bounded < 0, -1.0, 1.0) * (1.0 - small) / (1.0 + small) * softcap
        visible = (place[None, :] <= position[:, None]) & is_key[None, :]
        if WINDOW > 0:
            visible = visible & (place[None, :] > position[:, None] - WINDOW)
        scores = tl.where(visible, scores, float("-inf"))
        new_peak = tl.maximum(peak, tl.max(scores, 1))
        base = tl.where(new_peak == float("-inf"), 0.0, new_peak)
        weights = tl.exp(scores - base[:, None])
        shrink = tl.exp(peak - base)
        total = total * shrink + tl.sum(weights, 1)
        v = tl.load(
            values + slot[:, None] * (KV_HEADS * VALUE_DIM) + kv_head * VALUE_DIM + e[None, :],
            mask=is_key[:, None] & (e[None, :] < VALUE_DIM),
            other=0.0,
        )
        acc = acc * shrink[:, None] + tl.dot(weights.to(v.dtype), v, input_precision="ieee")
        peak = new_peak

    where = row * HEADS + head
    is_value = is_row[:, None] & (e[None, :] < VALUE_DIM)
    if SPLITS == 1:
        divisor = tl.where(total == 0.0, 1.0, total)  # rows of the tile that are no token saw nothing
        tl.store(output + where[:, None] * VALUE_DIM + e[None, :], (acc / divisor[:, None]).to(output.dtype.element_ty), mask=is_value)
    else:
        where = where * SPLITS + split
        tl.store(partial + where[:, None] * VALUE_DIM + e[None, :], acc, mask=is_value)
        tl.store(maxima + where, peak, mask=is_row)
        tl.store(sums + where, total, mask=is_row)


@triton.jit
def merge_splits(
    output,
    partial,
    maxima,
    sums,
    HEADS: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    BLOCK_V: tl.constexpr,
    SPLITS: tl.constexpr,
    BLOCK_S: tl.constexpr,
):
    where = (tl.program_id(0) * HEADS + tl.program_id(1)).to(tl.int64)
    s = tl.arange(0, BLOCK_S)
    e = tl.arange(0, BLOCK_V)
    peak = tl.load(maxima + where * SPLITS + s, mask=s < SPLITS, other=float("-inf"))
    weight = tl.exp(peak - tl.max(peak, 0))
    total = tl.sum(tl.load(sums + where * SPLITS + s, mask=s < SPLITS, other=0.0) * weight, 0)
    parts = tl.load(
        partial + (where * SPLITS + s[:, None]) * VALUE_DIM + e[None, :],
        mask=(s[:, None] < SPLITS) & (e[None, :] < VALUE_DIM),
        other=0.0,
    )
    merged = tl.sum(parts * weight[:, None], 0) / total
    tl.store(output + where * VALUE_DIM + e, merged.to(output.dtype.element_ty), mask=e < VALUE_DIM)
