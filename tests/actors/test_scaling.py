"""Pools that grow and shrink while they serve: nothing is lost, and an operation that fails leaves nothing behind."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from actors.control_plane import RayControlPlane, find_actor
from actors.groups import pool_groups
from actors.launch import connect
from actors.naming import Role, controller_name, named_actors
from actors.processes import is_gone
from raycore.client.client import EngineCoreClient
from raycore.config import Timeouts
from raycore.errors import (
    CapacityError,
    EngineStartError,
    InvalidArgumentsError,
    RankLeftError,
    ScalingBusyError,
    ScalingError,
    UnknownRankError,
)
from raycore.sampling import SamplingParams
from tests.actors.pools import PoolMaker, ask_controller, eventually, warm
from tests.support.engine_process import expected

pytestmark = pytest.mark.ray

STEADY: dict[str, Any] = {"engine_options": {"base_s": 0.005, "vocab_size": 32_000}, "timeouts": {"drain_s": 0.5}}
"""Steps of five milliseconds, and half a second for a leaver's requests before they move."""


class Traffic:
    """A steady load whose every answer is checked."""

    def __init__(self, client: EngineCoreClient) -> None:
        self.done = 0
        self.moved = 0
        self._client = client
        self._is_over = False

    async def _ask(self, number: int) -> None:
        while not self._is_over:
            prompt = [300 + number, 300 + self.done % 1000, 7]
            output = await self._client.generate(prompt, SamplingParams(max_tokens=40)).collect()
            assert output.token_ids == expected(prompt, 40)
            self.done += 1
            self.moved += output.replayed

    @asynccontextmanager
    async def on(self, streams: int = 24) -> AsyncIterator[None]:
        tasks = [asyncio.create_task(self._ask(number)) for number in range(streams)]
        try:
            yield
        finally:
            self._is_over = True
            await asyncio.gather(*tasks)


