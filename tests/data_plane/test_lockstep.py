"""Three ranks in lockstep with a real Gloo group: waves start, end, survive lost messages and lost ranks."""

from __future__ import annotations

import asyncio
import random
import threading
import time

import msgspec
import pytest

from raycore.errors import NotSupportedError, RequestFailedError
from raycore.ids import Epoch, GroupStamp, Term
from raycore.messages import Wake
from raycore.sampling import SamplingParams
from raycore.waves import Phase
from tests.support.engine_process import expected
from tests.support.lockstep import QUICK, client_of, lockstep_pool
from tests.support.waiting import until

pytestmark = pytest.mark.timeout(180)

FEW = SamplingParams(max_tokens=5)
LONG = SamplingParams(max_tokens=20_000)


async def test_one_request_on_one_rank_makes_all_ranks_step_and_all_rest_after() -> None:
    with lockstep_pool() as pool:
        async with client_of(pool) as client:
            output = await client.generate([1, 2, 3], FEW, data_parallel_rank=1).collect()
            assert output.token_ids == expected([1, 2, 3], 5)
        (own, dummy), others = pool.steps()[1], [pool.steps()[0], pool.steps()[2]]
        assert (own, dummy) == (5, 0)
        assert others == [(0, 5), (0, 5)]
        assert [pool.lockstep(rank).wave.wave for rank in range(3)] == [1, 1, 1]
        assert {pool.lockstep(rank).wave.phase for rank in range(3)} == {Phase.RESTING}


async def test_ranks_that_agree_every_fourth_step_make_whole_fours() -> None:
    with lockstep_pool(sync_interval=4) as pool:
        async with client_of(pool) as client:
            await client.generate([1], FEW, data_parallel_rank=0).collect()
        assert [sum(steps) for steps in pool.steps()] == [8, 8, 8]
        assert [pool.lockstep(rank).counters.rounds for rank in range(3)] == [3, 3, 3]


async def test_requests_on_all_ranks_at_once_share_a_wave() -> None:
    with lockstep_pool() as pool:
        async with client_of(pool) as client:
            streams = [client.generate([7, rank], FEW, data_parallel_rank=rank).collect() for rank in range(3)]
            assert [output.token_ids for output in await asyncio.gather(*streams)] == [expected([7, rank], 5) for rank in range(3)]
            await until(pool.is_resting, "the wave ends")
            assert await client.call_all("dp_engines_running") == {0: False, 1: False, 2: False}


async def test_no_request_is_stranded_when_waves_end_as_requests_come() -> None:
    """Short requests with pauses of about the length of a wave's end, on random ranks, so that starts and ends meet."""
    rng = random.Random(4)
    with lockstep_pool() as pool:
        async with client_of(pool) as client:
            end_s, done = time.monotonic() + 6.0, 0
            while time.monotonic() < end_s:
                count = rng.randrange(1, 4)
                streams = [
                    client.generate([5], SamplingParams(max_tokens=rng.randrange(1, 3)), data_parallel_rank=rng.randrange(3))
                    for _ in range(count)
                ]
                async with asyncio.timeout(20):
                    await asyncio.gather(*(stream.collect() for stream in streams))
                done += count
                await asyncio.sleep(rng.choice((0, 0, 0.001, 0.005)))
            assert done > 10
        waves = {pool.lockstep(rank).wave.wave for rank in range(3)}
        assert len(waves) == 1
        assert waves.pop() > 3


async def test_a_wave_starts_even_if_nothing_of_the_first_wake_up_arrives(monkeypatch: pytest.MonkeyPatch) -> None:
    with lockstep_pool() as pool:
        peers = pool.lockstep(0)._peers
        send, lost = peers.send, []

        def lose_some(wake: Wake) -> None:
            if len(lost) < 5:
                lost.append(wake)
            else:
                send(wake)

        monkeypatch.setattr(peers, "send", lose_some)
        async with client_of(pool, 0) as client:
            await client.generate([1], FEW).collect()
        assert lost == [Wake(GroupStamp(Epoch(1), Term(1)), 0)] * 5
        assert pool.lockstep(0).counters.sent_wakes > 5


async def test_stale_wakes_are_counted_and_change_nothing() -> None:
    with lockstep_pool() as pool:
        async with client_of(pool) as client:
            await client.generate([1], FEW).collect()
        before = pool.steps()
        now = pool.lockstep(0).wave.stamp
        stale = [Wake(now, 0), Wake(GroupStamp(Epoch(0), Term(1)), 1), Wake(GroupStamp(Epoch(9), Term(1)), 1)]
        for wake in stale:
            pool.lockstep(0)._peers.send(wake)
        await until(lambda: [pool.lockstep(rank).counters.stale_wakes for rank in (1, 2)] == [3, 3], "the wakes have come")
        assert pool.is_resting()
        assert pool.steps() == before


