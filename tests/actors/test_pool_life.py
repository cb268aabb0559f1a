"""A pool from its start to its end, and beside others."""

from __future__ import annotations

import asyncio

import pytest

from actors.control_plane import RayControlPlane, pool_access
from actors.groups import pool_groups
from actors.naming import named_actors
from actors.processes import is_gone
from raycore.config import Timeouts
from raycore.errors import PoolExistsError, PoolNotFoundError
from tests.actors.pools import PoolMaker, ask_controller, ask_engine

pytestmark = pytest.mark.ray


async def test_every_engine_holds_the_first_membership(pools: PoolMaker) -> None:
    access = await pools.open("life")
    membership = access.membership
    assert (membership.term, membership.epoch) == (1, 1)
    assert [member.engine.rank for member in membership.members] == [0, 1]
    for member in membership.members:
        assert await ask_engine("life", member, "membership") == membership
        assert await ask_engine("life", member, "ping") == member.pid


async def test_the_keys_reach_clients_but_no_text(pools: PoolMaker) -> None:
    access = await pools.open("keys")
    assert len(access.client_secret_key) == 40
    assert access.client_secret_key not in repr(access)
    assert (await ask_engine("keys", access.membership.members[0], "access")) == access


async def test_a_closed_pool_leaves_nothing_and_its_name_is_free(pools: PoolMaker) -> None:
    first = await pools.open("again")
    await pools.close()
    assert named_actors() == []
    assert pool_groups() == []
    assert all(is_gone(member.pid) for member in first.membership.members)
    second = await pools.open("again")
    assert second.membership.members[0].engine.incarnation != first.membership.members[0].engine.incarnation


async def test_a_taken_name_is_refused_and_the_pool_goes_on(pools: PoolMaker) -> None:
    access = await pools.open("taken")
    with pytest.raises(PoolExistsError, match="taken"):
        await pools.open("taken")
    assert await ask_controller("taken", "membership") == access.membership


async def test_two_pools_live_beside_each_other(pools: PoolMaker) -> None:
    await asyncio.gather(pools.open("left"), pools.open("right", data_parallel_size=1))
    left, right = await pool_access("left"), await pool_access("right")
    assert len(left.membership.members) == 2
    assert len(right.membership.members) == 1
    assert left.client_secret_key != right.client_secret_key


async def test_an_unknown_pool_is_an_error(cluster: str) -> None:
    del cluster
    with pytest.raises(PoolNotFoundError, match="nowhere"):
        await pool_access("nowhere")
    assert await RayControlPlane("nowhere", Timeouts()).refresh() is None


async def test_any_client_can_end_the_pool(pools: PoolMaker) -> None:
    await pools.open("ended")
    await RayControlPlane("ended", Timeouts()).shutdown_pool(drain_s=0)
    assert named_actors("ended") == []


async def test_status_names_members_processes_and_groups(pools: PoolMaker) -> None:
    access = await pools.open("status")
    status = await ask_controller("status", "status")
    assert [row["pid"] for row in status["members"]] == [member.pid for member in access.membership.members]
    assert {row["placement_group"] for row in status["members"]} == {row.group_id for row in pool_groups("status")}
    assert status["departed"] == []


async def test_engines_need_no_cpus(pools: PoolMaker) -> None:
    access = await pools.open("no-cpus", num_cpus_per_engine=0, data_parallel_size=1)
    assert len(access.membership.members) == 1


async def test_only_the_allowed_environment_reaches_engines(pools: PoolMaker, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAYCORE_TEST_GREETING", "hello")
    monkeypatch.setenv("UNRELATED_SECRET", "hidden")
    access = await pools.open("environment", engine="tests.actors.engines:tells_environment", data_parallel_size=1)
    assert access.membership.members[0].info.model == "hello/None"