async def test_ranks_on_gpus_take_their_weights_one_after_another(pools: PoolMaker, tmp_path: Path) -> None:
    log = tmp_path / "log"
    gpus = {"engine": "tests.actors.engines:tells_when_it_loads", "device": "cuda", "num_cpus_per_engine": 0.1}
    await pools.open("gpus", data_parallel_size=1, standby=1, warm="weights", engine_options={"log": str(log)}, **gpus)
    async with connect("gpus") as client:
        assert (await client.scale_elastic_ep(4)).joined == (1, 2, 3)
        await warm("gpus", 1)
    told = log.read_text().split()
    assert len(told) >= 2 * 5
    assert told == ["begin", "end"] * (len(told) // 2)


async def left_behind(pool: str) -> tuple[int, int]:
    """Engine actors and placement groups of a pool."""
    names = [name for name in await asyncio.to_thread(named_actors, pool) if name.role is Role.ENGINE]
    return len(names), len(await asyncio.to_thread(pool_groups, pool))


async def only(pool: str, count: int) -> None:
    async def check() -> bool:
        return await left_behind(pool) == (count, count)

    await eventually(check, f"{count} engines and groups, and nothing else, are left of {pool}")


async def test_growing_and_shrinking_under_load_loses_nothing(pools: PoolMaker) -> None:
    await pools.open("cycles", **STEADY)
    async with connect("cycles") as client:
        traffic = Traffic(client)
        async with traffic.on():
            for target in (4, 2, 3):
                before = traffic.done
                report = await client.scale_elastic_ep(target)
                assert report.ranks == tuple(range(target))
                assert client.membership.epoch > 1
                await eventually(_more(traffic, before + 50), "the load goes on")
            assert (report.joined, report.left) == ((2,), ())
            assert list(report.phases_s) == ["reserve", "spawn", "prepare", "ready", "commit", "retire"]
        client.check_invariants()
        assert sorted(client.ranks()) == [0, 1, 2]
        assert traffic.done > 150
    await only("cycles", 3)


async def test_ranks_in_lockstep_grow_and_shrink_under_load(pools: PoolMaker) -> None:
    await pools.open("together", **{**STEADY, "engine_options": {**STEADY["engine_options"], "lockstep": True}})
    async with connect("together") as client:
        traffic = Traffic(client)
        async with traffic.on(8):
            for target in (3, 1):
                before = traffic.done
                assert (await client.scale_elastic_ep(target)).ranks == tuple(range(target))
                await eventually(_more(traffic, before + 20), "the load goes on")
        client.check_invariants()
    await only("together", 1)


async def test_new_ranks_serve_clients_that_were_there_before(pools: PoolMaker) -> None:
    await pools.open("served", data_parallel_size=1, **STEADY)
    async with connect("served") as client, connect("served") as other:
        await other.scale_elastic_ep(2)

        async def knows() -> bool:
            return client.ranks() == (0, 1)

        await eventually(knows, "the other client knows the new rank")
        streams = [client.generate([5], SamplingParams(max_tokens=3)) for _ in range(8)]
        await asyncio.gather(*(stream.collect() for stream in streams))
        assert {stream.rank for stream in streams} == {0, 1}


async def test_rank_0_leaves_twice_and_what_ran_there_goes_on_elsewhere(pools: PoolMaker) -> None:
    await pools.open("rank0", **STEADY)
    async with connect("rank0") as client:
        for _ in range(2):
            long, pinned = (client.generate([9, 8], SamplingParams(max_tokens=400), data_parallel_rank=rank) for rank in (None, 0))
            fillers = [client.generate([9, 8], SamplingParams(max_tokens=400)) for _ in range(4)]
            await asyncio.gather(*(anext(stream) for stream in (long, pinned, *fillers)))
            report = await client.remove_ranks([0])
            assert (report.left, report.ranks) == ((0,), (1,))
            for stream in (long, *fillers):
                rest = await stream.collect()
                assert stream.rank == 1
                assert rest.token_ids == expected([9, 8], 400)[-len(rest.token_ids) :]
            with pytest.raises(RankLeftError, match="pinned to rank 0"):
                await pinned.collect()
            assert (await client.scale_elastic_ep(2)).joined == (0,)
            assert client.ranks() == (0, 1)
    await only("rank0", 2)


async def test_a_short_request_on_a_leaver_ends_there(pools: PoolMaker) -> None:
    await pools.open("drained", **STEADY)
    async with connect("drained") as client:
        stream = client.generate([3], SamplingParams(max_tokens=30), data_parallel_rank=1)
        await anext(stream)
        await client.scale_elastic_ep(1)
        rest = await stream.collect()
        assert (rest.finish_reason, rest.replayed) == ("length", False)


async def test_the_same_target_again_is_nothing_to_do(pools: PoolMaker) -> None:
    await pools.open("same")
    async with connect("same") as client:
        epoch = client.membership.epoch
        report = await client.scale_elastic_ep(2)
        assert (report.ranks, report.joined, report.left) == ((0, 1), (), ())
        assert client.membership.epoch == epoch


async def test_one_operation_at_a_time_and_a_repetition_waits_for_it(pools: PoolMaker) -> None:
    await pools.open("busy")
    async with connect("busy") as client, connect("busy") as other:
        growing = [asyncio.create_task(each.scale_elastic_ep(3)) for each in (client, other)]
        await eventually(_operation_is_running("busy"), "the operation runs")
        with pytest.raises(ScalingBusyError, match="to 3 ranks") as refused:
            await other.scale_elastic_ep(1)
        with pytest.raises(ScalingBusyError):
            await other.remove_ranks([0])
        reports = await asyncio.gather(*growing)
        assert {report.operation for report in reports} == {refused.value.operation}
        assert reports[0].ranks == (0, 1, 2)


async def test_what_does_not_fit_is_refused_before_anybody_hears_of_it(pools: PoolMaker) -> None:
    await pools.open("crowded")
    async with connect("crowded") as client:
        with pytest.raises(CapacityError):
            await client.scale_elastic_ep(5000)
        assert client.membership.epoch == 1
        history = (await ask_controller("crowded", "status"))["operations"]
        assert [entry["phase"] for entry in history] == ["undone"]
        assert (await client.scale_elastic_ep(1)).left == (1,)
    await only("crowded", 1)


@pytest.mark.parametrize("target", [0, -1, True, 2.0, "3"])
async def test_a_target_that_is_none_is_refused(pools: PoolMaker, target: Any) -> None:
    await pools.open("targets")
    async with connect("targets") as client:
        with pytest.raises(InvalidArgumentsError, match="data_parallel_size"):
            await client.scale_elastic_ep(target)


@pytest.mark.parametrize(
    ("ranks", "error"),
    [
        ([7], UnknownRankError),
        ([], UnknownRankError),
        ([0, 1], InvalidArgumentsError),
        (0, InvalidArgumentsError),
        (None, InvalidArgumentsError),
    ],
)
async def test_ranks_that_cannot_leave_are_refused(pools: PoolMaker, ranks: Any, error: type[Exception]) -> None:
    await pools.open("removals")
    async with connect("removals") as client:
        with pytest.raises(error):
            await client.remove_ranks(ranks)
        assert client.ranks() == (0, 1)


async def test_a_joiner_that_cannot_start_is_undone_and_the_next_operation_works(pools: PoolMaker) -> None:
    await pools.open("undone", engine_options={"per_rank": {"2": {"fail_start": "there is no third engine"}}})
    async with connect("undone") as client:
        with pytest.raises(EngineStartError, match="no third engine"):
            await client.scale_elastic_ep(4)
        assert client.ranks() == (0, 1)
        await only("undone", 2)
        history = (await ask_controller("undone", "status"))["operations"]
        assert history[0]["error"].startswith("spawn: ")
        assert (await client.scale_elastic_ep(1)).ranks == (0,)


async def test_a_cancelled_operation_leaves_nothing(pools: PoolMaker) -> None:
    await pools.open("cancelled")
    async with connect("cancelled") as client:
        growing = asyncio.create_task(client.scale_elastic_ep(4))
        running = await eventually(_operation_is_running("cancelled"), "the operation runs")
        assert await ask_controller("cancelled", "cancel_operation", running["operation"])
        with pytest.raises(ScalingError, match="cancelled"):
            await growing
        assert client.ranks() == (0, 1)
        assert not await ask_controller("cancelled", "cancel_operation", running["operation"])
    await only("cancelled", 2)


async def test_a_leaver_that_is_killed_is_gone_all_the_same(pools: PoolMaker) -> None:
    access = await pools.open("hurried", **{**STEADY, "timeouts": {"drain_s": 20.0}})
    async with connect("hurried") as client:
        stream = client.generate([4], SamplingParams(max_tokens=2000), data_parallel_rank=1)
        await anext(stream)
        shrinking = asyncio.create_task(client.scale_elastic_ep(1))

        async def is_leaving() -> bool:
            return not client.membership.serves(access.membership.members[1].engine)

        await eventually(is_leaving, "rank 1 is leaving")
        os.kill(access.membership.members[1].pid, signal.SIGKILL)
        assert (await shrinking).ranks == (0,)
        with pytest.raises(RankLeftError):
            await stream.collect()
    await only("hurried", 1)


@pytest.mark.parametrize("target", [4, 1], ids=["growing", "shrinking"])
async def test_a_controller_that_is_killed_meanwhile_leaves_one_topology(pools: PoolMaker, target: int) -> None:
    pool = f"headless{target}"
    await pools.open(pool, **STEADY)
    async with connect(pool) as client:
        traffic = Traffic(client)
        async with traffic.on(8):
            scaling = asyncio.create_task(RayControlPlane(pool, Timeouts()).scale(target))
            await eventually(_operation_is_running(pool), "the operation runs")
            controller = await find_actor(controller_name(pool))
            os.kill(await controller.ping.remote(), signal.SIGKILL)
            with pytest.raises(Exception, match="scale"):
                await scaling
            membership = await eventually(lambda: _settled(pool), "a new controller has settled the topology")
            before = traffic.done
            await eventually(_more(traffic, before + 20), "the load goes on")
        assert len(membership.members) in {2, target}
        await only(pool, len(membership.members))
        assert (await client.scale_elastic_ep(3)).ranks == (0, 1, 2)


async def test_a_retired_ranks_process_is_gone(pools: PoolMaker) -> None:
    access = await pools.open("retired")
    async with connect("retired") as client:
        await client.scale_elastic_ep(1)

    async def check() -> bool:
        return is_gone(access.membership.members[1].pid)

    await eventually(check, "the process is gone")


def _more(traffic: Traffic, count: int) -> Any:
    async def check() -> bool:
        return traffic.done >= count

    return check


def _operation_is_running(pool: str) -> Any:
    async def check() -> Any:
        found = (await ask_controller(pool, "status"))["operations"]
        return found[0] if found and found[0]["phase"] not in {"done", "undone"} else None

    return check


async def _settled(pool: str) -> Any:
    status = await ask_controller(pool, "status")
    membership = await ask_controller(pool, "membership")
    is_settled = membership.term > 1 and all(member["state"] == "serving" for member in status["members"])
    return membership if is_settled else None
