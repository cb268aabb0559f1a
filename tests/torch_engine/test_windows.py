"""The dense copy of decoding sequences: what attention reads from it is what the paged cache holds, whoever comes and goes."""

from __future__ import annotations

import math

import pytest
import torch

from raycore.engines.torch.kv_cache import KVCache, LayerShape
from raycore.engines.torch.scheduler import Chunk
from raycore.engines.torch.sequence import Sequence
from raycore.engines.torch.windows import DecodeWindow

BLOCK = 4
SHAPE = LayerShape(2, 3, 5, 4)


@pytest.fixture
def cache():
    torch.manual_seed(0)
    cache = KVCache({0: SHAPE, 1: SHAPE}, blocks=1025, block_size=BLOCK, dtype=torch.float32, device=torch.device("cpu"))
    for part in (cache.keys, cache.values):
        for tensor in part.values():
            tensor.normal_()
    return cache


def sequence(handle, length, first_block):
    return Sequence(handle, [0] * length, length, blocks=list(range(first_block, first_block + 16)))


def step(window, cache, sequences):
    """One decode step as the engine does it; checks every row against the cache, and gives what rows hold beyond their sequences."""
    decodes = [Chunk(s, len(s.tokens) - 1, 1) for s in sequences]
    arranged = window.arrange(decodes)
    assert arranged is not None
    order = list(range(len(decodes))) if arranged.order is None else arranged.order.tolist()
    key, value = torch.randn(len(decodes), 2, 3), torch.randn(len(decodes), 2, 5)
    slots = torch.tensor([s.blocks[c.start // BLOCK] * BLOCK + c.start % BLOCK for s, c in zip(sequences, decodes, strict=True)])
    beyond = []
    for layer in (0, 1):
        cache.write(layer, slots, key, value)
        keys, values = arranged.append(layer, key, value)
        mask = arranged.mask(0, 2, torch.float32)
        for row, decode in enumerate(order):
            length = decodes[decode].start + 1
            table = torch.tensor(sequences[decode].blocks[: -(-length // BLOCK)])[None]
            expected_keys, expected_values = cache.gather(layer, table)
            assert torch.equal(keys[row, :, :length], expected_keys[0, :, :length])
            assert torch.equal(values[row, :, :length], expected_values[0, :, :length])
            if mask is not None:
                assert mask[row, 0, 1].eq(0).tolist() == [i < length for i in range(keys.shape[2])]
            beyond.append(keys[row, :, length:])
    if arranged.places is not None:
        assert arranged.places[arranged.order].tolist() == list(range(len(decodes)))
    for s in sequences:
        s.tokens.append(0)
    return beyond


def test_rows_follow_sequences_that_come_go_and_grow(cache):
    window = DecodeWindow(cache)
    a, b, c, d, e = (sequence(i, length, 1 + 16 * i) for i, length in enumerate((5, 9, 1, 12, 30)))
    for batch in ([a, b, c], [a, b, c], [b, c, d], [e, b, c, d], [d, e], [d, e, a], [b, a, d, c, e], *[[e, d]] * 8):
        step(window, cache, batch)


def test_a_sequence_that_missed_a_step_is_filled_anew(cache):
    window = DecodeWindow(cache)
    a, b = sequence(0, 6, 1), sequence(1, 7, 17)
    step(window, cache, [a, b])
    a.tokens.append(0)
    step(window, cache, [a, b])


def test_new_blocks_are_another_row(cache):
    window = DecodeWindow(cache)
    a, b = sequence(0, 6, 1), sequence(1, 7, 17)
    step(window, cache, [a, b])
    a.blocks = list(range(33, 49))
    step(window, cache, [a, b])


def test_nothing_of_a_former_holder_is_left_behind(cache):
    window = DecodeWindow(cache)
    long, b, short = sequence(0, 40, 1), sequence(1, 7, 17), sequence(2, 3, 33)
    step(window, cache, [long, b])
    for part in (window._keys, window._values):
        for tensor in part.values():
            tensor[0] = math.nan
    assert all(torch.isfinite(tail).all() for tail in step(window, cache, [short, b]))


def test_too_large_a_copy_is_not_kept(cache):
    window = DecodeWindow(cache)
    step(window, cache, [sequence(0, 5, 1), sequence(1, 5, 17)])
    assert window.arrange([Chunk(sequence(i, 60, 1), 59, 1) for i in range(20)]) is None
    assert not window._keys
