"""Sleep and wake-up through a client: all ranks or none, one rank by name, and what becomes of requests and of other callers' pauses."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import pytest

from raycore.errors import CallTimeoutError, EngineStateError, InvalidArgumentsError, NotSupportedError, RemoteCallError
from raycore.sampling import SamplingParams
from tests.support.scripted import Rig, ScriptedEngine, memory_client

LONG = SamplingParams(max_tokens=1_000_000)
SHORT = SamplingParams(max_tokens=3)
LIMIT_S = 20.0


class SleepyEngine(ScriptedEngine):
    """Keeps what is away as the torch engine does, and refuses to step meanwhile."""

    def __init__(self) -> None:
        super().__init__()
        self.away: set[str] = set()
        self.level = 0
        self.on_sleep: Callable[[], None] = lambda: None
        self.on_wake: Callable[[], None] = lambda: None
        self.methods = {"sleep": self._sleep, "wake_up": self._wake_up, "reset_prefix_cache": lambda **_arguments: True}
        self.rpc["memory_stats"] = lambda: {"weights_bytes": 0 if "weights" in self.away else 100}

    def step(self) -> Any:
        assert not self.away, "a step of a sleeping engine"
        return super().step()

    def idle_step(self) -> None:
        assert not self.away, "a dummy step of a sleeping engine"
        super().idle_step()

    def _sleep(self, level: int) -> None:
        self.on_sleep()
        self.level, self.away = level, {"weights", "kv_cache"}

    def _wake_up(self, tags: list[str] | None) -> bool:
        if not self.away:
            raise EngineStateError("the engine is awake: there is nothing to wake up")
        self.on_wake()
        self.away -= set(tags or self.away)
        return not self.away


def two_rigs() -> tuple[list[SleepyEngine], list[Rig]]:
    engines = [SleepyEngine(), SleepyEngine()]
    return engines, [Rig(engine, rank=rank) for rank, engine in enumerate(engines)]


def fail(error: Exception) -> Callable[[], None]:
    def raise_it() -> None:
        raise error

    return raise_it


async def tokens_of(client: Any, **options: Any) -> list[int]:
    return (await asyncio.wait_for(client.generate([5, 6], SHORT, **options).collect(), LIMIT_S)).token_ids


async def is_serving(client: Any) -> bool:
    return [await tokens_of(client, data_parallel_rank=rank) for rank in (0, 1)] == [[5, 6, 5]] * 2


@pytest.mark.parametrize("level", [0, 1, 2])
async def test_a_frozen_request_goes_on_and_one_that_came_meanwhile_is_served(level: int) -> None:
    engines, rigs = two_rigs()
    async with memory_client(*rigs) as client:
        frozen = [client.generate([rank + 1], SamplingParams(max_tokens=2000), data_parallel_rank=rank) for rank in (0, 1)]
        first = [await anext(stream) for stream in frozen]
        assert await client.operations.sleep(level=level, mode="keep") is None
        assert await client.operations.is_sleeping() is True
        assert await client.operations.is_scheduler_paused() is True
        assert [engine.level for engine in engines] == [level, level]
        late = asyncio.create_task(tokens_of(client))
        with pytest.raises(EngineStateError, match="call wake_up"):
            await client.operations.resume_scheduler()
        with pytest.raises(EngineStateError, match="call wake_up"):
            await client.operations.execute_dummy_batch()
        if level:
            assert await client.operations.wake_up(tags=["weights"]) is False
            assert await client.operations.is_sleeping() is True
        assert not late.done()
        assert await client.operations.wake_up() is True
        assert await client.operations.is_sleeping() is False
        assert await client.operations.is_scheduler_paused() is False
        assert await late == [5, 6, 5]
        rest = [await asyncio.wait_for(stream.collect(), LIMIT_S) for stream in frozen]
        for rank in (0, 1):
            assert first[rank].token_ids + rest[rank].token_ids == [rank + 1] * 2000


@pytest.mark.parametrize(("mode", "reason"), [("abort", "abort"), ("wait", "length")])
async def test_running_requests_end_as_the_mode_says_before_the_engine_sleeps(mode: str, reason: str) -> None:
    engines, rigs = two_rigs()
    async with memory_client(*rigs) as client:
        count = 1_000_000 if mode == "abort" else 50
        stream = client.generate([7], SamplingParams(max_tokens=count))
        await anext(stream)
        for engine in engines:
            engine.on_sleep = lambda engine=engine: fail(AssertionError("it had work"))() if engine.has_work() else None
        await client.operations.sleep(mode=mode)
        assert (await stream.collect()).finish_reason == reason
        assert await client.operations.wake_up() is True
        assert await is_serving(client)


async def test_a_pause_that_was_there_before_a_sleep_outlasts_it() -> None:
    _, rigs = two_rigs()
    async with memory_client(*rigs) as client:
        await client.operations.pause_scheduler(mode="keep")
        await client.operations.sleep()
        assert await client.operations.wake_up() is True
        assert await client.operations.is_scheduler_paused() is True
        await client.operations.resume_scheduler()
        assert await is_serving(client)


async def test_a_second_sleep_and_a_wake_up_of_the_awake_change_nothing() -> None:
    engines, rigs = two_rigs()
    async with memory_client(*rigs) as client:
        with pytest.raises(EngineStateError, match="awake: there is nothing to wake up"):
            await client.operations.wake_up()
        stream = client.generate([7], LONG)
        await anext(stream)
        await client.operations.sleep(level=1, mode="keep")
        with pytest.raises(EngineStateError, match="sleeps already, at level 1: call wake_up"):
            await client.operations.sleep(level=2, mode="abort")
        assert sum(len(engine.requests) for engine in engines) == 1, "the refused sleep aborted what was frozen"
        await client.operations.wake_up()
        await anext(stream)
        await stream.aclose()


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("sleep", {"level": 3}),
        ("sleep", {"level": "1"}),
        ("sleep", {"mode": "hard"}),
        ("sleep", {"depth": 1}),
        ("wake_up", {"tags": ["weight"]}),
        ("wake_up", {"tags": "weights"}),
        ("is_sleeping", {"rank_": 1}),
    ],
)
async def test_wrong_arguments_are_refused_before_anything_is_paused(name: str, arguments: dict[str, Any]) -> None:
    _, rigs = two_rigs()
    async with memory_client(*rigs) as client:
        with pytest.raises(InvalidArgumentsError, match=name):
            await getattr(client.operations, name)(**arguments)
        assert await client.operations.is_scheduler_paused() is False


async def test_an_engine_that_cannot_sleep_is_not_paused_for_it() -> None:
    rigs = [Rig(rank=0), Rig(rank=1)]
    async with memory_client(*rigs) as client:
        with pytest.raises(NotSupportedError, match="sleep at level 1 is not supported by the engine 'scripted'; level 0 only pauses"):
            await client.operations.sleep()
        assert await client.operations.is_scheduler_paused() is False
        await client.operations.sleep(level=0)
        assert await client.operations.is_sleeping() is True
        assert await client.operations.wake_up() is True
        assert await is_serving(client)


async def test_when_one_rank_cannot_fall_asleep_none_does() -> None:
    engines, rigs = two_rigs()
    engines[1].on_sleep = fail(MemoryError("no room on the host"))
    async with memory_client(*rigs) as client:
        with pytest.raises(RemoteCallError, match="sleep on rank 1 raised MemoryError: no room"):
            await client.operations.sleep()
        assert [engine.away for engine in engines] == [set(), set()]
        assert await client.operations.is_sleeping() is False
        assert await is_serving(client)
        with pytest.raises(RemoteCallError, match="no room"):
            await client.call("sleep", rank=1)
        assert await is_serving(client)


async def test_a_rank_that_cannot_wake_up_stays_asleep_and_can_be_woken_later() -> None:
    engines, rigs = two_rigs()
    async with memory_client(*rigs) as client:
        await client.operations.sleep(level=2)
        engines[0].on_wake = fail(EngineStateError("the checkpoint is gone"))
        with pytest.raises(EngineStateError, match="the checkpoint is gone"):
            await client.operations.wake_up()
        assert (engines[0].away, engines[1].away) == ({"weights", "kv_cache"}, set())
        assert await client.operations.is_scheduler_paused() is True
        engines[0].on_wake = lambda: None
        assert await client.operations.wake_up() is True
        assert await is_serving(client)


async def test_a_cancelled_sleep_is_taken_back() -> None:
    engines, rigs = two_rigs()
    async with memory_client(*rigs) as client:
        stream = client.generate([7], LONG)
        await anext(stream)
        with pytest.raises(CallTimeoutError):
            await client.operations.sleep(mode="wait", timeout_s=0.05)
        assert await client.operations.is_sleeping() is False
        assert await client.operations.is_scheduler_paused() is False
        sleeping = asyncio.create_task(client.operations.sleep(mode="keep"))
        while not any(engine.away for engine in engines):
            await asyncio.sleep(0)
        sleeping.cancel()
        with pytest.raises(asyncio.CancelledError):
            await sleeping
        assert [engine.away for engine in engines] == [set(), set()]
        await anext(stream)
        await stream.aclose()


@pytest.mark.parametrize("mode", ["keep", "wait", "abort"])
async def test_one_rank_sleeps_alone_and_the_other_serves(mode: str) -> None:
    engines, rigs = two_rigs()
    async with memory_client(*rigs) as client:
        stream = client.generate([7], SamplingParams(max_tokens=40), data_parallel_rank=1)
        await anext(stream)
        await client.call("sleep", rank=1, mode=mode)
        assert [bool(engine.away) for engine in engines] == [False, True]
        assert await tokens_of(client, data_parallel_rank=0) == [5, 6, 5]
        with pytest.raises(EngineStateError, match="call wake_up"):
            await client.call("resume_scheduler", rank=1)
        with pytest.raises(EngineStateError, match="call wake_up"):
            await client.operations.resume_scheduler()
        late = asyncio.create_task(tokens_of(client, data_parallel_rank=1))
        assert await client.call("wake_up", rank=1, tags=["weights"]) is False
        assert await client.call("wake_up", rank=1) is True
        assert await late == [5, 6, 5]
        assert (await stream.collect()).finish_reason == ("abort" if mode == "abort" else "length")
        assert await is_serving(client)


async def test_waking_all_wakes_the_one_that_sleeps() -> None:
    engines, rigs = two_rigs()
    async with memory_client(*rigs) as client:
        await client.call("sleep", rank=0)
        assert await client.operations.wake_up() is True
        assert not engines[0].away
        assert await is_serving(client)


async def test_what_a_rank_holds_and_whether_it_sleeps_is_in_its_beats() -> None:
    _, rigs = two_rigs()
    async with memory_client(*rigs) as client:
        await client.operations.sleep()
        progress = [rig.core.progress for rig in rigs]
        assert [(p.is_sleeping, p.memory) for p in progress] == [(True, {"weights_bytes": 0})] * 2
        await client.operations.wake_up()
        assert [(p.is_sleeping, p.memory) for p in progress] == [(False, {"weights_bytes": 100})] * 2
        rigs[0].engine.rpc["memory_stats"] = fail(ValueError("broken"))
        await client.call("reset_prefix_cache", rank=0)
        assert await is_serving(client)
