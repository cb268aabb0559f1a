"""Pause and resume over several ranks, between processes: they never disagree, whoever is slow, frozen, killed or in the way."""

from __future__ import annotations

import asyncio
import contextlib
import random
import signal
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any

import pytest

from raycore.client.client import EngineCoreClient
from raycore.codec import FrameEncoder
from raycore.config import Limits
from raycore.errors import CallTimeoutError, DisagreementError, PauseInProgressError, UtilityError
from raycore.messages import Call, CallResult
from raycore.operations import PausePhaseArguments
from raycore.sampling import SamplingParams
from tests.support.client_process import ClientProcess
from tests.support.engine_process import Pool, client_of, echo_pool, expected
from tests.support.raw_peer import RawPeer
from tests.support.waiting import LIMIT_S

RANKS = 3
LONG = SamplingParams(max_tokens=1_000_000)
SHORT = SamplingParams(max_tokens=3)


@pytest.fixture(scope="module")
def fleet() -> Iterator[Pool]:
    """Three echo engines for the tests that leave them alive."""
    with echo_pool(RANKS) as running:
        yield running
        for engine in running.engines:
            assert engine.state().requests == 0


async def paused_ranks(client: EngineCoreClient) -> dict[int, Any]:
    return await client.call_all("is_scheduler_paused")


async def when(client: EngineCoreClient, condition: Callable[[dict[int, Any]], bool]) -> None:
    """Until the ranks' own answers satisfy the condition."""
    async with asyncio.timeout(LIMIT_S):
        while not condition(await paused_ranks(client)):
            await asyncio.sleep(0.01)


async def check_serving(client: EngineCoreClient) -> None:
    """Every rank is running and answers a request."""
    assert set((await paused_ranks(client)).values()) == {False}
    assert await client.operations.is_scheduler_paused() is False
    for rank in client.ranks():
        output = await asyncio.wait_for(client.generate([7], SHORT, data_parallel_rank=rank).collect(), LIMIT_S)
        assert output.token_ids == [7, 7, 7]


@contextlib.asynccontextmanager
async def busy(client: EngineCoreClient, rank: int) -> AsyncIterator[None]:
    """A request without end runs on the rank."""
    async with client.generate([1, 2], LONG, data_parallel_rank=rank) as stream:
        await anext(stream)
        yield


@pytest.mark.parametrize("mode", ["abort", "keep", "wait"])
async def test_all_ranks_pause_hold_what_comes_and_go_on(fleet: Pool, mode: str) -> None:
    async with client_of(fleet) as client:
        running = [client.generate([rank, 5], SamplingParams(max_tokens=200), data_parallel_rank=rank) for rank in range(RANKS)]
        first = [(await anext(stream)).token_ids for stream in running]
        assert await client.operations.pause_scheduler(mode=mode) is None
        assert set((await paused_ranks(client)).values()) == {True}
        assert await client.operations.is_scheduler_paused() is True
        held = [client.generate([9], SHORT, data_parallel_rank=rank) for rank in range(RANKS)]
        assert await client.operations.dp_engines_running() == [True] * RANKS
        steps = [stats["steps"] for stats in await client.operations.collective_rpc(method="stats")]
        await asyncio.sleep(0.05)
        assert [stats["steps"] for stats in await client.operations.collective_rpc(method="stats")] == steps, "a paused rank steps"
        assert await client.operations.resume_scheduler() is None
        assert await client.operations.resume_scheduler() is None
        assert [(await stream.collect()).token_ids for stream in held] == [[9] * 3] * RANKS
        for rank, (stream, begun) in enumerate(zip(running, first, strict=True)):
            rest = await stream.collect()
            got = begun + rest.token_ids
            assert got == expected([rank, 5], len(got))
            assert (rest.finish_reason, len(got) == 200) == (("abort", False) if mode == "abort" else ("length", True))


async def test_a_waiting_pause_past_its_deadline_is_undone_on_all_ranks(fleet: Pool) -> None:
    async with client_of(fleet) as client, busy(client, 1):
        pause = asyncio.create_task(client.operations.pause_scheduler(mode="wait", timeout_s=0.4))
        await when(client, lambda ranks: all(ranks.values()))
        held = client.generate([9], SHORT, data_parallel_rank=0)
        with pytest.raises(CallTimeoutError, match="pause_scheduler"):
            await pause
        assert (await asyncio.wait_for(held.collect(), LIMIT_S)).token_ids == [9] * 3
        await check_serving(client)


