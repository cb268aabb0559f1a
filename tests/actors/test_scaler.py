"""The driver of operations on a topology in memory: what an undo that took too long does beside the next operation."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Sequence
from typing import Any

import pytest

from actors.fleet import EngineRecord
from actors.pool_observer import NobodyWatches
from actors.roster import first_membership
from actors.scaling import PoolScaler
from raycore.config import Timeouts
from raycore.engine import EngineInfo
from raycore.errors import CapacityError, PoolError, ScalingError
from raycore.ids import EngineId, Incarnation, Rank
from raycore.membership import Endpoints, Member, Membership, MemberState

INFO = EngineInfo("echo", "echo", 257, 64, 64, ("generate",))
QUICK = Timeouts(control_s=0.1, stop_s=0.02)
LIMIT_S = 20.0


class Call:
    """An actor's method that is answered when the test says so; one that is given up holds on until then, too."""

    def __init__(self) -> None:
        self.is_called = asyncio.Event()
        self.is_answered = asyncio.Event()

    def remote(self, *_arguments: Any) -> asyncio.Future[Any]:
        return asyncio.ensure_future(self._answer())

    async def _answer(self) -> None:
        self.is_called.set()
        while not self.is_answered.is_set():
            with contextlib.suppress(asyncio.CancelledError):
                await self.is_answered.wait()


class Handle:
    def __init__(self) -> None:
        self.set_membership = Call()
        self.drain = Call()
        self.drain.is_answered.set()


class FakeFleet:
    """Engine cores that start at once."""

    def __init__(self) -> None:
        self.disposed: list[EngineRecord] = []
        self.retired: list[EngineRecord] = []
        self.started: list[EngineRecord] = []

    takes_turns = False
    is_full = False

    def beside_steps(self) -> contextlib.AbstractAsyncContextManager[None]:
        return contextlib.nullcontext()

    def new_record(self, rank: Rank) -> EngineRecord:
        return record_of(rank, f"i{len(self.started)}")

    async def reserve(self, record: EngineRecord, node_id: str) -> None:
        record.node_id = node_id
        if self.is_full:
            message = "no node came"
            raise CapacityError(message)

    async def start(self, record: EngineRecord, **_how: Any) -> None:
        record.member = Member(record.engine, Endpoints("host", "ipc://r", "ipc://b"), INFO, pid=1)
        self.started.append(record)

    async def dispose(self, record: EngineRecord) -> None:
        self.disposed.append(record)

    async def retire(self, record: EngineRecord, _drain_s: float) -> None:
        self.retired.append(record)


class NoStandbys:
    warm = 0

    def hold(self) -> None:
        """There are none."""

    def release(self) -> None:
        """There are none."""

    def take(self, _ranks: Sequence[Rank]) -> dict[Rank, EngineRecord]:
        return {}


class OneStandby(NoStandbys):
    def __init__(self) -> None:
        self.record = record_of(0, "warm")
        self.record.is_standby = True
        self.warm = 1

    def take(self, ranks: Sequence[Rank]) -> dict[Rank, EngineRecord]:
        taken, self.warm = self.warm, 0
        return {ranks[0]: self.record} if taken and ranks else {}

    def take_back(self, records: Sequence[EngineRecord]) -> None:
        assert records == [self.record]
        self.warm = 1


class FakeTopology:
    def __init__(self, *records: EngineRecord) -> None:
        self._records = {record.engine: record for record in records}
        self.membership = first_membership("pool", [record.member for record in records if record.member is not None])

    def record(self, engine: EngineId) -> EngineRecord | None:
        return self._records.get(engine)

    def let_go(self, engine: EngineId) -> EngineRecord | None:
        return self._records.pop(engine, None)

    async def planned_nodes(self, count: int) -> Sequence[str]:
        return ["node"] * count

    async def declare(self, change: Callable[[Membership], Membership], joiners: Sequence[EngineRecord] = ()) -> None:
        await asyncio.sleep(0.005)  # members are told
        self._records.update({record.engine: record for record in joiners})
        self.membership = change(self.membership)


def record_of(rank: int, incarnation: str) -> EngineRecord:
    engine = EngineId(Rank(rank), Incarnation(incarnation))
    return EngineRecord(engine, f"{engine}", handle=Handle())


def member_of(rank: int) -> EngineRecord:
    record = record_of(rank, "a")
    record.handle.set_membership.is_answered.set()
    record.member = Member(record.engine, Endpoints("host", "ipc://r", "ipc://b"), INFO, pid=1)
    return record


