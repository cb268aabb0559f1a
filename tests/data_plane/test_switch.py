"""Standby groups beside live ones, with real Gloo groups and no Ray: switches under load, idle and paused; undone, lost, gone back from."""

from __future__ import annotations

import asyncio
import gc
from concurrent.futures import ThreadPoolExecutor

import msgspec
import pytest

from raycore import gloo
from raycore.errors import LockstepError, ScalingError
from raycore.groups import GroupKind, GroupSet, Reconfiguration
from raycore.ids import Epoch, GroupStamp, Term
from raycore.membership import GroupAddress, Membership
from raycore.participation import Stage
from raycore.sampling import SamplingParams
from raycore.waves import Phase
from tests.support.engine_process import expected
from tests.support.lockstep import LockstepPool, client_of, lockstep_pool
from tests.support.waiting import until

FEW = SamplingParams(max_tokens=5)


def held(pool: LockstepPool, rank: int) -> tuple[bool, bool, bool]:
    """Whether a rank holds live, standby and kept groups."""
    rack = pool.lockstep(rank)._rack
    return rack.live is not None, rack.standby is not None, rack.kept is not None


async def test_groups_stand_by_while_steps_go_on_and_all_switch_at_one_round_without_a_dropped_step() -> None:
    with lockstep_pool(3, base_s=0.001) as pool:
        pool.decide(0, 1)
        async with client_of(pool, 0, 1) as client:
            streams = [
                asyncio.ensure_future(client.generate([4, rank], SamplingParams(max_tokens=400), data_parallel_rank=rank).collect())
                for rank in (0, 1)
            ]
            await until(lambda: pool.lockstep(0).is_stepping, "the wave runs")
            broken = [pool.lockstep(rank).counters.broken for rank in range(3)]
            then = await asyncio.to_thread(pool.prepare, 0, 1, 2)
            assert [held(pool, rank) for rank in range(3)] == [(True, True, False), (True, True, False), (False, True, False)]
            assert pool.lockstep(0).wave.stamp.epoch == 2
            pool.go(then)
            await until(lambda: all(pool.lockstep(rank).wave.stamp.epoch == 3 for rank in range(3)), "all have switched")
            assert [held(pool, rank)[2] for rank in range(2)] == [True, True]
            await asyncio.to_thread(pool.confirmed, then)
            await until(lambda: [held(pool, rank) for rank in range(3)] == [(True, False, False)] * 3, "old groups are gone")
            assert [output.token_ids for output in await asyncio.gather(*streams)] == [expected([4, rank], 400) for rank in (0, 1)]
            assert [pool.lockstep(rank).counters.broken for rank in range(3)] == broken
            assert all(pool.hosts[rank].reconfigurer.state.stage is Stage.NONE for rank in range(3))
        async with client_of(pool, 2) as client:
            assert (await client.generate([9], FEW).collect()).token_ids == expected([9], 5)


async def test_an_idle_pool_switches_too_and_the_lowest_rank_may_leave() -> None:
    with lockstep_pool(3) as pool:
        then = await asyncio.to_thread(pool.prepare, 1, 2)
        pool.go(then)
        await asyncio.to_thread(pool.confirmed, then)
        await until(lambda: held(pool, 0) == (False, False, False), "the leaver holds no group")
        assert pool.steps() == [(0, 0)] * 3, "a vote has rounds, and no step"
        async with client_of(pool, 1, 2) as client:
            assert (await client.generate([3, 4], FEW, data_parallel_rank=2).collect()).token_ids == expected([3, 4], 5)


async def test_a_paused_pool_switches_and_gives_no_token() -> None:
    with lockstep_pool(3, base_s=0.001) as pool:
        pool.decide(0, 1)
        async with client_of(pool, 0, 1) as client:
            stream = client.generate([1, 2], SamplingParams(max_tokens=200), data_parallel_rank=0)
            await anext(stream)
            await client.operations.pause_scheduler(mode="keep")
            steps = pool.steps()
            then = await asyncio.to_thread(pool.prepare, 0, 1, 2)
            pool.go(then)
            await asyncio.to_thread(pool.confirmed, then)
            assert pool.steps() == steps
            await client.operations.resume_scheduler()
            rest = (await stream.collect()).token_ids
            assert rest == expected([1, 2], 200)[-len(rest) :]


