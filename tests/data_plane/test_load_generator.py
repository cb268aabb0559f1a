"""The load generator: arrivals at their times whatever the engines do, every token counted, and everything lost named."""

from __future__ import annotations

import asyncio
import time

import numpy as np
import pytest

from raycore.bench_serve import ServeBench, chosen_trace, summary
from raycore.errors import ConfigurationError
from raycore.load import LoadClient, LoadRecord, LoadShare, make_prompt
from raycore.traces import TraceRequest
from tests.support.engine_process import Pool, client_of, echo_pool

TRACE = [TraceRequest(0.01 * n, 20 + n, 5 + n % 7) for n in range(40)]


async def replayed(pool: Pool, trace: list[TraceRequest], *, drain_limit_s: float = 30.0, begin_in_s: float = 0.05) -> LoadShare:
    async with client_of(pool) as client:
        return await LoadClient(client, drain_limit_s=drain_limit_s).replay(list(enumerate(trace)), time.time() + begin_in_s)


async def test_every_request_is_sent_and_every_token_counted(pool: Pool) -> None:
    share = await replayed(pool, TRACE)
    report = summary("p", (0,), TRACE, [share])
    assert (report.requests, report.completed, report.lost) == (40, 40, {})
    assert report.ranks == {
        0: {"requests": 40, "prompt_tokens": sum(20 + n for n in range(40)), "output_tokens": sum(5 + n % 7 for n in range(40))}
    }
    assert len(np.frombuffer(share.gaps, np.float32)) >= sum(r.got_tokens > r.first_tokens for r in share.records)
    assert all(0 <= record.first_s <= record.last_s for record in share.records)
    assert report.duration_s >= TRACE[-1].arrival_s


async def test_arrivals_do_not_wait_for_answers(pool: Pool) -> None:
    async with client_of(pool) as client:
        await client.call("pause_scheduler", rank=0, mode="keep")
        replay = asyncio.create_task(LoadClient(client, drain_limit_s=30.0).replay(list(enumerate(TRACE)), time.time()))
        async with asyncio.timeout(30):
            while client.in_flight() < 40:
                await asyncio.sleep(0.01)
        await client.call("resume_scheduler", rank=0)
        share = await replay
    assert all(record.is_complete for record in share.records)
    assert share.records[0].first_s >= TRACE[-1].arrival_s, "the first waited until the last had been sent"


async def test_what_has_not_ended_in_time_or_was_on_a_dead_engine_is_lost_and_named() -> None:
    with echo_pool(2) as pool:
        share = await replayed(pool, [*TRACE[:4], TraceRequest(0.05, 5, 1_000_000)], drain_limit_s=0.5)
        report = summary("p", (0, 1), TRACE[:5], [share])
        assert (report.completed, report.lost) == (4, {"not done 0.5 s after the last arrival": 1})
        async with client_of(pool) as client:
            await client.call("collective_rpc", rank=0, method="fail_at_step", args=[20])
            share = await LoadClient(client, drain_limit_s=30.0).replay(list(enumerate(TRACE)), time.time())
        report = summary("p", (0, 1), TRACE, [share])
        assert set(report.lost) == {"EngineDeadError"}
        assert report.completed + report.lost["EngineDeadError"] == 40
        assert report.completed >= 20


async def test_a_generator_that_cannot_keep_up_says_so(pool: Pool) -> None:
    share = await replayed(pool, TRACE, begin_in_s=-60.0)
    report = summary("p", (0,), TRACE, [share])
    assert not report.kept_up
    assert report.late == 40
    assert report.late_s["p50"] > 50
    assert report.ttft_s["p50"] > 50, "a first token is late by the generator's delay, too"


def test_requests_that_no_client_tells_of_are_lost_and_balance_is_over_all_ranks() -> None:
    records = [
        LoadRecord(n, 10, 2, first_s=0.1, last_s=0.2, got_tokens=2, first_tokens=1, rank=n % 2, finish_reason="length") for n in range(6)
    ]
    records.append(LoadRecord(6, 10, 3, got_tokens=2, finish_reason="stop"))
    report = summary("p", (0, 1, 2), [*TRACE[:8]], [LoadShare(records, b"")])
    assert report.lost == {"2 of 3 tokens": 1, "never sent": 1}
    assert report.ranks[2] == {"requests": 0, "prompt_tokens": 0, "output_tokens": 0}
    assert report.imbalance == pytest.approx(1.5)
    assert report.per_token_s == pytest.approx({"p50": 0.1, "p90": 0.1, "p99": 0.1})


def test_equal_blocks_make_equal_prefixes_and_nothing_else_does() -> None:
    first, second = (make_prompt(n, TraceRequest(0, 1300, 1, blocks), 5000) for n, blocks in enumerate([(1, 2, 3), (1, 2, 9)]))
    assert first[:1024] == second[:1024]
    assert first[1024:] != second[1024:]
    assert len(first) == 1300
    free = [tuple(make_prompt(n, TraceRequest(0, 30, 1), 5000)[:8]) for n in range(50)]
    assert len(set(free)) == 50
    assert all(0 < token < 257 for token in make_prompt(1, TraceRequest(0, 999, 1), 257))


def test_nothing_to_replay_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="nothing to replay"):
        chosen_trace(ServeBench(requests=10, duration_s=0.0))
    assert len(chosen_trace(ServeBench(requests=100, duration_s=5.0))) < 100