class Rig:
    """A pool of two ranks of which the joiner of an operation does not answer, and which is cancelled."""

    def __init__(self, standbys: Any = None) -> None:
        self.fleet = FakeFleet()
        topology: Any = FakeTopology(member_of(0), member_of(1))
        self.topology: FakeTopology = topology
        fleet: Any = self.fleet
        self.scaler = PoolScaler("pool", topology, fleet, QUICK, standbys or NoStandbys(), NobodyWatches())

    def joining(self) -> list[EngineId]:
        return [member.engine for member in self.topology.membership.joining]

    async def prepares(self, number: int) -> EngineRecord:
        """The joiner of the operation of this number, once it has been asked to prepare."""
        async with asyncio.timeout(LIMIT_S):
            while len(self.fleet.started) <= number:
                await asyncio.sleep(0)
            await self.fleet.started[number].handle.set_membership.is_called.wait()
        return self.fleet.started[number]

    async def cancelled(self, scaling: asyncio.Task[Any]) -> None:
        """Undone, or given up when the time for it was over."""
        assert self.scaler.cancel(self.scaler.status()[0]["operation"])
        with pytest.raises(ScalingError, match="cancelled"):
            async with asyncio.timeout(LIMIT_S):
                await scaling


async def _until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(LIMIT_S):
        while not condition():
            await asyncio.sleep(0.001)


async def test_an_undo_that_took_too_long_leaves_what_the_next_operation_declared_and_ends_what_its_own_did() -> None:
    rig = Rig()
    first = asyncio.ensure_future(rig.scaler.scale(3))
    stuck = await rig.prepares(0)
    await rig.cancelled(first)
    assert not rig.fleet.disposed, "its undo waits for the joiner's call"
    second = asyncio.ensure_future(rig.scaler.scale(3))
    joiner = await rig.prepares(1)
    assert rig.joining() == [joiner.engine]
    stuck.handle.set_membership.is_answered.set()
    await _until(lambda: bool(rig.fleet.disposed))
    assert rig.fleet.disposed == [stuck]
    assert rig.joining() == [joiner.engine], "the next operation's joiner is still told what all ranks are told"
    assert not second.done()
    joiner.handle.set_membership.is_answered.set()
    await rig.cancelled(second)
    await _until(lambda: rig.joining() == [])
    await rig.scaler.close()


async def test_a_leaver_of_the_next_operation_does_not_serve_again_because_an_earlier_one_is_undone_at_last() -> None:
    rig = Rig()
    leaver = rig.topology.membership.members[1].engine
    first = asyncio.ensure_future(rig.scaler.evacuate([leaver]))
    stuck = await rig.prepares(0)
    assert rig.scaler.cancel(rig.scaler.status()[0]["operation"])
    async with asyncio.timeout(LIMIT_S):
        await first
    second = asyncio.ensure_future(rig.scaler.evacuate([leaver]))
    joiner = await rig.prepares(1)
    stuck.handle.set_membership.is_answered.set()
    await _until(lambda: stuck in rig.fleet.disposed)
    assert [member.state for member in rig.topology.membership.members] == [MemberState.SERVING, MemberState.LEAVING]
    joiner.handle.set_membership.is_answered.set()
    assert rig.scaler.cancel(rig.scaler.status()[0]["operation"])
    async with asyncio.timeout(LIMIT_S):
        await second
    await _until(lambda: all(member.state is MemberState.SERVING for member in rig.topology.membership.members))
    await rig.scaler.close()


async def test_nothing_is_begun_once_the_pool_ends_and_who_waits_for_an_operation_is_freed() -> None:
    rig = Rig()
    scaling = asyncio.ensure_future(rig.scaler.scale(3))
    joiner = await rig.prepares(0)
    waiting = asyncio.ensure_future(rig.scaler.evacuate([rig.topology.membership.members[1].engine]))
    await asyncio.sleep(0)
    joiner.handle.set_membership.is_answered.set()
    await rig.scaler.close()
    with pytest.raises(PoolError, match="taken down while it scaled"):
        await scaling
    async with asyncio.timeout(LIMIT_S):
        await waiting
    with pytest.raises(PoolError, match="is being taken down"):
        await rig.scaler.scale(3)
    assert joiner in rig.fleet.disposed


async def test_standbys_that_were_taken_and_not_started_are_standbys_again() -> None:
    standbys = OneStandby()
    rig = Rig(standbys)
    rig.fleet.is_full = True
    with pytest.raises(CapacityError, match="no node came"):
        await rig.scaler.scale(4)
    assert standbys.warm == 1
    assert standbys.record not in rig.fleet.disposed
    assert [record.engine.rank for record in rig.fleet.disposed] == [3]
    await rig.scaler.close()


async def test_who_waits_for_an_operation_never_begins_beside_another() -> None:
    rig = Rig()
    rig.fleet.is_full = True
    rig.scaler.wanted_size = 3
    leaver = rig.topology.membership.members[1].engine
    async with asyncio.timeout(LIMIT_S):
        await asyncio.gather(rig.scaler.evacuate([leaver]), rig.scaler.replace(Rank(2)), rig.scaler.replace(Rank(3)))
    phases = [operation["phase"] for operation in rig.scaler.status()]
    assert sorted(phases) == ["done", "undone", "undone", "undone"]
    assert [member.engine.rank for member in rig.topology.membership.members] == [0]
    assert [record.engine for record in rig.fleet.retired] == [leaver]
    assert {record.engine.rank for record in rig.fleet.disposed} == {2, 3}
    await rig.scaler.close()
