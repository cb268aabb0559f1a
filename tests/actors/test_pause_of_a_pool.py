"""Pause and resume over the ranks of a pool on Ray: without its controller, and with a rank that dies meanwhile."""

from __future__ import annotations

import asyncio
import os
import signal

import pytest

from actors.control_plane import RayControlPlane
from raycore.client.client import EngineCoreClient
from raycore.client.control import PoolAccess
from raycore.client.links import SocketLinks
from raycore.config import Timeouts
from raycore.sampling import SamplingParams
from tests.actors.pools import LIMIT_S, PoolMaker, ask_controller, eventually

pytestmark = pytest.mark.ray


async def test_all_ranks_pause_and_one_that_dies_meanwhile_is_left_out(pools: PoolMaker) -> None:
    access = await pools.open("pausing", data_parallel_size=3, engine_options={"base_s": 0.002})
    async with client_of(access) as client:
        long = client.generate([1, 2], SamplingParams(max_tokens=800), data_parallel_rank=1)
        await anext(long)
        pause = asyncio.create_task(client.operations.pause_scheduler(mode="wait"))
        await eventually(client.operations.is_scheduler_paused, "the pause has begun")
        os.kill(access.membership.members[2].pid, signal.SIGKILL)
        await asyncio.wait_for(pause, LIMIT_S)
        assert await client.call_all("is_scheduler_paused") == {0: True, 1: True}
        assert (await long.collect()).finish_reason == "length"
        held = [client.generate([7], SamplingParams(max_tokens=3), data_parallel_rank=rank) for rank in (0, 1)]
        await client.operations.resume_scheduler()
        assert [(await stream.collect()).token_ids for stream in held] == [[7] * 3] * 2


async def test_the_controller_is_not_needed_to_pause_and_resume(pools: PoolMaker) -> None:
    access = await pools.open("headless")
    pid = await ask_controller("headless", "ping")
    async with client_of(access) as client:
        os.kill(pid, signal.SIGSTOP)
        try:
            for mode in ("keep", "abort", "wait"):
                await asyncio.wait_for(client.operations.pause_scheduler(mode=mode), LIMIT_S)
                assert await client.operations.is_scheduler_paused() is True
                await asyncio.wait_for(client.operations.resume_scheduler(), LIMIT_S)
                assert await client.operations.is_scheduler_paused() is False
        finally:
            os.kill(pid, signal.SIGCONT)


def client_of(access: PoolAccess) -> EngineCoreClient:
    return EngineCoreClient(access, RayControlPlane(access.membership.pool, Timeouts()), SocketLinks(access, access.limits))
