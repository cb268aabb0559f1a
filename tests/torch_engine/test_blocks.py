"""The block pool, and the cache tensors that it hands out."""

from __future__ import annotations

import torch

from raycore.engines.torch.blocks import BlockPool, chain_digest
from raycore.engines.torch.kv_cache import KVCache, LayerShape


def test_blocks_are_handed_out_once_and_all_or_nothing():
    pool = BlockPool(3)
    first = pool.allocate(2)
    assert first is not None
    assert pool.allocate(2) is None
    assert pool.available == 1
    pool.check_invariants([first])
    pool.release(first)
    pool.check_invariants()


def test_a_shared_block_is_free_when_its_last_holder_lets_go():
    pool = BlockPool(2)
    (block,) = pool.allocate(1) or []
    pool.publish(block, b"x")
    pool.share(pool.find([b"x"]))
    pool.release([block])
    assert pool.is_held(block)
    pool.release([block])
    assert not pool.is_held(block)
    assert pool.find([b"x"]) == [block]
    pool.check_invariants()


def test_the_least_recently_used_prefix_gives_way_first_and_its_tail_before_its_head():
    pool = BlockPool(4)
    for names in ((b"a", b"b"), (b"c", b"d")):
        blocks = pool.allocate(2) or []
        for block, name in zip(blocks, names, strict=True):
            pool.publish(block, name)
        pool.release(blocks)
    pool.allocate(1)
    assert (len(pool.find([b"a", b"b"])), len(pool.find([b"c", b"d"]))) == (1, 2)
    pool.allocate(1)
    assert (len(pool.find([b"a"])), len(pool.find([b"c", b"d"]))) == (0, 2)


def test_reset_forgets_names_and_keeps_holders():
    pool = BlockPool(3)
    held = pool.allocate(1) or []
    free = pool.allocate(1) or []
    pool.publish(held[0], b"a")
    pool.publish(free[0], b"b")
    pool.release(free)
    pool.reset()
    assert pool.find([b"a"]) == pool.find([b"b"]) == []
    pool.check_invariants([held])


def test_a_digest_names_its_whole_prefix():
    assert chain_digest(chain_digest(b"", [1, 2]), [3, 4]) != chain_digest(chain_digest(b"", [9, 2]), [3, 4])


def test_gather_returns_tokens_in_the_order_of_the_table():
    cache = KVCache({0: LayerShape(2, 3, 5, 4)}, blocks=4, block_size=2, dtype=torch.float32, device=torch.device("cpu"))
    key, value = torch.randn(3, 2, 3), torch.randn(3, 2, 5)
    cache.write(0, torch.tensor([6, 7, 2]), key, value)
    got_key, got_value = cache.gather(0, torch.tensor([[3, 1]]))
    assert torch.equal(got_key[0, :, :3].transpose(0, 1), key)
    assert torch.equal(got_value[0, :, :3].transpose(0, 1), value)
    cache.clear([3])
    assert not cache.gather(0, torch.tensor([[3]]))[0].any()
