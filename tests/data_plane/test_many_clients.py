"""Many clients of one pool: they come, go and die while the others are served, and leave nothing on the engines."""

from __future__ import annotations

import asyncio
import random
import signal
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager
from typing import Any

import pytest

from actors.coordinator import Coordinator
from raycore.client.client import EngineCoreClient
from raycore.client.in_process import NoControlPlane
from raycore.config import Limits
from raycore.engine import EngineLoad
from raycore.membership import Membership
from raycore.sampling import SamplingParams
from raycore.transport.coordinator_sockets import CoordinatorSockets
from tests.support.client_process import ClientProcess, Story, hold_requests, links_over, read_streams, storm
from tests.support.engine_process import Pool, client_of, echo_pool, expected
from tests.support.waiting import until

MANY = 16
CHANNELS = ("stream", "ipc", "tcp")
FROZEN_S = 10.0
"""Far more than the grace of a connection that has closed, well within the lease of 30 s."""
NOTICED_S = 10.0
"""A dead client is noticed in less than two seconds (bench/pool.py measures it); here only that it is not the lease that ends it."""
DEATHS = 6


@pytest.fixture(scope="module")
def tcp_pool() -> Iterator[Pool]:
    """One engine that all three channels reach."""
    with echo_pool(over_tcp=True) as running:
        yield running


@contextmanager
def process(play: Any, pool: Pool, *arguments: Any, over: str = "stream") -> Iterator[ClientProcess]:
    client = ClientProcess(play, pool.access, Limits(), *arguments, over=over)
    try:
        yield client
    finally:
        client.end()


@asynccontextmanager
async def coordinator_of(pool: Pool) -> AsyncIterator[Coordinator]:
    """The pool's coordinator, without its actor."""
    access = pool.access
    keys = (access.client_public_key, access.client_secret_key)
    sockets = CoordinatorSockets(pool.name, node_ip="127.0.0.1", tcp="never", server_keys=("", ""), client_public_key=keys[0])
    sockets.bind()

    async def find() -> Membership:
        return access.membership

    coordinator = Coordinator(Membership(pool.name), sockets, keys, find)
    coordinator.start()
    try:
        yield coordinator
    finally:
        await coordinator.close()


async def serve_until(stop: asyncio.Event, client: EngineCoreClient, number: int) -> int:
    """Request after request, each checked; how many."""
    served = 0
    while not stop.is_set() or not served:
        prompt = [1 + number, 1 + served % 200]
        output = await client.generate(prompt, SamplingParams(max_tokens=30, ignore_eos=True)).collect()
        assert (output.token_ids, output.finish_reason, output.replayed) == (expected(prompt, 30), "length", False)
        served += 1
    return served


async def test_clients_join_and_leave_under_traffic_and_no_engine_is_reconfigured_nor_a_request_lost() -> None:
    with echo_pool(2) as pool:
        over, end = asyncio.Event(), asyncio.Event()
        async with client_of(pool) as first, AsyncExitStack() as stack:
            membership = first.membership
            serving = [asyncio.create_task(serve_until(end, first, 0))]
            leaving: list[asyncio.Task[int]] = []
            for number in range(1, MANY):
                joined = await stack.enter_async_context(client_of(pool))
                leaving.append(asyncio.create_task(serve_until(over, joined, number)))
            assert [engine.state().sessions for engine in pool.engines] == [MANY, MANY]
            await asyncio.sleep(0)
            over.set()
            counts = await asyncio.gather(*leaving)
            assert min(counts) >= 1
            await stack.aclose()
            await until(lambda: [engine.state().sessions for engine in pool.engines] == [1, 1], "fifteen have left")
            before = serving[0].done()
            end.set()
            assert await serving[0] >= 1
            assert not before, "the first was served all the time"
            assert first.membership == membership
            loads = await first.call_all("collective_rpc", method="stats")
            assert all(row["running"] + row["waiting"] == 0 for row in loads.values())
            assert all(row["finished"] > 0 for row in loads.values()), "both engines worked"
        states = [engine.state() for engine in pool.engines]
        assert [(s.requests, s.bad_frames, s.stale_frames) for s in states] == [(0, 0, 0)] * 2
        assert [s.ended_sessions for s in states] == [MANY, MANY], "each session ended once, by its client's farewell"


