"""Two-way load without a stall, and what a client leaves behind: nothing."""

from __future__ import annotations

import asyncio
import gc
import os
import random
import threading
import time
from collections import Counter
from typing import Any

import msgspec
import psutil
import pytest

from raycore.errors import CallTimeoutError
from raycore.sampling import SamplingParams
from raycore.tensors import SHARED_MEMORY_DIRECTORY
from tests.support.engine_process import Pool, client_of, expected, is_empty
from tests.support.waiting import LIMIT_S, until

LOAD_S = 60.0
STALL_S = 5.0
"""Nothing here takes more than milliseconds on an idle machine."""


class Load:
    """What four clients do to one engine until the time is over."""

    def __init__(self) -> None:
        self.until_s = time.monotonic() + LOAD_S
        self.done: Counter[str] = Counter()
        self._seen_s = time.monotonic()

    @property
    def goes_on(self) -> bool:
        return time.monotonic() < self.until_s

    def _progress(self, kind: str) -> None:
        self.done[kind] += 1
        self._seen_s = time.monotonic()

    async def stream(self, client: Any, generator: random.Random) -> None:
        while self.goes_on:
            prompt = [generator.randrange(300, 30_000) for _ in range(generator.randint(1, 40))]
            count = generator.randint(1, 120)
            output = await client.generate(prompt, SamplingParams(max_tokens=count)).collect()
            assert (output.token_ids, output.replayed) == (expected(prompt, count), False)
            self._progress("streams")

    async def abort(self, client: Any, generator: random.Random) -> None:
        while self.goes_on:
            prompt = [generator.randrange(300, 30_000)] * 3
            stream = client.generate(prompt, SamplingParams(max_tokens=100_000))
            for _ in range(generator.randint(0, 3)):
                await anext(stream)
            await client.abort_requests([stream.request_id])
            output = await stream.collect()
            assert output.finish_reason == "abort"
            assert set(output.token_ids) <= set(prompt)
            self._progress("aborts")

    async def call(self, client: Any, generator: random.Random) -> None:
        while self.goes_on:
            payload = bytes(generator.randrange(20_000))
            assert (await client.call("collective_rpc", rank=0, method="echo", args=[payload]))["args"] == [payload]
            self._progress("calls")

    async def time_out(self, client: Any, generator: random.Random) -> None:
        while self.goes_on:
            with pytest.raises(CallTimeoutError):
                await client.operations.pause_scheduler(mode="wait", timeout_s=generator.uniform(0.01, 0.05))
            self._progress("timeouts")
            before = self.done["streams"]
            await until(lambda before=before: self.done["streams"] > before or not self.goes_on, "streams go on after the pause")

    async def watch(self) -> None:
        while self.goes_on:
            assert time.monotonic() - self._seen_s < STALL_S, f"a stall after {self.done}"
            await asyncio.sleep(0.1)


async def test_a_minute_of_two_way_load_from_four_clients_without_a_stall(pool: Pool) -> None:
    load = Load()
    async with client_of(pool) as one, client_of(pool) as two, client_of(pool) as three, client_of(pool) as four:
        # somebody's long request keeps the engine busy, so that a waiting pause always has something to wait for
        busy = one.generate([1, 2], SamplingParams(max_tokens=1_000_000))
        await anext(busy)
        async with asyncio.timeout(LOAD_S + LIMIT_S), asyncio.TaskGroup() as group:
            group.create_task(load.watch())
            for number, client in enumerate((one, two, three, four)):
                for kind in (load.stream,) * 16 + (load.abort,) * 4 + (load.call,) * 4:
                    group.create_task(kind(client, random.Random(f"{number}{kind.__name__}")))
            group.create_task(load.time_out(four, random.Random(4)))
        await busy.aclose()
        for client in (one, two, three, four):
            assert client.in_flight() <= 1
            client.check_invariants()
        async with asyncio.timeout(LIMIT_S):
            while not await is_empty(one):
                await asyncio.sleep(0.01)
        assert pool.engine.state().requests == 0
        assert min(load.done.values()) > 10, load.done
        assert len(load.done) == 4


async def test_a_client_leaves_no_thread_descriptor_file_or_task(pool: Pool) -> None:
    me = psutil.Process()

    async def use() -> None:
        async with client_of(pool) as client:
            await asyncio.gather(*(client.generate([n], SamplingParams(max_tokens=3)).collect() for n in range(1, 50)))
            await client.call("collective_rpc", rank=0, method="echo", args=[b"x" * (1 << 20)])
            running = client.generate([1], SamplingParams(max_tokens=1_000_000))
            await anext(running)
            waiting = asyncio.ensure_future(client.operations.pause_scheduler(mode="wait"))
            await client.operations.is_scheduler_paused()
        assert isinstance((await asyncio.gather(waiting, return_exceptions=True))[0], Exception)

    await use()  # imports, the loop's executor and the like
    gc.collect()
    descriptors, threads, tasks = me.num_fds(), me.num_threads(), len(asyncio.all_tasks())
    sessions = pool.engine.state().sessions
    for _ in range(5):
        await use()
    gc.collect()
    await until(lambda: me.num_fds() <= descriptors, "descriptors are closed")
    await until(lambda: me.num_threads() <= threads, "threads have ended")
    assert len(asyncio.all_tasks()) == tasks
    assert not list(SHARED_MEMORY_DIRECTORY.glob(f"raycore-{pool.name}-{os.getpid()}-*"))
    await until(lambda: pool.engine.state().sessions <= sessions, "the engine has forgotten them")


async def test_a_client_whose_start_fails_leaves_nothing(pool: Pool) -> None:
    me = psutil.Process()
    member = msgspec.structs.replace(pool.engine.member, engine=msgspec.structs.replace(pool.engine.member.engine, incarnation="older"))
    membership = msgspec.structs.replace(pool.access.membership, members=(member,))
    stale = Pool(pool.engines, msgspec.structs.replace(pool.access, membership=membership), use_tcp=None)

    async def fail() -> None:
        with pytest.raises(Exception, match="refused the session"):
            await stale.client().start()

    await fail()
    descriptors, threads = me.num_fds(), threading.active_count()
    for _ in range(5):
        await fail()
    await until(lambda: me.num_fds() <= descriptors, "descriptors are closed")
    await until(lambda: threading.active_count() <= threads, "threads have ended")
    assert not list(SHARED_MEMORY_DIRECTORY.glob(f"raycore-{pool.name}-{os.getpid()}-*"))
