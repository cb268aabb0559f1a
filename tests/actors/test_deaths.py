"""Processes that die or hang while the pool serves: engines, and the controller itself."""

from __future__ import annotations

import asyncio
import os
import signal

import pytest

from actors.control_plane import RayControlPlane, pool_access
from actors.groups import pool_groups
from actors.naming import Role, named_actors
from actors.processes import is_gone
from raycore.config import HealthConfig, Timeouts
from raycore.ids import EngineId
from raycore.membership import Member
from tests.actors.pools import PoolMaker, ask_controller, ask_engine, eventually, membership_when

pytestmark = pytest.mark.ray


async def test_a_killed_engine_leaves_the_membership_with_a_cause(pools: PoolMaker) -> None:
    victim, survivor = (await pools.open("killed")).membership.members
    os.kill(victim.pid, signal.SIGKILL)
    membership = await membership_when("killed", lambda m: m.epoch == 2)
    assert membership.members == (survivor,)
    assert [(d.engine, "died unexpectedly" in d.cause) for d in membership.departed] == [(victim.engine, True)]
    assert await ask_engine("killed", survivor, "membership") == membership
    await eventually(_groups_are("killed", 1), "the dead engine's placement group is removed")


async def test_a_stopped_engine_is_fenced_and_then_killed(pools: PoolMaker) -> None:
    victim, survivor = (await pools.open("stopped")).membership.members
    os.kill(victim.pid, signal.SIGSTOP)
    membership = await membership_when("stopped", lambda m: m.epoch == 2)
    assert membership.members == (survivor,)
    assert "hung: no beat" in membership.departed[0].cause
    await eventually(_is_gone(victim), "the stopped process is gone")
    await eventually(_groups_are("stopped", 1), "its placement group is removed")


async def test_a_pool_without_engines_stays_until_it_is_ended(pools: PoolMaker) -> None:
    access = await pools.open("emptied")
    for member in access.membership.members:
        os.kill(member.pid, signal.SIGKILL)
    membership = await membership_when("emptied", lambda m: not m.members)
    assert len(membership.departed) == 2
    assert (await ask_controller("emptied", "status"))["members"] == []


async def test_clients_learn_of_a_death_from_ray_itself(pools: PoolMaker) -> None:
    victim, survivor = (await pools.open("watched")).membership.members
    plane = RayControlPlane("watched", Timeouts())
    deaths: asyncio.Queue[tuple[EngineId, str]] = asyncio.Queue()
    plane.watch(victim.engine, lambda engine, cause: deaths.put_nowait((engine, cause)))
    plane.watch(survivor.engine, lambda engine, cause: deaths.put_nowait((engine, cause)))
    os.kill(victim.pid, signal.SIGKILL)
    engine, cause = await asyncio.wait_for(deaths.get(), 30)
    assert engine == victim.engine
    assert "died unexpectedly" in cause
    plane.forget(survivor.engine)
    os.kill(survivor.pid, signal.SIGKILL)
    await membership_when("watched", lambda m: not m.members)
    assert deaths.empty()
    await plane.close()


async def test_watching_an_engine_that_is_gone_already_tells_so(pools: PoolMaker) -> None:
    victim = (await pools.open("late")).membership.members[0]
    os.kill(victim.pid, signal.SIGKILL)
    await membership_when("late", lambda m: m.epoch == 2)
    plane = RayControlPlane("late", Timeouts())
    dead = asyncio.get_running_loop().create_future()
    plane.watch(victim.engine, lambda _, cause: dead.set_result(cause))
    assert await asyncio.wait_for(dead, 30)
    await plane.close()


async def test_a_report_about_an_engine_that_lives_changes_nothing(pools: PoolMaker) -> None:
    access = await pools.open("slandered")
    await RayControlPlane("slandered", Timeouts()).report_suspect(access.membership.members[0].engine, "no answer")
    assert await ask_controller("slandered", "membership") == access.membership


async def test_a_report_about_a_stopped_engine_is_checked_and_believed(pools: PoolMaker) -> None:
    health = HealthConfig(hang_after_s=3.0, first_beat_s=60.0)
    victim = (await pools.open("reported", health=health)).membership.members[0]
    os.kill(victim.pid, signal.SIGSTOP)
    await RayControlPlane("reported", Timeouts()).report_suspect(victim.engine, "no answer")
    membership = await membership_when("reported", lambda m: m.epoch == 2)
    assert not membership.has(victim.engine)


async def test_a_killed_controller_comes_back_in_a_higher_term_with_the_same_engines(pools: PoolMaker) -> None:
    access = await pools.open("headless")
    os.kill(await ask_controller("headless", "ping"), signal.SIGKILL)
    membership = await membership_when("headless", lambda m: m.term == 2)
    assert membership.members == access.membership.members
    for member in membership.members:
        assert await ask_engine("headless", member, "membership") == membership
    os.kill(membership.members[0].pid, signal.SIGKILL)
    after = await membership_when("headless", lambda m: len(m.members) == 1)
    assert after.supersedes(membership)
    await eventually(_groups_are("headless", 1), "the group of the engine that died later is removed")


async def test_engines_answer_for_a_controller_that_is_down(pools: PoolMaker) -> None:
    access = await pools.open("orphaned")
    controller = await ask_controller("orphaned", "ping")
    os.kill(controller, signal.SIGSTOP)
    found = await pool_access("orphaned")
    os.kill(controller, signal.SIGKILL)
    assert found == access


async def test_what_died_while_the_controller_was_down_is_noticed(pools: PoolMaker) -> None:
    victim, survivor = (await pools.open("both")).membership.members
    controller = await ask_controller("both", "ping")
    os.kill(controller, signal.SIGSTOP)
    os.kill(victim.pid, signal.SIGKILL)
    await eventually(_is_gone(victim), "the engine is gone")
    os.kill(controller, signal.SIGKILL)
    membership = await membership_when("both", lambda m: m.term == 2)
    assert membership.members == (survivor,)
    assert membership.departed[0].engine == victim.engine
    await eventually(_groups_are("both", 1), "the orphaned placement group is removed")


async def test_a_controller_that_dies_while_the_pool_starts_leaves_nothing(pools: PoolMaker) -> None:
    opening = asyncio.create_task(pools.open("unborn", engine="tests.actors.engines:never_ready"))

    async def is_loading() -> bool:
        return any(name.role is Role.ENGINE for name in await asyncio.to_thread(named_actors, "unborn"))

    await eventually(is_loading, "an engine is loading")
    os.kill(await ask_controller("unborn", "ping"), signal.SIGKILL)
    with pytest.raises(Exception, match="unborn"):
        await opening
    assert named_actors("unborn") == []
    assert pool_groups("unborn") == []


def _groups_are(pool: str, count: int):
    async def check() -> bool:
        return len(await asyncio.to_thread(pool_groups, pool)) == count

    return check


def _is_gone(member: Member):
    async def check() -> bool:
        return is_gone(member.pid)

    return check
