"""Pools in lockstep: waves over Ray pools, and the deaths of the coordinator, the controller and a rank."""

from __future__ import annotations

import asyncio
import os
import random
import signal
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest

from actors.control_plane import RayControlPlane, find_actor
from actors.naming import Role, coordinator_name, named_actors
from actors.processes import is_gone
from actors.remote import remote_call
from raycore.client.client import EngineCoreClient
from raycore.client.control import PoolAccess
from raycore.client.links import SocketLinks
from raycore.client.snapshots import SnapshotWatch
from raycore.config import HealthConfig, Limits, Timeouts
from raycore.errors import ConfigurationError
from raycore.sampling import SamplingParams
from raycore.tokenizer import ByteTokenizer
from tests.actors.pools import LIMIT_S, PoolMaker, ask_controller, eventually, membership_when
from tests.support.engine_process import expected

pytestmark = [pytest.mark.ray, pytest.mark.timeout(240)]

FEW = SamplingParams(max_tokens=5)
LOCKSTEP: dict[str, Any] = {
    "data_parallel_size": 3,
    "engine_options": {"lockstep": True},
    "num_cpus_per_engine": 0.5,
    "health": HealthConfig(hang_after_s=4.0, first_beat_s=20.0),
}


async def ask_coordinator(pool: str, method: str) -> Any:
    actor = await find_actor(coordinator_name(pool))
    return await remote_call(getattr(actor, method).remote(), limit_s=LIMIT_S, what=method)


@asynccontextmanager
async def client_of(pool: str, access: PoolAccess) -> AsyncIterator[EngineCoreClient]:
    control = RayControlPlane(pool, access.timeouts)
    async with EngineCoreClient(access, control, SocketLinks(access, Limits()), tokenizer=ByteTokenizer()) as client:
        yield client
        client.check_invariants()


async def stats(client: EngineCoreClient) -> list[tuple[int, int]]:
    """Steps and dummy steps of each rank."""
    found = await client.call_all("collective_rpc", method="stats")
    return [(found[rank]["steps"], found[rank]["idle_steps"]) for rank in sorted(found)]


async def rests(client: EngineCoreClient) -> bool:
    return not any((await client.call_all("dp_engines_running")).values())


async def test_one_request_makes_all_ranks_step_and_all_rest_after(pools: PoolMaker) -> None:
    access = await pools.open("waves", **LOCKSTEP)
    async with client_of("waves", access) as client:
        output = await client.generate([1, 2], FEW, data_parallel_rank=1).collect()
        assert output.token_ids == expected([1, 2], 5)
        await eventually(lambda: rests(client), "all ranks rest")
        assert await stats(client) == [(0, 5), (5, 0), (0, 5)]
        snapshot = await eventually(lambda: _snapshot_when("waves", lambda s: len(s.loads) == 3 and s.wave), "the coordinator knows")
        assert (snapshot.wave, snapshot.is_running) == (1, False)


async def _snapshot_when(pool: str, condition: Any) -> Any:
    snapshot = await ask_coordinator(pool, "snapshot")
    return snapshot if condition(snapshot) else None


async def test_requests_that_meet_the_ends_of_waves_are_never_stranded(pools: PoolMaker) -> None:
    access = await pools.open("hammered", **LOCKSTEP)
    rng = random.Random(7)
    async with client_of("hammered", access) as client:
        end_s, done = time.monotonic() + 8.0, 0
        while time.monotonic() < end_s:
            count = rng.randrange(1, 4)
            async with asyncio.timeout(LIMIT_S):
                streams = [
                    client.generate([5], SamplingParams(max_tokens=rng.randrange(1, 3)), data_parallel_rank=rng.randrange(3))
                    for _ in range(count)
                ]
                await asyncio.gather(*(stream.collect() for stream in streams))
            done += count
            await asyncio.sleep(rng.choice((0, 0, 0.002, 0.01)))
        assert done > 10
        await eventually(lambda: rests(client), "all ranks rest")