async def test_resume_before_completion_is_an_error_and_changes_nothing(fleet: Pool) -> None:
    async with client_of(fleet) as client, client_of(fleet) as other:
        stream = client.generate([1, 2], SamplingParams(max_tokens=400), data_parallel_rank=2)
        await anext(stream)
        pause = asyncio.create_task(client.operations.pause_scheduler(mode="wait"))
        await when(client, lambda ranks: all(ranks.values()))
        for caller in (client, other):
            with pytest.raises(PauseInProgressError, match="resume_scheduler"):
                await caller.operations.resume_scheduler()
            with pytest.raises(PauseInProgressError):
                await caller.operations.pause_scheduler(mode="abort")
            with pytest.raises(PauseInProgressError):
                await caller.operations.resume_scheduler(rank=0)
        assert await other.operations.is_scheduler_paused() is True
        await pause
        assert (await stream.collect()).finish_reason == "length"
        assert set((await paused_ranks(other)).values()) == {True}
        await other.operations.resume_scheduler()
        await check_serving(client)


async def test_a_cancelled_pause_and_one_whose_client_leaves_are_undone_on_all_ranks(fleet: Pool) -> None:
    async with client_of(fleet) as client, busy(client, 2):
        async with fleet.client() as leaver:
            left = asyncio.create_task(leaver.operations.pause_scheduler(mode="wait"))
            await when(client, lambda ranks: all(ranks.values()))
        await asyncio.gather(left, return_exceptions=True)
        await when(client, lambda ranks: not any(ranks.values()))
        pause = asyncio.create_task(client.operations.pause_scheduler(mode="wait"))
        await when(client, lambda ranks: all(ranks.values()))
        pause.cancel()
        await asyncio.gather(pause, return_exceptions=True)
        await when(client, lambda ranks: not any(ranks.values()))
        await check_serving(client)


async def test_one_rank_can_be_paused_alone_and_the_disagreement_is_told(fleet: Pool) -> None:
    async with client_of(fleet) as client:
        await client.operations.pause_scheduler(rank=1, mode="keep")
        assert await paused_ranks(client) == {0: False, 1: True, 2: False}
        with pytest.raises(DisagreementError) as caught:
            await client.operations.is_scheduler_paused()
        assert caught.value.results == {0: False, 1: True, 2: False}
        await client.operations.resume_scheduler()
        await check_serving(client)


async def test_clients_that_pause_and_resume_at_once_leave_all_ranks_the_same(fleet: Pool) -> None:
    """Any order; meanwhile nobody ever sees ranks that disagree."""
    source, is_over = random.Random(7), asyncio.Event()

    async def play(client: EngineCoreClient, seed: int) -> int:
        own, done = random.Random(seed), 0
        for _ in range(30):
            with contextlib.suppress(PauseInProgressError):
                if own.random() < 0.5:
                    await client.operations.pause_scheduler(mode=own.choice(("keep", "abort", "wait")), timeout_s=LIMIT_S)
                else:
                    await client.operations.resume_scheduler()
                done += 1
        return done

    async def look(client: EngineCoreClient) -> int:
        answers = 0
        while not is_over.is_set():
            assert await client.operations.is_scheduler_paused() in (True, False)
            answers += 1
        return answers

    async with client_of(fleet) as one, client_of(fleet) as two, client_of(fleet) as three:
        looking = asyncio.create_task(look(three))
        done = await asyncio.gather(play(one, source.randrange(99)), play(two, source.randrange(99)))
        is_over.set()
        assert await looking > 0
        assert min(done) > 0
        assert len(set((await paused_ranks(one)).values())) == 1
        await one.operations.resume_scheduler()
        await check_serving(two)


async def test_a_rank_that_is_frozen_makes_the_pause_fail_and_no_rank_keeps_it() -> None:
    with echo_pool(RANKS) as pool:
        async with client_of(pool) as client:
            for rank in range(RANKS):
                pool.engines[rank].signal(signal.SIGSTOP)
                with pytest.raises(CallTimeoutError, match="pause_scheduler"):
                    await client.operations.pause_scheduler(mode="keep", timeout_s=0.3)
                pool.engines[rank].signal(signal.SIGCONT)
                await when(client, lambda ranks: not any(ranks.values()))
                await check_serving(client)