@pytest.mark.parametrize("over", CHANNELS)
@pytest.mark.parametrize("what", ["that streams", "that only waits"])
async def test_a_killed_clients_requests_are_aborted_long_before_its_lease_is_over(tcp_pool: Pool, over: str, what: str) -> None:
    engine = tcp_pool.engine
    await until(lambda: engine.state().sessions == 0, "clients of other tests have left")
    is_streaming = what == "that streams"
    with process(hold_requests, tcp_pool, 40 if is_streaming else 1, 0 if is_streaming else 3, over=over) as client:
        assert await client.hear() == "started"
        assert engine.state().requests == (40 if is_streaming else 1)
        client.signal(signal.SIGKILL)
        await until(lambda: engine.state().requests == 0, "its requests are aborted", NOTICED_S)
        await until(lambda: (engine.state().sessions, engine.state().known_peers) == (0, 0), "nothing is kept of it", NOTICED_S)
    async with EngineCoreClient(tcp_pool.access, NoControlPlane(), links_over(over, tcp_pool.access, Limits())) as next_one:
        assert await next_one.call("is_scheduler_paused", rank=0) is False, "nor its pause, which waited for the requests"
        output = await next_one.generate([7, 8], SamplingParams(max_tokens=9)).collect()
        assert output.token_ids == expected([7, 8], 9)


@pytest.mark.parametrize("over", ["ipc", "tcp"])
async def test_a_frozen_client_is_not_taken_for_a_dead_one(tcp_pool: Pool, over: str) -> None:
    await until(lambda: tcp_pool.engine.state().sessions == 0, "clients of other tests have left")
    ended = tcp_pool.engine.state().ended_sessions
    with process(read_streams, tcp_pool, 16, 1500, over=over) as client:
        assert await client.hear() == "started"
        client.signal(signal.SIGSTOP)
        try:
            await asyncio.sleep(FROZEN_S)
            assert tcp_pool.engine.state().ended_sessions == ended
        finally:
            client.signal(signal.SIGCONT)
        assert await client.hear() == Story(16, (), 0), "every stream whole, none computed twice"


async def test_storms_of_requests_aborts_calls_and_client_deaths_leave_every_table_empty() -> None:
    seed = 20261122
    dice = random.Random(seed)
    async with AsyncExitStack() as stack:
        pool = stack.enter_context(echo_pool(2, over_tcp=True))
        coordinator = await stack.enter_async_context(coordinator_of(pool))
        living: list[ClientProcess] = []
        for number in range(3 + DEATHS):
            if len(living) == 3:
                victim = living.pop(dice.randrange(3))
                for _ in range(dice.randint(1, 3)):
                    assert isinstance(await victim.hear(), int), f"seed {seed}"
                victim.signal(signal.SIGKILL)
            living.append(stack.enter_context(process(storm, pool, seed + number, over=CHANNELS[number % 3])))
            await living[-1].hear()
        async with client_of(pool) as survivor:
            output = await survivor.generate([4, 5], SamplingParams(max_tokens=20)).collect()
            assert output.token_ids == expected([4, 5], 20)
            for client in living:
                client.signal(signal.SIGKILL)
            await until(lambda: [engine.state().sessions for engine in pool.engines] == [1, 1], "the dead are forgotten", NOTICED_S)
            stats = await survivor.call_all("collective_rpc", method="stats")
            assert all(row["running"] + row["waiting"] + row["kv_tokens_used"] == 0 for row in stats.values()), f"seed {seed}: {stats}"
            assert survivor.in_flight() == 0
            ledgers = [session.ledger for session in survivor._fleet.sessions()]
            assert [(each.requests, each.prefill, each.unacked_prefill) for each in ledgers] == [(0, 0, 0)] * 2, f"seed {seed}"
            nothing = [(member.engine, EngineLoad()) for member in pool.access.membership.members]
            await until(
                lambda: [(told.engine, told.load) for told in coordinator.snapshot().loads] == nothing, "the board is empty", NOTICED_S
            )
        for engine in pool.engines:
            await until(lambda engine=engine: engine.state().known_peers == 0, "no peer is remembered", NOTICED_S)
            state = engine.state()
            assert (state.sessions, state.requests, state.bad_frames) == (0, 0, 0), f"seed {seed}: {state}"
