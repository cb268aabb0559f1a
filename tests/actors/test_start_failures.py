"""Pools that cannot start: a clear error in time, and nothing left (the `cluster` fixture looks)."""

from __future__ import annotations

import asyncio

import pytest

from actors.driver import PoolDriver
from actors.groups import pool_groups
from actors.launch import connect
from actors.naming import Role, named_actors
from raycore.config import Timeouts, parse_config
from raycore.errors import CapacityError, ConfigurationError, EngineStartError
from tests.actors.pools import QUICK, PoolMaker, eventually

pytestmark = pytest.mark.ray


@pytest.mark.parametrize("size", [0, -1])
def test_a_pool_has_at_least_one_engine(size: int) -> None:
    with pytest.raises(ConfigurationError, match="data_parallel_size"):
        parse_config({"engine": "echo", "data_parallel_size": size})


async def test_more_than_the_cluster_holds_is_refused_by_what_is_missing(pools: PoolMaker) -> None:
    with pytest.raises(CapacityError, match=r"9 ranks of CPU 1 each .* do not fit this cluster, even if it were idle(.|\n)*short of CPU"):
        await pools.open("big", data_parallel_size=9)


async def test_gpus_count_where_the_device_is_cuda(pools: PoolMaker) -> None:
    with pytest.raises(CapacityError, match=r"short of GPU \(CPU 8 free of 8; GPU 8 free of 8\)"):
        await pools.open("gpus", data_parallel_size=9, device="cuda", num_cpus_per_engine=0.1)


async def test_labels_that_match_nobody_are_named(pools: PoolMaker) -> None:
    with pytest.raises(CapacityError, match=r"accelerator=unset \(wanted warp\)"):
        await pools.open("labels", label_selector={"accelerator": "warp"})


async def test_a_busy_cluster_is_waited_for_until_the_limit(pools: PoolMaker) -> None:
    await pools.open("holder", num_cpus_per_engine=3.5)
    with pytest.raises(CapacityError, match="other work holds the resources"):
        await pools.open("late", timeouts=Timeouts(capacity_s=0.5))


async def test_nodes_that_do_not_come_are_waited_for_until_the_limit_and_nothing_is_left(pools: PoolMaker) -> None:
    waits = Timeouts(new_nodes_s=0.5)
    missing = r"no node came within 0.5 s: 1 rank of CPU 3.5 each (.|\n)*room for 0 now, 2 when idle, short of CPU"
    await pools.open("grown", num_cpus_per_engine=3.5, timeouts=waits)
    async with connect("grown") as client:
        with pytest.raises(CapacityError, match=missing):
            await client.scale_elastic_ep(3)
        assert client.ranks() == (0, 1)
    assert len(pool_groups("grown")) == 2
    with pytest.raises(CapacityError, match=f"rank 0: {missing}"):
        await pools.open("late", num_cpus_per_engine=3.5, data_parallel_size=1, timeouts=waits)
    assert pool_groups("late") == []


async def test_resources_that_become_free_in_time_are_used(pools: PoolMaker) -> None:
    holder = PoolDriver(parse_config({**QUICK, "pool": "holder", "num_cpus_per_engine": 3.5}))
    await holder.open()
    waiting = asyncio.create_task(pools.open("late"))
    await eventually(_has_actor("late"), "the second controller is up")
    await holder.close()
    assert len((await waiting).membership.members) == 2


async def test_a_failing_engine_is_named_with_its_cause(pools: PoolMaker) -> None:
    with pytest.raises(EngineStartError, match=r"rank 1 could not start: .*RuntimeError: no weights here") as caught:
        await pools.open("broken", engine_options={"per_rank": {"1": {"fail_start": "no weights here"}}})
    assert caught.value.rank == 1


async def test_a_failure_does_not_wait_for_ranks_that_load_for_ever(pools: PoolMaker) -> None:
    with pytest.raises(EngineStartError, match="rank 1"):
        await pools.open("mixed", engine="tests.actors.engines:fails_on_rank_1_only", engine_options={"per_rank": {"1": {"fail": True}}})


async def test_wrong_engine_options_are_a_wrong_configuration(pools: PoolMaker) -> None:
    with pytest.raises(ConfigurationError, match="rank 0"):
        await pools.open("options", engine_options={"no_such_option": 1}, data_parallel_size=1)


async def test_an_engine_that_dies_while_loading_is_named(pools: PoolMaker) -> None:
    with pytest.raises(EngineStartError, match=r"rank 0 could not start: its process died unexpectedly"):
        await pools.open("dying", engine="tests.actors.engines:dies_while_loading", data_parallel_size=1)


async def test_loading_has_a_limit(pools: PoolMaker) -> None:
    with pytest.raises(EngineStartError, match=r"rank 0 could not start: .*longer than 1 s"):
        await pools.open("slow", engine="tests.actors.engines:never_ready", data_parallel_size=1, timeouts=Timeouts(engine_start_s=1.0))


async def test_a_cancelled_start_leaves_nothing(pools: PoolMaker) -> None:
    opening = asyncio.create_task(pools.open("cancelled", engine="tests.actors.engines:never_ready"))
    await eventually(_has_actor("cancelled", Role.ENGINE), "an engine is loading")
    opening.cancel()
    with pytest.raises(asyncio.CancelledError):
        await opening
    assert named_actors("cancelled") == []


def _has_actor(pool: str, role: Role = Role.CONTROLLER):
    async def check() -> bool:
        return any(name.role is role for name in await asyncio.to_thread(named_actors, pool))

    return check
