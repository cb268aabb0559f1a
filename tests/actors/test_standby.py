"""Standbys: scaling takes them, a dead rank is replaced by one, they are made again, and nothing of them is left."""

from __future__ import annotations

import asyncio
import os
import signal
from pathlib import Path

import pytest

from actors.groups import pool_groups
from actors.launch import connect
from actors.naming import Role, named_actors
from actors.pool_end import clean_up
from actors.processes import is_gone
from raycore.errors import ExpertsLostError
from raycore.sampling import SamplingParams
from tests.actors.mixture import START_S, Mixture
from tests.actors.pools import LIMIT_S, PoolMaker, eventually, warm
from tests.support.engine_process import expected
from tests.torch_engine.tiny import save_llama

pytestmark = pytest.mark.ray

SIX = SamplingParams(max_tokens=6)


async def counted(pool: str) -> tuple[int, int]:
    """Actors of engine cores, standbys among them, and placement groups."""
    names = [name for name in await asyncio.to_thread(named_actors, pool) if name.role in {Role.ENGINE, Role.STANDBY}]
    return len(names), len(await asyncio.to_thread(pool_groups, pool))


@pytest.mark.parametrize("lockstep", [False, True])
async def test_scaling_promotes_a_standby_and_a_dead_rank_is_replaced_by_one(pools: PoolMaker, lockstep: bool) -> None:
    pool = f"warm-{lockstep}".lower()
    options = {"base_s": 0.005, "vocab_size": 32_000, "lockstep": lockstep}
    await pools.open(pool, data_parallel_size=1, standby=1, engine_options=options)
    (standby,) = await warm(pool, 1)
    assert await counted(pool) == (2, 2)
    async with connect(pool) as client:
        report = await client.scale_elastic_ep(2)
        assert report.joined == (1,)
        assert client.membership.members[1].pid == standby["pid"]
        assert (await client.generate([5], SIX, data_parallel_rank=1).collect()).token_ids == expected([5], 6)

        (standby,) = await warm(pool, 1)
        assert await counted(pool) == (3, 3)
        streams = [client.generate([5, 6, n], SamplingParams(max_tokens=200)) for n in range(8)]
        firsts = await asyncio.gather(*(anext(stream) for stream in streams))
        os.kill(client.membership.members[1].pid, signal.SIGKILL)
        async with asyncio.timeout(LIMIT_S):
            rests = await asyncio.gather(*(stream.collect() for stream in streams))
        assert [a.token_ids + b.token_ids for a, b in zip(firsts, rests, strict=True)] == [expected([5, 6, n], 200) for n in range(8)]

        async def is_replaced() -> bool:
            return [member.pid for member in client.membership.members][1:] == [standby["pid"]]

        await eventually(is_replaced, "the standby has the dead rank")
        assert (await client.generate([5], SIX, data_parallel_rank=1).collect()).token_ids == expected([5], 6)
        (standby,) = await warm(pool, 1)

        os.kill(standby["pid"], signal.SIGKILL)

        async def is_another() -> bool:
            return (await warm(pool, 1))[0]["pid"] != standby["pid"]

        await eventually(is_another, "a standby that died is made again")
        assert await counted(pool) == (3, 3)
        assert (await client.scale_elastic_ep(1)).left == (1,)
        assert await counted(pool) == (2, 2)


async def test_a_pool_whose_only_rank_dies_is_served_by_its_standby_at_once(pools: PoolMaker) -> None:
    access = await pools.open("lonely", data_parallel_size=1, standby=1)
    await warm("lonely", 1)
    async with connect("lonely") as client:
        os.kill(access.membership.members[0].pid, signal.SIGKILL)

        async def serves() -> bool:
            return (await client.generate([5], SIX).collect()).token_ids == expected([5], 6)

        await eventually(serves, "the standby serves")
        assert client.ranks() == (0,)


async def test_cleanup_removes_standbys(pools: PoolMaker) -> None:
    await pools.open("swept", data_parallel_size=1, standby=1)
    await warm("swept", 1)
    report = await clean_up("swept", limit_s=LIMIT_S)
    assert sum("/standby/" in name for name in report.actors) == 1
    assert await counted("swept") == (0, 0)