async def test_what_is_undone_leaves_nothing_and_the_next_one_works() -> None:
    with lockstep_pool(3) as pool:
        pool.decide(0, 1)
        await asyncio.to_thread(pool.prepare, 0, 1, 2, operation="first")
        for rank in range(3):
            pool.hosts[rank].reconfigurer.undo("first", Term(1))
        await until(
            lambda: [held(pool, rank) for rank in range(3)] == [(True, False, False)] * 2 + [(False, False, False)], "all is dropped"
        )
        pool.skip_epoch()
        with pytest.raises(ScalingError, match="was undone here"):
            await asyncio.to_thread(pool.prepare, 0, 1, 2, operation="first")
        then = await asyncio.to_thread(pool.prepare, 0, 1, 2, operation="second")
        pool.go(then, operation="second")
        await asyncio.to_thread(pool.confirmed, then)


async def test_an_undo_ends_the_wait_of_those_who_still_build() -> None:
    """The joiner does not come; the others wait for it in their stores, which the undo closes."""
    with lockstep_pool(3) as pool:
        pool.decide(0, 1)
        with ThreadPoolExecutor(1) as threads:
            building = threads.submit(pool.prepare, 0, 1, 2, operation="alone", absent=(2,))
            await until(lambda: pool.hosts[0].reconfigurer.state.stage is Stage.PREPARING, "rank 0 builds")
            for rank in (0, 1):
                pool.hosts[rank].reconfigurer.undo("alone", Term(1))
            with pytest.raises((LockstepError, ScalingError)):
                await asyncio.to_thread(building.result, 20)
        async with client_of(pool, 0, 1) as client:
            assert (await client.generate([5], FEW, data_parallel_rank=1).collect()).token_ids == expected([5], 5)


async def test_a_joiner_lost_at_the_switch_takes_the_others_back_to_the_groups_that_they_kept() -> None:
    with lockstep_pool(3, base_s=0.001) as pool:
        before = pool.decide(0, 1)
        assert before.group is not None
        async with client_of(pool, 0, 1) as client:
            stream = asyncio.ensure_future(client.generate([6, 7], SamplingParams(max_tokens=400), data_parallel_rank=1).collect())
            await until(lambda: pool.lockstep(0).is_stepping, "the wave runs")
            then = await asyncio.to_thread(pool.prepare, 0, 1, 2)
            live = pool.lockstep(0)._rack.live
            pool.end(2)
            pool.go(then)
            await until(lambda: pool.lockstep(0).wave.stamp.epoch == 3, "rank 0 has switched")
            back = msgspec.structs.replace(before.group, stamp=GroupStamp(Epoch(4), Term(1)), goes_back=True)
            pool.membership = Membership(pool.name, Epoch(4), Term(1), before.members, group=back)
            for rank in (0, 1):
                pool.hosts[rank].set_membership(pool.membership)
            assert (await stream).token_ids == expected([6, 7], 400)
            await until(lambda: all(pool.lockstep(rank).wave.stamp.epoch == 4 for rank in (0, 1)), "both are back")
            assert pool.lockstep(0)._rack.live is live
            await until(lambda: [held(pool, rank) for rank in (0, 1)] == [(True, False, False)] * 2, "what was for the switch is gone")


async def test_a_joiner_lost_before_anyone_was_told_to_go_takes_them_back_by_the_same_vote() -> None:
    with lockstep_pool(3) as pool:
        before = pool.decide(0, 1)
        assert before.group is not None
        then = await asyncio.to_thread(pool.prepare, 0, 1, 2)
        for rank in range(3):
            pool.hosts[rank].keep_decision("op", Term(1), then)
        pool.end(2)
        back = msgspec.structs.replace(before.group, stamp=GroupStamp(Epoch(4), Term(1)), goes_back=True)
        pool.membership = Membership(pool.name, Epoch(4), Term(1), before.members, group=back)
        for rank in (0, 1):
            pool.hosts[rank].set_membership(pool.membership)
        await until(lambda: all(pool.lockstep(rank).wave.stamp.epoch == 4 for rank in (0, 1)), "both are back")
        await until(lambda: [held(pool, rank) for rank in (0, 1)] == [(True, False, False)] * 2, "what was for the switch is gone")
        async with client_of(pool, 0, 1) as client:
            assert (await client.generate([5], FEW, data_parallel_rank=1).collect()).token_ids == expected([5], 5)