async def test_a_pause_parks_all_ranks_and_a_resume_wakes_them(pools: PoolMaker) -> None:
    options = {"lockstep": True, "base_s": 0.002}
    access = await pools.open("parked", **{**LOCKSTEP, "engine_options": options})
    async with client_of("parked", access) as client:
        stream = asyncio.ensure_future(client.generate([1, 2, 3], SamplingParams(max_tokens=100)).collect())
        await eventually(lambda: _not(rests(client)), "the wave runs")
        await client.operations.pause_scheduler(mode="keep")
        assert await rests(client)
        before = await stats(client)
        held = asyncio.ensure_future(client.generate([4], FEW, data_parallel_rank=2).collect())
        await asyncio.sleep(0.5)
        assert await stats(client) == before
        await client.operations.resume_scheduler()
        assert (await held).token_ids == expected([4], 5)
        assert (await stream).token_ids == expected([1, 2, 3], 100)


async def _not(answer: Any) -> bool:
    return not await answer


async def test_the_coordinator_is_killed_mid_traffic_and_comes_back_and_no_request_notices(pools: PoolMaker) -> None:
    access = await pools.open("coordless", **LOCKSTEP)
    async with client_of("coordless", access) as client:
        first = await eventually(lambda: ask_coordinator("coordless", "ping"), "there is a coordinator")
        end_s, killed, done = time.monotonic() + 6.0, False, 0
        while time.monotonic() < end_s or not killed:
            async with asyncio.timeout(LIMIT_S):
                output = await client.generate([6, 7], FEW, data_parallel_rank=done % 3).collect()
            assert output.token_ids == expected([6, 7], 5)
            done += 1
            if not killed and done == 5:
                os.kill(first, signal.SIGKILL)
                killed = True
        second = await eventually(lambda: ask_coordinator("coordless", "ping"), "the coordinator is back")
        assert second != first
        await eventually(lambda: _snapshot_when("coordless", lambda s: len(s.loads) == 3), "it hears all ranks again")
        assert (await ask_coordinator("coordless", "membership")).members == access.membership.members


async def test_with_coordinator_and_controller_dead_a_request_wakes_an_idle_pool(pools: PoolMaker) -> None:
    """Both are stopped first, so that Ray does not restart them before the request has come through."""
    access = await pools.open("headless-waves", **LOCKSTEP)
    async with client_of("headless-waves", access) as client:
        await client.generate([1], FEW).collect()
        await eventually(lambda: rests(client), "all ranks rest")
        coordinator = await eventually(lambda: ask_coordinator("headless-waves", "ping"), "there is a coordinator")
        controller = await ask_controller("headless-waves", "ping")
        for pid in (coordinator, controller):
            os.kill(pid, signal.SIGSTOP)
        before = await stats(client)
        async with asyncio.timeout(LIMIT_S):
            output = await client.generate([8, 9], FEW, data_parallel_rank=2).collect()
        assert output.token_ids == expected([8, 9], 5)
        await eventually(lambda: rests(client), "all ranks rest")
        after = await stats(client)
        assert [sum(now) - sum(then) for now, then in zip(after, before, strict=True)] == [5, 5, 5]
        for pid in (coordinator, controller):
            os.kill(pid, signal.SIGKILL)
        async with asyncio.timeout(LIMIT_S):
            assert (await client.generate([3], FEW, data_parallel_rank=0).collect()).token_ids == expected([3], 5)
        membership = await membership_when("headless-waves", lambda m: m.term == 2)
        assert membership.group == access.membership.group, "the members stayed, so their group stays"


async def test_a_killed_rank_leaves_the_others_their_requests_and_a_new_group(pools: PoolMaker) -> None:
    options = {"lockstep": True, "base_s": 0.002}
    access = await pools.open("bereft", **{**LOCKSTEP, "engine_options": options})
    async with client_of("bereft", access) as client:
        streams = [
            asyncio.ensure_future(client.generate([rank, 9], SamplingParams(max_tokens=400), data_parallel_rank=rank).collect())
            for rank in (0, 1)
        ]
        await eventually(lambda: _not(rests(client)), "the wave runs")
        os.kill(access.membership.members[2].pid, signal.SIGKILL)
        assert [output.token_ids for output in await asyncio.gather(*streams)] == [expected([rank, 9], 400) for rank in (0, 1)]
        membership = await membership_when("bereft", lambda m: len(m.members) == 2 and m.group is not None)
        assert membership.group is not None
        assert membership.group.stamp.epoch == membership.epoch


