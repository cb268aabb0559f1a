"""Processes that are frozen or killed: clients under load, engines in the middle of a stream."""

from __future__ import annotations

import asyncio
import signal
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from typing import Any

import numpy as np
import pytest

from raycore.config import HealthConfig, Limits
from raycore.errors import EngineDeadError, NoEngineError, RaycoreError
from raycore.sampling import SamplingParams
from raycore.tensors import SHARED_MEMORY_DIRECTORY, sweep
from tests.support.client_process import ClientProcess, Story, read_streams, send_tensors
from tests.support.engine_process import Pool, client_of, echo_pool, expected, is_empty, stats
from tests.support.waiting import LIMIT_S, until

LONG = SamplingParams(max_tokens=1_000_000)
WATCHFUL = HealthConfig(hang_after_s=1.0, first_beat_s=5.0, beat_interval_s=0.1, grace_s=0.5, step_budget_s=0.5)
"""A hang is seen in a second, and a step may take half of one unless it says so."""
FROZEN_S = 10.0
"""Within the default lease."""
FENCED_LIMIT_S = 30.0
"""Without a controller a client waits ten seconds for somebody to fence a suspect before it gives it up."""


@contextmanager
def client_process(play: Callable[..., Awaitable[None]], pool: Pool, limits: Limits, *arguments: Any) -> Iterator[ClientProcess]:
    client = ClientProcess(play, pool.access, limits, *arguments)
    try:
        yield client
    finally:
        client.end()


@asynccontextmanager
async def frozen(client: ClientProcess) -> AsyncIterator[None]:
    client.signal(signal.SIGSTOP)
    try:
        yield
    finally:
        client.signal(signal.SIGCONT)


async def wait_for(condition: Callable[[], Awaitable[Any]], what: str, limit_s: float = LIMIT_S) -> None:
    try:
        async with asyncio.timeout(limit_s):
            while not await condition():
                await asyncio.sleep(0.02)
    except TimeoutError:
        pytest.fail(f"not within {limit_s:g} s: {what}")


async def test_a_client_frozen_until_all_its_requests_are_done_misses_nothing_and_holds_up_nobody(pool: Pool) -> None:
    async with client_of(pool) as watcher:
        with client_process(read_streams, pool, Limits(), 32, 2000) as client:
            assert await client.hear() == "started"
            async with frozen(client):
                frozen_at_s = time.monotonic()
                while time.monotonic() < frozen_at_s + FROZEN_S:
                    output = await watcher.generate([5, 6], SamplingParams(max_tokens=300)).collect()
                    assert output.token_ids == expected([5, 6], 300)
                await wait_for(lambda: is_empty(watcher), "everything of the frozen client has run")
            assert await client.hear() == Story(32, (), 0)
        assert pool.engine.state().ended_sessions <= 1, "only the farewell ended a session"


async def test_a_client_frozen_past_its_lease_is_told_and_its_streams_go_on_where_they_were(pool: Pool) -> None:
    await until(lambda: pool.engine.state().sessions == 0, "clients of other tests have left")
    before = pool.engine.state().ended_sessions
    with client_process(read_streams, pool, Limits(lease_s=1.0), 32, 2500) as client:
        assert await client.hear() == "started"
        async with frozen(client):
            await until(lambda: pool.engine.state().ended_sessions > before, "the lease is over")
            assert pool.engine.state().requests == 0, "the requests were aborted with their session"
        story = await client.hear()
    assert story == Story(32, (), 32)


async def test_a_slow_client_loses_its_session_while_a_fast_one_is_served() -> None:
    limits = Limits(session_backlog_bytes=20_000, socket_high_water_mark=20)
    with echo_pool(limits=limits) as pool:
        async with client_of(pool) as fast:
            with client_process(read_streams, pool, limits, 200, 1500) as slow:
                assert await slow.hear() == "started"
                async with frozen(slow):
                    await until(lambda: pool.engine.state().ended_sessions == 1, "the slow client's session has ended")
                    output = await fast.generate([1, 2, 3], SamplingParams(max_tokens=500)).collect()
                    assert (output.token_ids, output.replayed) == (expected([1, 2, 3], 500), False)
                story = await slow.hear()
                assert (story.exact, story.wrong) == (200, ())
                assert story.replayed


async def test_a_client_killed_while_it_sends_tensors_leaves_an_engine_that_goes_on(pool: Pool) -> None:
    async with client_of(pool) as other:
        pids = []
        for _ in range(2):
            with client_process(send_tensors, pool, Limits(lease_s=2.0), 64 << 20) as client:
                assert await client.hear() == 1
                pids.append(client.pid)
                client.signal(signal.SIGKILL)
                client.process.join(10)
            output = await other.generate([1, 2], SamplingParams(max_tokens=50)).collect()
            assert output.token_ids == expected([1, 2], 50)
        sweep(pool.name)
        left = [file for pid in pids for file in SHARED_MEMORY_DIRECTORY.glob(f"raycore-{pool.name}-{pid}-*")]
        assert not left
        await until(lambda: pool.engine.state().sessions == 1, "the dead clients' sessions are over")
        await until(lambda: not list(SHARED_MEMORY_DIRECTORY.glob(f"raycore-{pool.name}-{pool.engine.pid}-*")), "nor results for them")


