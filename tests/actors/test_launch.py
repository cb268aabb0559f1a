"""`launch` and `connect` with their real clients: both kinds of block, and every way out of them."""

from __future__ import annotations

import asyncio
import gc
import os
import signal
import threading
from typing import Any

import pytest

import raycore
from actors.naming import named_actors
from actors.pool_end import clean_up
from raycore.errors import EngineDeadError, PoolExistsError, PoolNotFoundError
from tests.actors.pools import eventually, membership_when

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("cluster")]

ECHO: dict[str, Any] = {"engine": "echo", "data_parallel_size": 2}


async def _answer(client: Any, prompt: str) -> str:
    output = await client.generate(prompt, raycore.SamplingParams(max_tokens=len(prompt))).collect()
    return output.text


async def test_an_async_block_serves_and_leaves_nothing() -> None:
    async with raycore.launch(pool="block", **ECHO) as client:
        assert await _answer(client, "hello") == "hello"
        assert client.ranks() == (0, 1)
    assert named_actors("block") == []


def test_a_blocking_block_serves_and_leaves_nothing() -> None:
    with raycore.launch(pool="block", **ECHO) as client:
        assert client.generate("hello", raycore.SamplingParams(max_tokens=5)).collect().text == "hello"
        assert len(raycore.pool_status("block")["members"]) == 2
    assert named_actors("block") == []


async def test_an_error_in_the_block_ends_the_pool_and_is_raised() -> None:
    with pytest.raises(ZeroDivisionError):
        async with raycore.launch(pool="error", **ECHO):
            raise ZeroDivisionError
    assert named_actors("error") == []


async def test_a_cancelled_block_ends_the_pool() -> None:
    is_open = asyncio.Event()

    async def work() -> None:
        async with raycore.launch(pool="cancelled", **ECHO):
            is_open.set()
            await asyncio.Event().wait()

    task = asyncio.create_task(work())
    await asyncio.wait_for(is_open.wait(), 60)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert named_actors("cancelled") == []


def test_an_interrupt_in_a_blocking_block_ends_the_pool() -> None:
    with pytest.raises(KeyboardInterrupt), raycore.launch(pool="interrupted", **ECHO):
        signal.raise_signal(signal.SIGINT)
    assert named_actors("interrupted") == []


def test_an_interrupt_while_a_pool_starts_leaves_nothing() -> None:
    def interrupt_when_loading() -> None:
        while not is_over.wait(0.02):
            if any(name.role == "engine" for name in named_actors("starting")):
                os.kill(os.getpid(), signal.SIGINT)
                return

    is_over = threading.Event()
    thread = threading.Thread(target=interrupt_when_loading, daemon=True)
    thread.start()
    try:
        with pytest.raises(KeyboardInterrupt), raycore.launch(pool="starting", engine="tests.actors.engines:never_ready"):
            pytest.fail("the engine cannot be ready")
    finally:
        is_over.set()
        thread.join()
    assert named_actors("starting") == []


async def test_a_forgotten_client_ends_its_pool() -> None:
    client: Any = await raycore.launch(pool="forgotten", **ECHO).__aenter__()
    gc.collect()
    assert await _answer(client, "still here") == "still here"
    await client.aclose()
    del client

    async def is_gone() -> bool:
        gc.collect()
        return not await asyncio.to_thread(named_actors, "forgotten")

    await eventually(is_gone, "the pool is gone")


async def test_a_detached_pool_outlives_its_block() -> None:
    async with raycore.launch(pool="kept", lifetime="detached", **ECHO) as client:
        members = client.membership.members
    async with raycore.connect("kept") as client:
        assert client.membership.members == members
        assert await _answer(client, "again") == "again"
        await client.shutdown(timeout_s=0)
    assert named_actors("kept") == []


def test_a_second_process_like_client_connects_beside_the_first() -> None:
    with raycore.launch(pool="shared", **ECHO) as first, raycore.connect("shared") as second:
        assert first.membership == second.membership
        assert second.generate("two", raycore.SamplingParams(max_tokens=3)).collect().text == "two"


async def test_connecting_to_nothing_is_an_error() -> None:
    with pytest.raises(PoolNotFoundError, match="nowhere"):
        async with raycore.connect("nowhere"):
            pytest.fail("there is no such pool")


async def test_launching_a_taken_name_is_an_error() -> None:
    async with raycore.launch(pool="twice", **ECHO) as client:
        with pytest.raises(PoolExistsError, match="twice"):
            async with raycore.launch(pool="twice", **ECHO):
                pytest.fail("the name is taken")
        assert await _answer(client, "ok") == "ok"


async def test_the_client_can_end_the_pool_inside_its_block() -> None:
    async with raycore.launch(pool="early", **ECHO) as client:
        await client.shutdown(timeout_s=0)
        assert named_actors("early") == []


async def test_a_failed_step_is_a_departure_with_the_error_as_its_cause() -> None:
    async with raycore.launch(pool="failing", **ECHO) as client:
        await client.call("collective_rpc", rank=0, method="fail_at_step", args=[1])
        with pytest.raises(EngineDeadError):
            await client.generate("x", raycore.SamplingParams(max_tokens=9), data_parallel_rank=0).collect()
        membership = await membership_when("failing", lambda m: m.epoch == 2)
        assert "ScheduledError: this step was scheduled to fail" in membership.departed[0].cause


async def test_a_step_over_its_budget_is_a_hang() -> None:
    health = raycore.config.HealthConfig(step_budget_s=1.0, grace_s=0.5)
    async with raycore.launch(pool="stalled", health=health, **ECHO) as client:
        await client.call("collective_rpc", rank=1, method="stall_step", args=[600])
        with pytest.raises(EngineDeadError):
            await client.generate("x", raycore.SamplingParams(max_tokens=9), data_parallel_rank=1).collect()
        membership = await membership_when("stalled", lambda m: m.epoch == 2)
        assert "over its budget" in membership.departed[0].cause
        assert await _answer(client, "rank 0 goes on") == "rank 0 goes on"


async def test_cleanup_reports_in_lines() -> None:
    report = await clean_up("nothing-here", limit_s=5)
    assert list(report) == ["nothing was left of pool nothing-here"]