async def test_a_standby_with_weights_serves_as_the_rank_that_it_becomes(pools: PoolMaker, tmp_path: Path) -> None:
    model = save_llama(tmp_path / "model")
    options = {"kv_tokens": 1024, "threads": 1}
    await pools.open("loaded", engine="torch", model=str(model), engine_options=options, data_parallel_size=1, standby=1, warm="weights")
    model.rename(tmp_path / "away")  # its weights come from the rank that serves, and what promotes it reads nothing
    await warm("loaded", 1)
    async with connect("loaded") as client:
        grown = await client.scale_elastic_ep(2)
        assert grown.weight_bytes > 0
        assert grown.weight_bytes_from_disk == 0
        greedy = SamplingParams(max_tokens=8, ignore_eos=True)
        first, second = [await client.generate([3, 4], greedy, data_parallel_rank=rank).collect() for rank in (0, 1)]
        assert first.token_ids == second.token_ids
        await client.call("save_sharded_state", rank=1, path=str(tmp_path / "saved-{rank}"))
        assert (tmp_path / "saved-1").is_dir()
        (tmp_path / "away").rename(model)


@pytest.mark.timeout(600)
async def test_standbys_with_weights_join_an_expert_parallel_pool_and_end_with_it(pools: PoolMaker, tmp_path: Path) -> None:
    mixture = Mixture(pools, tmp_path, "experts")
    await mixture.open(data_parallel_size=1, standby=1, warm="weights")
    async with connect("experts") as client:
        await mixture.check(client)
        (standby,) = await warm("experts", 1, START_S)
        os.kill(standby["pid"], signal.SIGKILL)

        async def is_another() -> bool:
            return (await warm("experts", 1, START_S))[0]["pid"] != standby["pid"]

        await eventually(is_another, "a standby that died is made again, of what the rank has", START_S)
        (standby,) = await warm("experts", 1, START_S)
        grown = await client.scale_elastic_ep(3)  # one more than there are standbys
        assert grown.joined == (1, 2)
        assert client.membership.members[1].pid == standby["pid"]
        assert grown.weight_bytes > 0
        assert grown.weight_bytes_from_disk == 0
        await mixture.check(client)

        (standby,) = await warm("experts", 1, START_S)
        await client.call_all("set_weight_version", version="v2")
        assert (await client.remove_ranks([0])).ranks == (1, 2)
        grown = await client.scale_elastic_ep(3)
        assert grown.joined == (0,)
        assert client.membership.members[0].pid == standby["pid"]
        assert grown.weight_bytes > 0
        assert grown.weight_bytes_from_disk == 0
        assert await client.call_all("get_weight_version") == {0: "v2", 1: "v2", 2: "v2"}
        await mixture.check(client)

        (standby,) = await warm("experts", 1, START_S)
        assert await counted("experts") == (4, 4)
        stream = client.generate(mixture.prompts[0], SamplingParams(max_tokens=200, ignore_eos=True), data_parallel_rank=0)
        await anext(stream)
        os.kill(client.membership.members[1].pid, signal.SIGKILL)
        with pytest.raises(ExpertsLostError, match="rank 1 is dead"):
            await stream.collect()
    await eventually(mixture.is_gone, "nothing of the pool is left, standbys neither")
    assert is_gone(standby["pid"])


@pytest.mark.timeout(600)
async def test_a_warm_process_joins_an_expert_parallel_pool_and_does_not_outlive_its_last_rank(pools: PoolMaker, tmp_path: Path) -> None:
    mixture = Mixture(pools, tmp_path, "processes")
    await mixture.open(data_parallel_size=2, standby=1)
    async with connect("processes") as client:
        (standby,) = await warm("processes", 1, START_S)
        grown = await client.scale_elastic_ep(3)
        assert client.membership.members[2].pid == standby["pid"]
        assert grown.weight_bytes > 0
        assert grown.weight_bytes_from_disk == 0
        await mixture.check(client)
        assert (await client.remove_ranks([0, 1])).ranks == (2,)
        await mixture.check(client)
        (standby,) = await warm("processes", 1, START_S)
        assert await counted("processes") == (2, 2)
        os.kill(client.membership.members[0].pid, signal.SIGKILL)
        await eventually(mixture.is_gone, "an only rank has all experts, and the pool ends with it, standbys too")
    assert is_gone(standby["pid"])