@pytest.mark.parametrize("is_awaited", [False, True], ids=["idle", "awaited"])
async def test_when_a_rank_dies_the_others_complete_the_pause(is_awaited: bool) -> None:
    for victim in range(RANKS):
        with echo_pool(RANKS) as pool:
            async with pool.client() as client:
                streams = [client.generate([1, 2], SamplingParams(max_tokens=1500), data_parallel_rank=(victim + 1) % RANKS)]
                if is_awaited:  # the pause waits for a request of the rank that dies
                    streams.append(client.generate([1, 2], LONG, data_parallel_rank=victim))
                await asyncio.gather(*(anext(stream) for stream in streams))
                pause = asyncio.create_task(client.operations.pause_scheduler(mode="wait"))
                await when(client, lambda ranks: all(ranks.values()))
                pool.engines[victim].signal(signal.SIGKILL)
                await asyncio.wait_for(pause, LIMIT_S)
                assert await paused_ranks(client) == dict.fromkeys((rank for rank in range(RANKS) if rank != victim), True)
                await client.operations.resume_scheduler()
                await check_serving(client)


async def wait_in_a_pause(client: EngineCoreClient, say: Callable[[Any], None]) -> None:
    say("begins")
    await client.operations.pause_scheduler(mode="wait")


async def test_a_client_killed_between_the_phases_leaves_no_rank_paused(fleet: Pool) -> None:
    async with client_of(fleet) as client, busy(client, 1):
        victim = ClientProcess(wait_in_a_pause, fleet.access, Limits())
        try:
            assert await victim.hear() == "begins"
            await when(client, lambda ranks: all(ranks.values()))
            victim.signal(signal.SIGKILL)
            await when(client, lambda ranks: not any(ranks.values()))
        finally:
            victim.end()
        await check_serving(client)


def phase(peer: RawPeer, number: int, **arguments: Any) -> Any:
    """A raw client's phase and its answer."""
    encoded = FrameEncoder().encode_part(PausePhaseArguments(**arguments))
    peer.send(Call(number, "pause_phase", encoded))  # type: ignore[arg-type]
    result = peer.item(CallResult)
    assert result.error is None
    return peer._decoder.decode_part(result.result, dict[str, Any])


async def test_a_decision_that_reached_one_rank_only_is_told_to_the_others_by_any_client(fleet: Pool) -> None:
    async with client_of(fleet) as client:
        stamp = 2 * (fleet_stamp(client) // 2 + 1) + 1
        with RawPeer(fleet.engines[1].member, fleet.name) as peer:
            peer.attach()
            assert phase(peer, 1, phase="prepare", operation="x", mode="keep")["is_granted"]
            assert phase(peer, 2, phase="commit", operation="x", mode="keep", stamp=stamp)["stamp"] == stamp
        assert await client.operations.is_scheduler_paused() is True
        await when(client, lambda ranks: all(ranks.values()))
        await client.operations.resume_scheduler()
        await check_serving(client)


def fleet_stamp(client: Any) -> int:
    return max(session.pause_stamp for session in client._fleet.sessions())


async def test_phases_by_a_peer_that_knows_nothing_are_refused_or_harmless(fleet: Pool) -> None:
    async with client_of(fleet) as client:
        with RawPeer(fleet.engine.member, fleet.name) as peer:
            peer.attach()
            encoder = FrameEncoder()
            for number, arguments in enumerate(
                [{}, {"phase": "destroy"}, {"phase": "commit", "stamp": -1}, {"phase": "prepare", "mode": "later"}, {"phase": 3}, 5, None]
            ):
                peer.send(Call(number, "pause_phase", encoder.encode_part(arguments)))  # type: ignore[arg-type]
                result = peer.item(CallResult)
                assert (result.call_id, result.error.type) == (number, "InvalidArgumentsError")
            assert phase(peer, 50, phase="undo", operation="unknown")["is_granted"]
            assert phase(peer, 51, phase="commit", operation="unknown", stamp=0)["stamp"] == fleet_stamp(client)
            assert phase(peer, 52, phase="prepare", operation="a", mode="keep")["is_granted"]
            assert not phase(peer, 53, phase="prepare", operation="b")["is_granted"]
            with pytest.raises(PauseInProgressError, match="raw"):
                await client.operations.pause_scheduler(timeout_s=2.0)
        await when(client, lambda ranks: not any(ranks.values()))
        await client.operations.resume_scheduler()
        await check_serving(client)


async def test_a_phase_is_no_operation_that_a_caller_can_name(fleet: Pool) -> None:
    async with client_of(fleet) as client:
        for verb in (client.call_all, client.call_agree, client.call_any):
            with pytest.raises(UtilityError, match="not a declared operation"):
                await verb("pause_phase", phase="read")
        assert await client.call_all("pause_scheduler", mode="keep") == dict.fromkeys(range(RANKS))
        assert set((await paused_ranks(client)).values()) == {True}
        assert await client.call_any("resume_scheduler") is None
        await check_serving(client)