async def test_a_pause_of_all_ranks_is_complete_when_they_rest_and_a_resume_goes_on() -> None:
    with lockstep_pool(base_s=0.001) as pool:
        async with client_of(pool) as client:
            stream = asyncio.ensure_future(client.generate([1, 2], SamplingParams(max_tokens=60), data_parallel_rank=2).collect())
            await until(lambda: pool.lockstep(0).is_stepping, "the wave runs")
            await client.operations.pause_scheduler(mode="keep")
            assert pool.is_resting()
            before = pool.steps()
            held = asyncio.ensure_future(client.generate([3], FEW, data_parallel_rank=0).collect())
            await asyncio.sleep(0.3)
            assert pool.steps() == before, "a step ran in a paused pool"
            assert not held.done()
            await client.operations.resume_scheduler()
            assert (await held).token_ids == expected([3], 5)
            assert (await stream).token_ids == expected([1, 2], 60)


async def test_one_rank_alone_cannot_be_paused_resumed_or_made_to_step() -> None:
    with lockstep_pool() as pool:
        async with client_of(pool) as client:
            for method in ("pause_scheduler", "resume_scheduler", "execute_dummy_batch"):
                with pytest.raises(NotSupportedError, match="step together"):
                    await client.call(method, rank=1)


async def test_a_rank_that_goes_leaves_the_others_alive_and_their_requests_go_on_in_a_new_group() -> None:
    with lockstep_pool(base_s=0.001) as pool:
        async with client_of(pool, 0, 1) as client:
            stream = asyncio.ensure_future(client.generate([4, 5], SamplingParams(max_tokens=300), data_parallel_rank=0).collect())
            await until(lambda: pool.lockstep(2).is_stepping, "the wave runs")
            pool.end(2)
            await until(lambda: pool.lockstep(0).wave.phase is pool.lockstep(1).wave.phase is Phase.BROKEN, "the others notice")
            assert not stream.done()
            pool.decide(0, 1)
            assert (await stream).token_ids == expected([4, 5], 300)
        assert pool.lockstep(0).wave.stamp == GroupStamp(Epoch(2), Term(1))


async def test_without_a_new_group_requests_fail_typed_and_new_ones_are_refused() -> None:
    with lockstep_pool(2, timeouts=msgspec.structs.replace(QUICK, regroup_s=1.0)) as pool:
        async with client_of(pool, 0) as client:
            stream = asyncio.ensure_future(client.generate([1], LONG, data_parallel_rank=0).collect())
            await until(lambda: pool.lockstep(0).is_stepping, "the wave runs")
            pool.end(1)
            with pytest.raises(RequestFailedError, match="no process group") as failure:
                await stream
            assert failure.value.remote_type == "LockstepError"
            with pytest.raises(RequestFailedError, match="no process group"):
                await client.generate([1], FEW).collect()
            pool.decide(0)
            assert (await client.generate([1], FEW).collect()).token_ids == expected([1], 5)


async def test_a_rank_that_does_not_take_part_breaks_the_round_by_its_deadline_and_calls_are_answered_meanwhile() -> None:
    with lockstep_pool(2, timeouts=msgspec.structs.replace(QUICK, collective_s=1.0)) as pool:
        let_go = threading.Event()
        pool.hosts[1].core.post(lambda: let_go.wait(60) and None)
        async with client_of(pool, 0) as client:
            stream = asyncio.ensure_future(client.generate([1], FEW).collect())
            await until(lambda: pool.lockstep(0)._round is not None, "rank 0 waits")
            assert await client.call("dp_engines_running", rank=0) is True
            await until(lambda: pool.lockstep(0).wave.phase is Phase.BROKEN, "rank 0 gives up")
            let_go.set()
            pool.decide(0, 1)
            assert (await stream).token_ids == expected([1], 5)


async def test_a_group_can_be_replaced_by_one_with_more_ranks_and_with_fewer() -> None:
    with lockstep_pool(3) as pool:
        for ranks in ((0, 1), (0, 1, 2), (1, 2), (0, 1, 2)):
            pool.decide(*ranks)
            async with client_of(pool, *ranks) as client:
                outputs = await asyncio.gather(*(client.generate([rank, 9], FEW, data_parallel_rank=rank).collect() for rank in ranks))
                assert [output.token_ids for output in outputs] == [expected([rank, 9], 5) for rank in ranks]