async def test_a_leaver_that_dies_after_the_decision_lets_the_others_switch_without_its_vote() -> None:
    with lockstep_pool(3, base_s=0.001) as pool:
        async with client_of(pool, 0, 1) as client:
            stream = asyncio.ensure_future(client.generate([6, 7], SamplingParams(max_tokens=300), data_parallel_rank=1).collect())
            await until(lambda: pool.lockstep(0).is_stepping, "the wave runs")
            then = await asyncio.to_thread(pool.prepare, 0, 1)
            pool.go(then, without=(2,))
            pool.end(2)
            await asyncio.to_thread(pool.confirmed, then)
            assert (await stream).token_ids == expected([6, 7], 300)


async def test_a_higher_term_fences_an_old_controller_and_drops_what_it_prepared() -> None:
    with lockstep_pool(2) as pool:
        before = pool.decide(0)
        then = await asyncio.to_thread(pool.prepare, 0, 1)
        taken_over = msgspec.structs.replace(before, term=Term(2))
        for rank in range(2):
            pool.hosts[rank].set_membership(taken_over)
        await until(lambda: held(pool, 0) == (True, False, False), "what the old one prepared is dropped")
        with pytest.raises(ScalingError, match="has taken over"):
            pool.hosts[0].keep_decision("op", Term(1), then)
        assert pool.hosts[0].set_membership(then) == taken_over
        pool.membership = taken_over


class Recorder:
    """An engine's side of a switch: what it was told, in order."""

    def __init__(self) -> None:
        self.told: list[str] = []
        self.fails = False

    def prepare(self, reconfiguration: Reconfiguration, groups: GroupSet) -> None:
        assert groups.stamp == reconfiguration.stamp
        self.told.append(f"prepare {list(reconfiguration.before)} {list(reconfiguration.ranks)}")
        if self.fails:
            raise LockstepError("no room for the experts")

    def switch(self) -> None:
        self.told.append("switch")

    def switch_back(self) -> None:
        self.told.append("switch back")

    def release(self) -> None:
        self.told.append("release")

    def drop(self) -> None:
        self.told.append("drop")


async def test_an_engine_takes_part_by_its_hooks_and_its_failure_undoes() -> None:
    with lockstep_pool(2) as pool:
        pool.decide(0)
        recorder = Recorder()
        pool.hosts[0].reconfigurer._elastic = pool.lockstep(0)._rack._elastic = recorder
        recorder.fails = True
        with pytest.raises(LockstepError, match="no room"):
            await asyncio.to_thread(pool.prepare, 0, 1, operation="full")
        pool.hosts[1].reconfigurer.undo("full", Term(1))
        await until(lambda: len(recorder.told) == 2, "it is told to drop")
        recorder.fails = False
        pool.skip_epoch()
        then = await asyncio.to_thread(pool.prepare, 0, 1)
        pool.go(then)
        await asyncio.to_thread(pool.confirmed, then)
        await until(lambda: recorder.told[-1] == "release", "it lets go of the old")
        assert recorder.told == ["prepare [0] [0, 1]", "drop", "prepare [0] [0, 1]", "switch", "release"]
        assert pool.lockstep(0).wave.phase in (Phase.RESTING, Phase.STEPPING)
    gc.collect()


def test_who_comes_to_a_store_that_was_undone_is_told_so_and_does_not_ask_on() -> None:
    store = gloo.GroupStore(gloo.LOOPBACK, limit_s=30)
    address = GroupAddress(GroupStamp(Epoch(2), Term(1)), store.host, {GroupKind.DP: store.port})
    assert gloo.connect(address, GroupKind.DP, form_s=30) is not None
    store.close()
    with pytest.raises(LockstepError, match="its store cannot be reached"):
        gloo.connect(address, GroupKind.DP, form_s=30)