async def test_a_group_that_broke_without_a_death_is_replaced(pools: PoolMaker) -> None:
    timeouts = Timeouts(collective_s=1.5)
    health = HealthConfig(hang_after_s=60.0, first_beat_s=60.0)
    access = await pools.open("mended", **{**LOCKSTEP, "timeouts": timeouts, "health": health})
    async with client_of("mended", access) as client:
        frozen = access.membership.members[1].pid
        os.kill(frozen, signal.SIGSTOP)
        stream = asyncio.ensure_future(client.generate([1, 2], FEW, data_parallel_rank=0).collect())
        await membership_when("mended", lambda m: m.epoch > access.membership.epoch)
        os.kill(frozen, signal.SIGCONT)
        async with asyncio.timeout(LIMIT_S * 2):
            assert (await stream).token_ids == expected([1, 2], 5)


async def test_ranks_whose_engines_differ_in_lockstep_do_not_start(pools: PoolMaker) -> None:
    options = {"lockstep": True, "per_rank": {"1": {"lockstep": False}}}
    with pytest.raises(ConfigurationError, match="sync_interval"):
        await pools.open("mixed", **{**LOCKSTEP, "engine_options": options})


async def test_a_pool_of_one_rank_in_lockstep_steps_alone_and_has_no_coordinator(pools: PoolMaker) -> None:
    access = await pools.open("single", **{**LOCKSTEP, "data_parallel_size": 1})
    async with client_of("single", access) as client:
        assert (await client.generate([1, 2], FEW).collect()).token_ids == expected([1, 2], 5)
        await eventually(lambda: rests(client), "it rests")
    assert not [name for name in named_actors("single") if name.role is Role.COORDINATOR]


async def test_a_dense_pool_has_a_coordinator_that_ends_with_it(pools: PoolMaker) -> None:
    await pools.open("dense")
    snapshot = await eventually(lambda: _snapshot_when("dense", lambda s: len(s.loads) == 2), "it hears both ranks")
    assert not snapshot.is_running
    pid = await ask_coordinator("dense", "ping")
    await pools.close()
    assert is_gone(pid)


async def test_a_subscriber_hears_the_coordinator_and_its_successor(pools: PoolMaker) -> None:
    access = await pools.open("heard")
    control, links = RayControlPlane("heard", access.timeouts), SocketLinks(access, Limits())
    heard: list[Any] = []
    watch = asyncio.ensure_future(SnapshotWatch(control.coordinator, links.snapshots, heard.append).run())
    try:
        await eventually(lambda: _is_full(heard), "snapshots of both ranks come")
        os.kill(await ask_coordinator("heard", "ping"), signal.SIGKILL)
        heard.clear()
        last = await eventually(lambda: _is_full(heard), "they come again")
        assert [load.engine for load in last.loads] == [member.engine for member in access.membership.members]
    finally:
        watch.cancel()
        await asyncio.gather(watch, return_exceptions=True)
        await links.close()
        await control.close()


async def _is_full(heard: list[Any]) -> Any:
    return heard[-1] if heard and len(heard[-1].loads) == 2 else None


async def test_a_pool_in_lockstep_grows_and_shrinks_with_a_group_for_each_epoch(pools: PoolMaker) -> None:
    access = await pools.open("grows", **{**LOCKSTEP, "data_parallel_size": 2})
    async with client_of("grows", access) as client:
        for size in (3, 2):
            stream = asyncio.ensure_future(client.generate([1, 2], SamplingParams(max_tokens=100), data_parallel_rank=0).collect())
            await client.scale_elastic_ep(size)
            assert (await stream).token_ids == expected([1, 2], 100)
            assert len(client.ranks()) == size
            output = await client.generate([3], FEW, data_parallel_rank=client.ranks()[-1]).collect()
            assert output.token_ids == expected([3], 5)
        await eventually(lambda: rests(client), "all ranks rest")
