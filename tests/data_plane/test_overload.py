"""Far more requests than may wait, between processes: memory stays bounded, refusals are typed, and what was taken in is served."""

from __future__ import annotations

import asyncio
from collections import Counter

import psutil

from raycore.config import Limits
from raycore.errors import OverloadedError
from raycore.sampling import SamplingParams
from tests.support.engine_process import client_of, echo_pool, expected
from tests.support.waiting import LIMIT_S

FLOOD = 100_000
PROMPT_TOKENS = 512
MOST = 4096
"""Of one client; 8 MiB of prompts, where the flood has 200."""
GROWTH_BYTES = 100 << 20


async def test_a_flood_while_paused_is_refused_beyond_the_limit_and_the_rest_completes() -> None:
    limits = Limits(client_waiting_requests=MOST, waiting_requests=MOST + 100, client_requests=16_384)
    with echo_pool(limits=limits) as pool:
        async with client_of(pool) as client, client_of(pool) as other:
            engine, own = psutil.Process(pool.engine.pid), psutil.Process()
            before = engine.memory_info().rss, own.memory_info().rss
            await client.operations.pause_scheduler(mode="keep")
            prompt = list(range(1, PROMPT_TOKENS + 1))
            sent: set[str] = set()
            refused: Counter[str] = Counter()
            for number in range(FLOOD):
                try:
                    sent.add(await client.add_request(prompt, SamplingParams(max_tokens=3)))
                except OverloadedError as error:
                    refused["here"] += error.retry_after_s > 0
                if number % 500 == 0:
                    await asyncio.sleep(0)
                    for output in client.take_outputs():
                        assert isinstance(output.error, OverloadedError)
                        refused["there"] += 1
                        sent.discard(output.request_id)
            # another client has its own share, and pausing and asking go on as ever
            assert await other.operations.is_scheduler_paused() is True
            later = other.generate([5], SamplingParams(max_tokens=2))
            after = engine.memory_info().rss, own.memory_info().rss
            assert [
                round((now - then) / GROWTH_BYTES, 2) for now, then in zip(after, before, strict=True) if now - then > GROWTH_BYTES
            ] == []
            await client.operations.resume_scheduler()
            served = 0
            async with asyncio.timeout(LIMIT_S * 2):
                got: dict[str, list[int]] = {}
                while sent:
                    for output in await client.outputs():
                        if output.error is not None:
                            assert isinstance(output.error, OverloadedError)
                            refused["there"] += 1
                            sent.discard(output.request_id)
                            continue
                        got.setdefault(output.request_id, []).extend(output.token_ids)
                        if output.finish_reason is not None:
                            assert got.pop(output.request_id) == expected(prompt, 3)
                            sent.discard(output.request_id)
                            served += 1
            assert served == MOST
            assert refused["there"] > 0
            assert refused.total() == FLOOD - MOST
            assert (await later.collect()).token_ids == [5, 5]


async def test_replayed_requests_are_taken_in_over_the_limit() -> None:
    limits = Limits(waiting_requests=20, client_waiting_requests=20)
    with echo_pool(2, limits=limits, on_engine_death="replay") as pool:
        async with client_of(pool) as client:
            await client.operations.pause_scheduler(mode="keep")
            streams = [client.generate([n], SamplingParams(max_tokens=5), priority=0) for n in range(40)]
            reading = [asyncio.create_task(stream.collect()) for stream in streams]
            assert await client.operations.is_scheduler_paused() is True
            pool.engines[1].process.kill()
            async with asyncio.timeout(LIMIT_S):
                while len(client.ranks()) > 1:
                    await asyncio.sleep(0.01)
            await client.operations.resume_scheduler()
            answers = await asyncio.wait_for(asyncio.gather(*reading), LIMIT_S)
        assert [answer.token_ids for answer in answers] == [[n] * 5 for n in range(40)]
        assert {answer.rank for answer in answers} == {0}
