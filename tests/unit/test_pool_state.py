"""A rank that joins is like the others: whatever is called at whatever moment of its joining, on engine cores without a pool."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from raycore import pool_state
from raycore.client.client import EngineCoreClient
from raycore.ids import Epoch, Term
from raycore.membership import Membership
from raycore.operations import TABLE, AddLoraArguments, FanOut, LoraIdArguments, WakeReport, WakeUpArguments
from raycore.pool_state import LoraState, PoolState, SleepState
from raycore.sampling import SamplingParams
from tests.support.scripted import POOL, Rig, memory_client
from tests.support.stateful import StatefulEngine
from tests.support.waiting import until

LIMIT_S = 20.0


class Joining:
    """Two members, and a third rank that comes to join them step by step."""

    def __init__(self) -> None:
        self.engines = [StatefulEngine() for _ in range(3)]
        self.rigs = [Rig(engine, rank=rank, is_member=rank < 2) for rank, engine in enumerate(self.engines)]
        self._epoch = 2

    def announce(self) -> None:
        """Members are told; the client hears of it from them."""
        self._set((0, 1), joining=(2,), told=(0, 1, 2))

    def announce_to(self, *told: int) -> None:
        """Some members are told before the others."""
        self._set((0, 1), joining=(2,), told=told)

    async def take(self) -> None:
        wanted = await self.state(0)
        has = await asyncio.wait_for(asyncio.wrap_future(self.rigs[2].core.take_pool_state(wanted)), LIMIT_S)
        assert has.agrees_with(wanted) or has.version > wanted.version

    def commit(self) -> None:
        self._set((0, 1, 2), joining=(), told=(0, 1, 2))

    async def state(self, rank: int) -> PoolState:
        return await asyncio.wait_for(asyncio.wrap_future(self.rigs[rank].core.pool_state()), LIMIT_S)

    async def check_alike(self) -> None:
        states = [await self.state(rank) for rank in range(3)]
        assert states[2].agrees_with(states[0]), pool_state.differences(states[2], states[0])
        assert self.engines[2].what_it_is() == self.engines[0].what_it_is() == self.engines[1].what_it_is()
        stamps = {rig.core._desk.pause.stamp for rig in self.rigs}
        assert len(stamps) == 1, stamps

    def _set(self, members: tuple[int, ...], joining: tuple[int, ...], told: tuple[int, ...]) -> None:
        self._epoch += 1
        of = [rig.member for rig in self.rigs]
        found = Membership(POOL, Epoch(self._epoch), Term(1), tuple(of[i] for i in members), joining=tuple(of[i] for i in joining))
        for rank in told:
            self.rigs[rank].core.set_membership(found)


CALLS: list[tuple[str, dict[str, Any]]] = [
    ("add_lora", {"lora_id": 7, "name": "seven", "path": "/7"}),
    ("remove_lora", {"lora_id": 1}),
    ("pin_lora", {"lora_id": 1}),
    ("set_weight_version", {"version": "two"}),
    ("pause_scheduler", {"mode": "keep"}),
    ("pause_scheduler", {"mode": "wait"}),
    ("sleep", {"level": 1}),
    ("reset_prefix_cache", {}),
]
MOMENTS = ("before", "announced", "half announced", "taken", "committed")


async def knows(client: EngineCoreClient, joining: Joining) -> None:
    await until(lambda: client.membership.epoch == joining._epoch, "the client knows the membership", LIMIT_S)


@pytest.mark.parametrize("moment", MOMENTS)
@pytest.mark.parametrize(("method", "arguments"), CALLS, ids=[f"{name}-{'-'.join(map(str, given.values()))}" for name, given in CALLS])
async def test_what_is_called_at_any_moment_of_joining_is_so_on_every_rank(moment: str, method: str, arguments: dict[str, Any]) -> None:
    joining = Joining()
    async with memory_client(*joining.rigs, members=2) as client:
        await client.operations.add_lora(lora_id=1, name="one", path="/1")

        async def call() -> None:
            await client.call_operation(method, None, LIMIT_S, arguments)

        if moment == "before":
            await call()
        if moment == "half announced":  # rank 0 carries it out before it knows, rank 1 when it does
            joining.announce_to(1)
            calling = asyncio.create_task(call())
            await until(lambda: client.membership.epoch == joining._epoch, "rank 1 tells", LIMIT_S)
        joining.announce()
        if moment == "announced":
            calling = asyncio.create_task(call())
            await knows(client, joining)
        await joining.take()
        if moment in {"announced", "half announced"}:
            await asyncio.wait_for(calling, LIMIT_S)
        if moment == "taken":
            await call()
        joining.commit()
        if moment == "committed":
            await call()
        await knows(client, joining)
        await joining.check_alike()
        assert client.ranks() == (0, 1, 2)


@pytest.mark.parametrize("moment", ["announced", "taken"])
async def test_a_joiner_gets_no_requests_and_gives_no_results(moment: str) -> None:
    joining = Joining()
    async with memory_client(*joining.rigs, members=2) as client:
        joining.announce()
        if moment == "taken":
            await joining.take()
        await knows(client, joining)
        streams = [client.generate([5, 6], SamplingParams(max_tokens=2)) for _ in range(6)]
        await asyncio.wait_for(asyncio.gather(*(stream.collect() for stream in streams)), LIMIT_S)
        assert {stream.rank for stream in streams} == {0, 1}
        assert client.ranks() == (0, 1)
        assert set(await client.call_all("is_scheduler_paused")) == {0, 1}
        assert joining.engines[2].log == []


@pytest.mark.parametrize("level", [0, 1, 2])
async def test_a_rank_that_joins_a_sleeping_pool_sleeps_and_wakes_with_it(level: int) -> None:
    joining = Joining()
    async with memory_client(*joining.rigs, members=2) as client:
        await client.operations.sleep(level=level)
        if level:
            assert not await client.operations.wake_up(tags=["weights"])
        joining.announce()
        await joining.take()
        joining.commit()
        await knows(client, joining)
        await joining.check_alike()
        stream = client.generate([5, 6], SamplingParams(max_tokens=2), data_parallel_rank=2)
        assert await client.operations.is_sleeping()
        assert joining.engines[2].log == []
        assert await client.operations.wake_up()
        assert (await asyncio.wait_for(stream.collect(), LIMIT_S)).token_ids == [5, 6]
        await joining.check_alike()


async def test_a_rank_that_joins_a_paused_pool_serves_after_the_resume() -> None:
    joining = Joining()
    async with memory_client(*joining.rigs, members=2) as client:
        await client.operations.pause_scheduler(mode="keep")
        joining.announce()
        await joining.take()
        joining.commit()
        await knows(client, joining)
        stream = client.generate([5, 6], SamplingParams(max_tokens=2), data_parallel_rank=2)
        assert await client.operations.is_scheduler_paused()
        assert joining.engines[2].log == []
        await client.operations.resume_scheduler()
        assert (await asyncio.wait_for(stream.collect(), LIMIT_S)).token_ids == [5, 6]


async def test_a_call_that_the_state_has_already_is_not_done_again() -> None:
    joining = Joining()
    async with memory_client(*joining.rigs, members=2) as client:
        joining.announce()
        await knows(client, joining)
        calling = asyncio.create_task(client.operations.add_lora(lora_id=7, name="seven", path="/7"))
        await until(lambda: 7 in joining.engines[0].loras and 7 in joining.engines[1].loras, "the members have it", LIMIT_S)
        await joining.take()
        assert await asyncio.wait_for(calling, LIMIT_S)
        assert joining.engines[2].calls == ["add_lora"]


async def test_what_one_rank_was_told_alone_is_not_the_pools_state() -> None:
    joining = Joining()
    async with memory_client(*joining.rigs, members=2) as client:
        await client.call("set_weight_version", rank=0, version="mine")
        joining.announce()
        await joining.take()
        assert joining.engines[2].version is None


async def test_an_adapter_that_made_room_is_no_part_of_the_state() -> None:
    joining = Joining()
    for engine in joining.engines:
        engine._max_loras = 1
    async with memory_client(*joining.rigs, members=2) as client:
        for lora_id in (1, 2):
            await client.operations.add_lora(lora_id=lora_id, name=f"n{lora_id}", path=f"/{lora_id}")
        joining.announce()
        await joining.take()
        assert joining.engines[2].calls == ["add_lora"]
        assert set(joining.engines[2].loras) == {2}


async def test_a_state_that_cannot_be_taken_is_raised_and_the_joiner_stays_out() -> None:
    joining = Joining()
    async with memory_client(*joining.rigs, members=2):
        wanted = PoolState(version=1, loras=(LoraState(1, "one", "/missing"),))
        with pytest.raises(FileNotFoundError):
            await asyncio.wait_for(asyncio.wrap_future(joining.rigs[2].core.take_pool_state(wanted)), LIMIT_S)
        assert not (await joining.state(2)).agrees_with(wanted)


async def test_a_pause_asked_for_during_sleep_outlasts_the_sleep() -> None:
    joining = Joining()
    async with memory_client(*joining.rigs[:2]) as client:
        await client.operations.sleep(level=1)
        await client.operations.pause_scheduler(mode="keep")
        assert await client.operations.wake_up()
        assert await client.operations.is_scheduler_paused()
        stream = client.generate([5, 6], SamplingParams(max_tokens=2))
        await client.operations.resume_scheduler()
        assert (await asyncio.wait_for(stream.collect(), LIMIT_S)).token_ids == [5, 6]


async def test_ranks_woken_in_parts_agree_only_when_the_same_parts_are_back() -> None:
    asleep = PoolState(sleep=SleepState(1, resumes=True))
    woken = pool_state.after(asleep, "a", "wake_phase", WakeUpArguments(tags=["weights"]), WakeReport(is_awake=False))
    assert not woken.agrees_with(asleep)
    assert pool_state.after(woken, "b", "wake_phase", WakeUpArguments(), WakeReport(is_awake=True)).sleep is None


def test_an_adapter_that_could_not_be_removed_or_was_added_twice_counts_once() -> None:
    state = PoolState()
    for call in ("a", "b"):
        state = pool_state.after(state, call, "add_lora", AddLoraArguments(lora_id=1, name="one", path="/1"), result=True)
    state = pool_state.after(state, "c", "pin_lora", LoraIdArguments(lora_id=1), result=True)
    assert state.loras == (LoraState(1, "one", "/1", is_pinned=True),)
    assert [method for method, _ in pool_state.calls_before_pause(state)] == ["add_lora", "pin_lora"]
    assert pool_state.after(state, "d", "remove_lora", LoraIdArguments(lora_id=1), result=True).loras == ()


def test_every_operation_that_changes_engines_is_in_the_state_or_leaves_nothing_behind() -> None:
    leaves_nothing = {"reset_prefix_cache", "reset_mm_cache", "reset_encoder_cache", "release_kv_cache_memory"}
    in_phases = {operation.name for operation in TABLE if operation.changes_engine and operation.fan_out is FanOut.TOGETHER}
    assert in_phases == {"pause_scheduler", "resume_scheduler", "sleep", "wake_up"}
    recorded = {"add_lora", "remove_lora", "pin_lora", "set_weight_version"}
    assert {operation.name for operation in TABLE if operation.changes_engine} == leaves_nothing | in_phases | recorded
