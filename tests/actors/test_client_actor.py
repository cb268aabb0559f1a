"""Client actors: found by name, streams that end with their readers, operations from the table, typed errors, and the end."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from typing import Any

import pytest
import ray

import raycore
from actors.cleanup import cleanup
from actors.client_handle import ClientHandle
from actors.naming import Role, named_actors
from actors.processes import is_gone
from raycore.errors import (
    ClientClosedError,
    ConfigurationError,
    InvalidArgumentsError,
    InvalidRequestError,
    NotSupportedError,
    PoolError,
    PoolNotFoundError,
    RemoteCallError,
    UnknownOperationError,
    UnknownRankError,
)
from raycore.operations import TABLE
from raycore.sampling import SamplingParams
from tests.actors.pools import PoolMaker, eventually
from tests.support.engine_process import expected

pytestmark = pytest.mark.ray

LONG = SamplingParams(max_tokens=1_000_000)
SLOW: dict[str, Any] = {"base_s": 0.005, "max_model_len": 1 << 21, "kv_tokens": 1 << 24}
FROZEN_S = 10.0
"""A caller may be frozen for so long and lose nothing."""
DEAD_CALLER_S = 10.0
"""It takes about half a second; a busy machine may take longer."""


@asynccontextmanager
async def handle_of(pool: str, name: str = "default", **options: Any) -> AsyncIterator[ClientHandle]:
    handle = raycore.client_actor(pool, name, **options)
    try:
        yield handle
        await handle.actor.check_invariants.remote()
    finally:
        await handle.end()


async def in_flight(handle: ClientHandle) -> int:
    return (await handle.status())["in_flight"]


async def until_idle(handle: ClientHandle, what: str, limit_s: float = 20.0) -> None:
    """The client holds no request, and neither does any engine."""

    async def is_idle() -> bool:
        stats = await handle.call_all("collective_rpc", method="stats")
        held = sum(row["running"] + row["waiting"] + row["kv_tokens_used"] for row in stats.values())
        return not held and not await in_flight(handle)

    await eventually(is_idle, what, limit_s)


async def test_streams_give_every_token_once_and_in_order(pools: PoolMaker) -> None:
    await pools.open("ca-streams", engine_options=SLOW)
    async with handle_of("ca-streams") as handle:
        prompts = [[1 + n % 200, 2, 3] for n in range(300)]
        streams = [handle.generate(prompt, SamplingParams(max_tokens=40, ignore_eos=True)) for prompt in prompts]
        outputs = await asyncio.gather(*(stream.collect() for stream in streams))
        assert [output.token_ids for output in outputs] == [expected(prompt, 40) for prompt in prompts]
        assert {output.finish_reason for output in outputs} == {"length"}
        assert {output.rank for output in outputs} == {0, 1}
        pinned = await handle.generate([5], SamplingParams(max_tokens=3), request_id="mine", data_parallel_rank=1).collect()
        assert (pinned.request_id, pinned.rank, pinned.token_ids) == ("mine", 1, [5, 5, 5])
        blocking = await asyncio.to_thread(lambda: [t for o in handle.generate([6, 7], SamplingParams(max_tokens=5)) for t in o.token_ids])
        assert blocking == expected([6, 7], 5)
        await until_idle(handle, "everything has ended")


async def test_many_requests_travel_as_one_stream_with_an_item_a_step(pools: PoolMaker) -> None:
    await pools.open("ca-many", engine_options=SLOW)
    async with handle_of("ca-many") as handle:
        prompts = [[1 + n % 200, 9] for n in range(64)]
        got: dict[str, list[int]] = {}
        items = 0
        requests = [(prompt, SamplingParams(max_tokens=30, ignore_eos=True), {"request_id": str(n)}) for n, prompt in enumerate(prompts)]
        async for outputs in handle.generate_many(requests):
            items += 1
            for output in outputs:
                assert output.error is None
                got.setdefault(output.request_id, []).extend(output.token_ids)
        assert got == {str(n): expected(prompt, 30) for n, prompt in enumerate(prompts)}
        assert items < 64 * 30 / 4, "outputs that came together travel together"
        with pytest.raises(InvalidRequestError):
            [item async for item in handle.generate_many([([1], LONG, {}), ([], LONG, {})])]
        await until_idle(handle, "the request before the refused one was aborted")


async def test_a_slow_reader_gets_merged_outputs_and_holds_up_nobody(pools: PoolMaker) -> None:
    await pools.open("ca-slow", engine_options={**SLOW, "base_s": 0.001})
    async with handle_of("ca-slow") as handle:
        slow = handle.generate([1, 2, 3], SamplingParams(max_tokens=2000, ignore_eos=True))
        first = await anext(slow)
        others = [handle.generate([n], SamplingParams(max_tokens=200, ignore_eos=True)) for n in range(1, 40)]
        assert [o.token_ids for o in await asyncio.gather(*(s.collect() for s in others))] == [[n] * 200 for n in range(1, 40)]

        async def is_done() -> bool:
            return not await in_flight(handle)

        await eventually(is_done, "the engine is done while nobody reads")
        rest = [output async for output in slow]
        assert first.token_ids + [token for output in rest for token in output.token_ids] == expected([1, 2, 3], 2000)
        assert len(rest) < 20, "a few small items were under way, the rest is one"


async def test_leaving_a_stream_in_any_way_aborts_its_request(pools: PoolMaker) -> None:
    await pools.open("ca-leave", engine_options=SLOW)
    async with handle_of("ca-leave") as handle:
        # The first connects: a cancel, recursive as Ray's is, must not take the client's own calls of Ray with it.
        streams = [handle.generate([n], LONG) for n in range(1, 6)]
        await asyncio.gather(*(anext(stream) for stream in streams))
        assert await in_flight(handle) == 5
        ray.cancel(streams[0]._generator)
        streams[1].close()
        del streams[2]
        reading = asyncio.create_task(streams[2].collect())
        await asyncio.sleep(0)
        reading.cancel()
        await asyncio.gather(reading, return_exceptions=True)
        del reading
        streams.clear()
        await until_idle(handle, "all five were aborted")
        assert (await handle.generate([8], SamplingParams(max_tokens=2)).collect()).token_ids == [8, 8]


async def test_a_cancelled_read_loses_nothing(pools: PoolMaker) -> None:
    await pools.open("ca-cancel", engine_options=SLOW)
    async with handle_of("ca-cancel") as handle:
        stream = handle.generate([1, 2, 3, 4], SamplingParams(max_tokens=60, ignore_eos=True))
        got: list[int] = []
        while True:
            try:
                async with asyncio.timeout(0.004):
                    got += (await anext(stream)).token_ids
            except TimeoutError:
                continue
            except StopAsyncIteration:
                break
        assert got == expected([1, 2, 3, 4], 60)


async def test_added_requests_are_read_together_and_aborted_by_id(pools: PoolMaker) -> None:
    await pools.open("ca-added", engine_options=SLOW)
    async with handle_of("ca-added") as handle:
        short = await handle.add_requests([([n], SamplingParams(max_tokens=10), {}) for n in range(1, 9)])
        long = await handle.add_request([77], LONG)
        got: dict[str, list[int]] = {}
        ends: dict[str, Any] = {}
        while outputs := await handle.outputs():
            for output in outputs:
                got.setdefault(output.request_id, []).extend(output.token_ids)
                if output.finish_reason:
                    ends[output.request_id] = output.finish_reason
            if len(ends) == 8 and long not in ends:
                await handle.abort_requests([long, "nobody's"])
        assert {key: got[key] for key in short} == {key: [n] * 10 for n, key in enumerate(short, 1)}
        assert ends == {**dict.fromkeys(short, "length"), long: "abort"}
        with pytest.raises(InvalidRequestError, match="not attached"):
            await handle.actor.outputs.remote("a stranger", 1.0)


async def test_every_operation_is_a_method_made_from_the_table(pools: PoolMaker) -> None:
    await pools.open("ca-ops")
    async with handle_of("ca-ops") as handle:
        for operation in TABLE:
            assert hasattr(handle.actor, operation.name)
        assert await handle.actor.get_supported_tasks.remote() == ("generate",)
        assert await handle.actor.is_scheduler_paused.remote(rank=1, timeout_s=10) is False
        assert len(await handle.actor.collective_rpc.remote(method="stats")) == 2
        await handle.operations.pause_scheduler(mode="keep", clear_cache=False)
        assert await handle.operations.is_scheduler_paused() is True
        await handle.operations.resume_scheduler()
        assert await handle.call("is_scheduler_paused", rank=0) is False
        assert await handle.call_all("is_scheduler_paused") == {0: False, 1: False}
        assert await handle.call_agree("is_scheduler_paused") is False
        assert await handle.call_any("is_scheduler_paused") is False
        assert (await handle.scale_elastic_ep(1)).ranks == (0,)
        assert (await handle.status())["ranks"] == (0,)


async def test_errors_keep_their_types_and_fields(pools: PoolMaker) -> None:
    await pools.open("ca-errors")
    async with handle_of("ca-errors") as handle:
        with pytest.raises(InvalidRequestError) as refused:
            await handle.generate([], LONG, request_id="empty").collect()
        assert refused.value.request_id == "empty"
        with pytest.raises(InvalidRequestError) as refused:
            next(iter(handle.generate([1], SamplingParams(temperature=-1), request_id="cold")))
        assert refused.value.request_id == "cold"
        with pytest.raises(UnknownRankError):
            await handle.generate([1], data_parallel_rank=7).collect()
        with pytest.raises(RemoteCallError) as remote:
            await handle.call("collective_rpc", rank=1, method="raise_error", args=["KeyError", "lost"])
        assert (remote.value.method, remote.value.rank) == ("collective_rpc", 1)
        assert remote.value.remote_type == "KeyError"
        with pytest.raises(NotSupportedError):
            await handle.operations.reset_mm_cache()
        with pytest.raises(InvalidArgumentsError):
            await handle.operations.pause_scheduler(mode="sideways")
        with pytest.raises(UnknownOperationError):
            await handle.call_all("format_disk")
        with pytest.raises(InvalidRequestError):  # a bare Ray handle's error is Ray's and ours
            await handle.actor.add_requests.remote("stranger", [])


async def test_a_client_is_found_by_name_shared_and_listed(pools: PoolMaker) -> None:
    await pools.open("ca-name", engine_options=SLOW)
    with pytest.raises(PoolNotFoundError):
        raycore.client_actor("ca-no-such-pool")
    with pytest.raises(ConfigurationError, match="name"):
        raycore.client_actor("ca-name", "a/b")
    async with handle_of("ca-name", "front") as handle:
        again = raycore.client_actor("ca-name", "front")
        assert (await again.status())["pid"] == (await handle.status())["pid"]
        async with handle_of("ca-name", "other.one") as other:
            assert (await other.status())["pid"] != (await handle.status())["pid"]
            clients = (await asyncio.to_thread(raycore.pool_status, "ca-name"))["clients"]
            assert sorted(row["name"] for row in clients) == ["front", "other.one"]
            assert all(row["ranks"] == (0, 1) for row in clients)
        stream = handle.generate([1], LONG)
        await anext(stream)
        kept = again.generate([2], LONG)
        await anext(kept)
        handle.close()
        with pytest.raises(ClientClosedError):
            handle.generate([1])
        await eventually(lambda: _has(again, 1), "only the caller that left was aborted")
        again.close()


async def _has(handle: ClientHandle, count: int) -> bool:
    return await in_flight(handle) == count


async def test_a_handle_can_be_handed_to_a_task_which_is_a_caller_of_its_own(pools: PoolMaker) -> None:
    await pools.open("ca-task")

    @ray.remote(num_cpus=0)
    def ask(handle: ClientHandle) -> list[int]:
        return [token for output in handle.generate([3, 4], SamplingParams(max_tokens=6)) for token in output.token_ids]

    async with handle_of("ca-task") as handle:
        assert await ask.remote(handle) == expected([3, 4], 6)
        await eventually(lambda: _callers(handle, 0), "the task's process has left, or let go of its handle")


async def _callers(handle: ClientHandle, count: int) -> bool:
    return (await handle.status())["callers"] == count


CALLER = """
import asyncio, sys, ray, raycore
from raycore.sampling import SamplingParams
ray.init(address=sys.argv[1], log_to_driver=False, logging_level="ERROR")
async def main():
    handle = raycore.client_actor(sys.argv[2], "shared")
    streams = [handle.generate([n], SamplingParams(max_tokens=int(sys.argv[3]))) for n in range(1, 9)]
    await handle.add_requests([([50], SamplingParams(max_tokens=1_000_000), {})])
    firsts = await asyncio.gather(*(anext(s) for s in streams))
    print("reading", flush=True)
    rests = await asyncio.gather(*(s.collect() for s in streams))
    print(sorted({len(f.token_ids) + len(r.token_ids) for f, r in zip(firsts, rests)}), flush=True)
