"""The Triton kernels against attention written out in float64, on a GPU or under Triton's interpreter (TRITON_INTERPRET=1)."""

from __future__ import annotations

import importlib.util
import os

import pytest
import torch

HAS_TRITON = importlib.util.find_spec("triton") is not None
IS_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
pytestmark = pytest.mark.skipif(
    not HAS_TRITON or not (IS_INTERPRETED or torch.cuda.is_available()), reason="needs Triton and a GPU, or TRITON_INTERPRET=1"
)

BLOCK = 4
DEVICE = "cpu" if IS_INTERPRETED or not torch.cuda.is_available() else "cuda"
TOLERANCE = {torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 1e-2}
DTYPES = [torch.float32, torch.float16] if IS_INTERPRETED else list(TOLERANCE)


def expected(query, keys, values, tables, lengths, starts, *, scale, window, softcap):
    """Each row by itself, in float64."""
    tokens, heads, _ = query.shape
    groups = heads // keys.shape[1]
    out = torch.empty(tokens, heads, values.shape[2], dtype=torch.float64)
    for r, length in enumerate(lengths):
        count = starts[r + 1] - starts[r]
        slots = [tables[r][p // BLOCK] * BLOCK + p % BLOCK for p in range(length)]
        for i in range(count):
            position = length - count + i
            first = max(0, position - window + 1) if window else 0
            seen = slots[first : position + 1]
            for head in range(heads):
                q = query[starts[r] + i, head].double().cpu()
                scores = keys[seen, head // groups].double().cpu() @ q * scale
                scores = torch.tanh(scores / softcap) * softcap if softcap else scores
                out[starts[r] + i, head] = torch.softmax(scores, 0) @ values[seen, head // groups].double().cpu()
    return out


def case(dtype, *, heads=6, kv_heads=2, key_dim=24, value_dim=24, lengths, counts, splits, is_decode):
    from raycore.engines.torch.kernels import AttentionTiles, tile_for

    torch.manual_seed(0)
    width = max(-(-n // BLOCK) for n in lengths)
    tables = (torch.randperm(len(lengths) * width) + 1).view(len(lengths), width)
    slots = (len(lengths) * width + 1) * BLOCK
    keys = torch.randn(slots, kv_heads, key_dim).to(DEVICE, dtype)
    values = torch.randn(slots, kv_heads, value_dim).to(DEVICE, dtype)
    starts = [0]
    for count in counts:
        starts.append(starts[-1] + count)
    # rows of a wider tensor, as a product of several projections at once gives them
    query = torch.randn(starts[-1], heads + 2, key_dim).to(DEVICE, dtype)[:, :heads]
    tile = tile_for(heads // kv_heads, is_decode=is_decode)
    per_tile = tile // (heads // kv_heads)
    pairs = [(r, b) for r, count in enumerate(counts) for b in range(0, count, per_tile)]

    def tensor(numbers):
        return torch.tensor(numbers, dtype=torch.int64, device=DEVICE)

    tiles = AttentionTiles(
        tables.to(DEVICE), tensor(lengths), tensor(starts), tensor([r for r, _ in pairs]), tensor([b for _, b in pairs]), tile, splits
    )
    return query, keys, values, tiles, tables.tolist(), starts


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("lengths", "counts", "splits", "window", "softcap"),
    [
        ([1, 7, 70, 300], [1, 1, 1, 1], 1, 0, None),
        ([1, 7, 70, 700], [1, 1, 1, 1], 3, 0, None),
        ([5, 33, 90], [5, 1, 40], 1, 0, None),
        ([5, 33, 90], [5, 1, 40], 1, 9, 3.0),
        ([300, 33], [1, 1], 4, 20, None),
    ],
)
def test_attention_equals_the_rows_written_out(dtype, lengths, counts, splits, window, softcap):
    from raycore.engines.torch.kernels import attend

    query, keys, values, tiles, tables, starts = case(dtype, lengths=lengths, counts=counts, splits=splits, is_decode=max(counts) == 1)
    output = attend(query, keys, values, tiles, block_size=BLOCK, scale=0.2, window=window, softcap=softcap)
    wanted = expected(query, keys, values, tables, lengths, starts, scale=0.2, window=window, softcap=softcap)
    assert torch.linalg.norm(output.double().cpu() - wanted) < TOLERANCE[dtype] * torch.linalg.norm(wanted)


@pytest.mark.parametrize(("heads", "kv_heads", "key_dim", "value_dim"), [(9, 3, 64, 64), (4, 4, 8, 8), (32, 1, 16, 40)])
def test_head_counts_and_sizes_need_no_power_of_two(heads, kv_heads, key_dim, value_dim):
    from raycore.engines.torch.kernels import attend

    lengths, counts = [3, 50], [3, 1]
    query, keys, values, tiles, tables, starts = case(
        torch.float32,
        heads=heads,
        kv_heads=kv_heads,
        key_dim=key_dim,
        value_dim=value_dim,
        lengths=lengths,
        counts=counts,
        splits=1,
        is_decode=False,
    )
    output = attend(query, keys, values, tiles, block_size=BLOCK, scale=0.3)
    wanted = expected(query, keys, values, tables, lengths, starts, scale=0.3, window=0, softcap=None)
    assert torch.linalg.norm(output.double().cpu() - wanted) < TOLERANCE[torch.float32] * torch.linalg.norm(wanted)


def test_what_lies_beyond_a_sequence_is_not_read():
    from raycore.engines.torch.kernels import attend

    query, keys, values, tiles, tables, _ = case(torch.float32, lengths=[6, 9], counts=[1, 1], splits=2, is_decode=True)
    clean = attend(query, keys, values, tiles, block_size=BLOCK, scale=1.0)
    for r, length in enumerate((6, 9)):
        for place in range(length, len(tables[r]) * BLOCK):
            slot = tables[r][place // BLOCK] * BLOCK + place % BLOCK
            keys[slot] = values[slot] = float("nan")
    assert torch.equal(attend(query, keys, values, tiles, block_size=BLOCK, scale=1.0), clean)


def test_new_keys_and_values_go_to_their_slots():
    from raycore.engines.torch.kernels import store

    keys, values = torch.zeros(12, 3, 8, device=DEVICE), torch.zeros(12, 3, 5, device=DEVICE)
    key = torch.randn(3, 4, 8, device=DEVICE).transpose(0, 1)
    value = torch.randn(4, 6, 5, device=DEVICE)[:, 1:4]
    slots = torch.tensor([7, 0, 11, 3], device=DEVICE)
    store(keys, values, slots, key, value)
    assert torch.equal(keys[slots], key)
    assert torch.equal(values[slots], value)
    assert int((keys.abs().sum((1, 2)) > 0).sum()) == 4


def rotation(tokens, dim):
    angles = torch.randn(tokens, 1, dim // 2)
    cos, sin = torch.cat((angles.cos(), angles.cos()), -1), torch.cat((-angles.sin(), angles.sin()), -1)
    return cos.to(DEVICE), sin.to(DEVICE)


@pytest.mark.parametrize(("heads", "kv_heads", "dim"), [(9, 3, 64), (4, 4, 24)])
def test_rotation_and_store_are_one_kernel(heads, kv_heads, dim):
    from raycore.engines.torch.kernels import rotate_and_store

    tokens = 5
    keys, values = torch.zeros(8, kv_heads, dim, device=DEVICE), torch.zeros(8, kv_heads, dim, device=DEVICE)
    wide = torch.randn(tokens, heads + 2 * kv_heads, dim, device=DEVICE)
    query, key, value = wide.split((heads, kv_heads, kv_heads), 1)
    cos, sin = rotation(tokens, dim)
    slots = torch.tensor([6, 1, 0, 7, 3], device=DEVICE)
    rotated = rotate_and_store(keys, values, slots, query, key, value, cos, sin)
    torch.testing.assert_close(rotated, query * cos + query.roll(dim // 2, -1) * sin)
    torch.testing.assert_close(keys[slots], key * cos + key.roll(dim // 2, -1) * sin)
    assert torch.equal(values[slots], value)
    assert not keys[[2, 4, 5]].any()


@pytest.mark.parametrize("size", [64, 96, 5000])
def test_a_sum_is_normalised_and_kept(size):
    from raycore.engines.torch.kernels import normalise

    hidden, more, weight = torch.randn(3, size, device=DEVICE), torch.randn(3, size, device=DEVICE), torch.randn(size, device=DEVICE)
    total = hidden + more
    torch.testing.assert_close(normalise(total, weight, 1e-5), torch.rms_norm(total, (size,), weight, 1e-5))
    output = normalise(hidden, weight, 1e-5, more=more)
    torch.testing.assert_close(output, torch.rms_norm(total, (size,), weight, 1e-5))
    assert torch.equal(hidden, total)


def test_the_gate_is_silu_times_the_other():
    from raycore.engines.torch.kernels import gate

    values, up = torch.randn(3, 700, device=DEVICE) * 20, torch.randn(3, 700, device=DEVICE)
    torch.testing.assert_close(gate(values.clone(), up), torch.nn.functional.silu(values) * up)