async def test_every_waiter_of_a_killed_and_of_a_frozen_engine_learns_of_it_and_the_rest_goes_on() -> None:
    with echo_pool(3, health=WATCHFUL) as pool:
        async with client_of(pool, health=WATCHFUL) as client:
            doomed = [client.generate([7], LONG, data_parallel_rank=rank) for rank in (0, 1) for _ in range(5)]
            await asyncio.gather(*(anext(stream) for stream in doomed))
            calls = [client.call("collective_rpc", rank=rank, method="sleep", args=[60.0]) for rank in (0, 1)]
            tensor = client.call("collective_rpc", rank=1, method="echo", args=[np.zeros(1 << 20)])
            waiting = [asyncio.ensure_future(work) for work in (*(stream.collect() for stream in doomed), *calls, tensor)]
            added = await client.add_request([3], LONG, data_parallel_rank=0)
            await client.call("is_scheduler_paused", rank=2)
            pool.engines[0].signal(signal.SIGKILL)
            pool.engines[1].signal(signal.SIGSTOP)
            done, pending = await asyncio.wait(waiting, timeout=FENCED_LIMIT_S)
            assert not pending
            errors = [task.exception() for task in done]
            assert all(isinstance(error, EngineDeadError) for error in errors), errors
            assert {error.rank for error in errors} == {0, 1}  # type: ignore[union-attr]
            causes = {error.rank: error.cause for error in errors}  # type: ignore[union-attr]
            assert "process has ended" in causes[0]
            assert "no beat" in causes[1]
            (lost,) = [output for output in await client.outputs() if output.error is not None]
            assert (lost.request_id, type(lost.error)) == (added, EngineDeadError)
            assert client.ranks() == (2,)
            assert (await client.generate([1], SamplingParams(max_tokens=5)).collect()).rank == 2
            assert client.in_flight() == 0
        assert not list(SHARED_MEMORY_DIRECTORY.glob(f"raycore-{pool.name}-*")), "what dead engines did not take is gone with the client"


async def test_streams_of_a_dead_engine_go_on_elsewhere_where_replay_is_on() -> None:
    with echo_pool(2, on_engine_death="replay") as pool:
        async with client_of(pool) as client:
            prompts = [[1000 + n, 5, 6] for n in range(40)]
            streams = [client.generate(prompt, SamplingParams(max_tokens=2000)) for prompt in prompts]
            pinned = client.generate([1], LONG, data_parallel_rank=0)
            firsts = await asyncio.gather(*(anext(stream) for stream in streams))
            await client.call("collective_rpc", rank=0, method="fail_at_step", args=[50])
            async with asyncio.timeout(60):
                rests = await asyncio.gather(*(stream.collect() for stream in streams))
            for prompt, first, rest in zip(prompts, firsts, rests, strict=True):
                assert first.token_ids + rest.token_ids == expected(prompt, 2000)
                assert rest.finish_reason == "length"
            assert {rest.rank for rest in rests} == {1}
            assert sum(rest.replayed for rest in rests) == 20
            with pytest.raises(EngineDeadError):
                await pinned.collect()
            await client.call("collective_rpc", rank=1, method="fail_at_step", args=[1])
            with pytest.raises(EngineDeadError):
                await client.generate([1], LONG).collect()
            with pytest.raises(NoEngineError, match="scheduled to fail"):
                client.generate([1])


async def test_a_long_step_is_a_hang_only_without_a_declared_budget() -> None:
    with echo_pool(2, health=WATCHFUL) as pool:
        async with client_of(pool, health=WATCHFUL) as client:
            for rank, budget in ((0, 60.0), (1, None)):
                await client.call("collective_rpc", rank=rank, method="stall_step", args=[3.0, budget])
            declared, silent = (client.generate([4, 5], SamplingParams(max_tokens=20), data_parallel_rank=rank) for rank in (0, 1))
            suspected: dict[int, str] = {}

            async def look() -> None:
                while True:
                    for rank in (0, 1):
                        try:
                            await client.generate([1], SamplingParams(max_tokens=1), data_parallel_rank=rank).aclose()
                        except RaycoreError as error:
                            suspected[rank] = str(error)
                    await asyncio.sleep(0.05)

            looking = asyncio.create_task(look())
            outputs = await asyncio.gather(declared.collect(), silent.collect())
            looking.cancel()
            await asyncio.gather(looking, return_exceptions=True)
            assert set(suspected) == {1}
            assert "budget" in suspected[1]
            assert [output.token_ids for output in outputs] == [expected([4, 5], 20)] * 2
            await wait_for(lambda: _serves(client, 1), "the rank that came back is no suspect any more")


async def _serves(client: Any, rank: int) -> bool:
    try:
        return bool((await client.generate([1], SamplingParams(max_tokens=1), data_parallel_rank=rank).collect()).token_ids)
    except RaycoreError:
        return False


async def test_a_step_that_fails_is_reported_as_what_it_is() -> None:
    with echo_pool(2) as pool:
        async with client_of(pool) as client:
            streams = [client.generate([1], LONG, data_parallel_rank=rank) for rank in (0, 1)]
            await asyncio.gather(*(anext(stream) for stream in streams))
            await client.call("collective_rpc", rank=0, method="fail_at_step", args=[1])
            with pytest.raises(EngineDeadError, match="scheduled to fail") as caught:
                await asyncio.wait_for(streams[0].collect(), LIMIT_S)
            assert "ScheduledError" in caught.value.cause
            assert (await anext(streams[1])).token_ids
            assert (await stats(client, 1))["running"] == 1