asyncio.run(main())
"""


@contextmanager
def caller_process(cluster: str, pool: str, tokens: int) -> Iterator[subprocess.Popen[str]]:
    with subprocess.Popen([sys.executable, "-c", CALLER, cluster, pool, str(tokens)], stdout=subprocess.PIPE, text=True) as process:
        try:
            yield process
        finally:
            process.kill()


async def test_a_dead_callers_requests_are_aborted_and_a_frozen_ones_are_not(pools: PoolMaker, cluster: str) -> None:
    await pools.open("ca-caller", engine_options=SLOW)
    async with handle_of("ca-caller", "shared") as handle:
        mine = handle.generate([99], LONG)
        await anext(mine)

        with caller_process(cluster, "ca-caller", 4000) as frozen:
            assert await asyncio.to_thread(frozen.stdout.readline) == "reading\n"  # type: ignore[union-attr]
            os.kill(frozen.pid, signal.SIGSTOP)
            await asyncio.sleep(FROZEN_S)
            os.kill(frozen.pid, signal.SIGCONT)
            shown, _ = await asyncio.to_thread(frozen.communicate, None, 60)
            assert shown == "[4000]\n"
        await eventually(lambda: _has(handle, 1), "the caller that ended has nothing left", DEAD_CALLER_S)
        with caller_process(cluster, "ca-caller", 1_000_000) as dead:
            assert await asyncio.to_thread(dead.stdout.readline) == "reading\n"  # type: ignore[union-attr]
            assert await in_flight(handle) == 10
            dead.kill()
            await eventually(lambda: _has(handle, 1), "the dead caller's requests were aborted", DEAD_CALLER_S)
        assert (await anext(mine)).token_ids, "others go on"
        mine.close()
        await until_idle(handle, "nothing is left")


async def test_a_client_actor_ends_with_its_pool_with_cleanup_or_by_its_handle(pools: PoolMaker) -> None:
    await pools.open("ca-ends")
    detached = raycore.client_actor("ca-ends", "stays", lifetime="detached")
    await detached.status()
    async with handle_of("ca-ends", "goes") as handle:
        await handle.status()

    async def only_one_stays() -> bool:  # Ray takes a moment to forget a name
        return [name.client for name in named_actors("ca-ends") if name.role is Role.CLIENT] == ["stays"]

    await eventually(only_one_stays, "the actor whose handle was left is gone")
    with pytest.raises(PoolError):
        await handle.call("is_scheduler_paused", rank=0)
    await pools.close()
    assert not named_actors("ca-ends")
    with pytest.raises(PoolError):
        await detached.status()
    await pools.open("ca-ends")
    again = raycore.client_actor("ca-ends", "stays", lifetime="detached")
    pid = (await again.status())["pid"]
    report = await asyncio.to_thread(cleanup, "ca-ends")
    assert "ca-ends/client/stays" in report.actors
    await eventually(lambda: _is_gone(pid), "its process is gone")


async def _is_gone(pid: int) -> bool:
    return is_gone(pid)


async def test_a_client_actor_sees_no_gpu_and_takes_no_cpu(pools: PoolMaker) -> None:
    await pools.open("ca-gpu")
    async with handle_of("ca-gpu") as handle:
        await handle.status()
        seen = await handle.actor.__ray_call__.remote(lambda _self: (os.environ["CUDA_VISIBLE_DEVICES"], "torch.cuda" in sys.modules))
        assert seen[0] == ""
        until_s = time.monotonic() + 10
        while ray.available_resources().get("CPU") != 6:
            assert time.monotonic() < until_s, ray.available_resources()
            await asyncio.sleep(0.05)
