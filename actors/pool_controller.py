"""The controller's life of one pool: start, losses of engines, recovery after its own death, the end."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import logging
import time
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from typing import Any

import msgspec
import ray.exceptions

from actors.autoscaling import Autoscaler, Autoscaling
from actors.capacity import Capacity
from actors.coordination import CoordinatorKeeper
from actors.fleet import EngineRecord, Fleet
from actors.groups import pool_groups, remove_group
from actors.health_watch import HealthWatch
from actors.lockstep import GroupMaker, Records, check_alike, why_broken
from actors.naming import Role, named_actors
from actors.node_watch import NodeWatch
from actors.pool_end import end_clients
from actors.pool_observer import NobodyWatches, Observer, PoolView, beats_of
from actors.remote import death_cause, remote_call
from actors.roster import adopt, first_membership, newest, renewed, without
from actors.scaling import PoolScaler
from actors.setup import PoolSetup
from actors.standby import StandbyKeeper
from actors.switching import GroupSwitch
from elastic.policies import Observation, observation
from raycore.errors import PoolError, RaycoreError
from raycore.health import Verdict
from raycore.ids import EngineId, Epoch, GroupStamp, Rank
from raycore.membership import Departure, Membership, MemberState

logger = logging.getLogger(__name__)

_FENCE_PUSH_S = 2.0
"""A survivor that does not take the new membership in this time hangs too; the kill does not wait for it."""
_RECONNECT_S = 0.2
_MEND_POLL_S = 0.5
"""Broken at two looks in a row: a death that broke the group is noticed before, and gives it a new one anyway."""
_ENGINES = frozenset({Role.ENGINE, Role.STANDBY})
_LOST_WITH_CONTROLLER = "gone when the controller was restarted"


class PoolController:
    """Owns the pool's membership, records and watches. Every method runs on one event loop; `on_end` is called when nothing is left."""

    def __init__(self, setup: PoolSetup, on_end: Callable[[], None], observer: Observer | None = None) -> None:
        config = setup.config
        self._setup = setup
        self._pool = config.pool
        self._timeouts = config.timeouts
        self._capacity = Capacity(config)
        self._fleet = Fleet(setup, self._capacity)
        self._health = HealthWatch(config.health, (setup.keys.client_public, setup.keys.client_secret), self._on_suspect)
        self._on_end = on_end
        self._observer = observer or NobodyWatches()
        self._standbys = StandbyKeeper(self._pool, config.standby, self._fleet, self._capacity.present_nodes, self._member_records)
        self.scaler = PoolScaler(self._pool, self, self._fleet, self._timeouts, self._standbys, self._observer)
        self.autoscaler = Autoscaler(self._observe, self.scaler.scale)
        self._coordinator = CoordinatorKeeper(setup)
        self._groups = GroupMaker(self._pool, self._timeouts)
        self._records: dict[EngineId, EngineRecord] = {}
        self._going: dict[EngineId, EngineRecord] = {}
        """Lost, and not put away yet."""
        self._membership = Membership(pool=self._pool)
        self._reserved_epoch = Epoch(0)
        """The highest that was given out; an epoch is a group's stamp, and no stamp is used twice."""
        self._changing = asyncio.Lock()
        self._watches: dict[EngineId, asyncio.Task[None]] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._start: asyncio.Task[None] | None = None
        self._down: asyncio.Task[None] | None = None

    @property
    def membership(self) -> Membership:
        """The newest decision."""
        return self._membership

    @property
    def is_starting_or_up(self) -> bool:
        """Whether `start` or `recover` was called and the end was not."""
        return self._start is not None and self._down is None

    async def start(self) -> Membership:
        """Bring the pool up; whatever fails is undone before it is raised."""
        if self._start is not None:
            message = f"pool {self._pool!r} was started before"
            raise PoolError(message)
        return await self._settle(self._bring_up())

    async def recover(self) -> Membership:
        """After a restart of the controller: adopt the engines that live, in a higher term; end what never became a member."""
        return await self._settle(self._adopt_engines())

    async def _settle(self, work: Coroutine[Any, Any, None]) -> Membership:
        self._start = asyncio.create_task(work)
        try:
            await asyncio.shield(self._start)
        except asyncio.CancelledError:
            if not self._start.cancelled():
                raise
            message = f"pool {self._pool!r} was taken down while it started"
            raise PoolError(message) from None
        return self._membership

    async def _bring_up(self) -> None:
        records = await self._fleet.start_all(await self.planned_nodes(self._setup.config.data_parallel_size))
        try:
            membership = first_membership(self._pool, [record.member for record in records if record.member is not None])
            check_alike(membership)
            by_engine = {record.engine: record for record in records}
            membership = await self._groups.with_group(membership, by_engine.get, limit_s=self._timeouts.control_s)
            await self._tell(records, membership, limit_s=self._timeouts.control_s, must_answer=True)
            await self._groups.until_formed(membership, records)
        except BaseException:
            await asyncio.shield(asyncio.gather(*(self._fleet.dispose(record) for record in records)))
            raise
        self._observer.began(membership.term, recovered=False)
        self._observer.on_membership(Membership(pool=self._pool), membership)
        self._take_over(records, membership)
        self._standbys.start()

    async def planned_nodes(self, count: int) -> Sequence[str]:
        """Nodes for `count` more ranks; CapacityError where they cannot have them."""
        return await self._capacity.nodes(count)

    async def _adopt_engines(self) -> None:
        names = [name for name in await asyncio.to_thread(named_actors, self._pool) if name.role in _ENGINES]
        limit_s = self._setup.config.health.hang_after_s
        found = await asyncio.gather(*(self._fleet.find(name, limit_s) for name in names))
        answered = {record.engine for record, facts in found if facts is not None}
        views = [facts.membership for _, facts in found if facts is not None]
        membership = adopt(views, answered, self._pool, _LOST_WITH_CONTROLLER)
        keep = [record for record, _ in found if membership.has(record.engine)]
        if not keep:
            logger.error("pool %s has no engine left after its controller's restart; it ends", self._pool)
            self._spawn(self.shut_down(0))
            return
        by_engine = {record.engine: record for record in keep}
        before = newest(views, self._pool)
        membership = await self._groups.with_group(membership, by_engine.get, limit_s=_FENCE_PUSH_S, before=before)
        await self._tell(keep, membership, limit_s=_FENCE_PUSH_S)
        self._observer.began(membership.term, recovered=True)
        self._observer.on_membership(before, membership)
        self._take_over(keep, membership)
        logger.warning("pool %s: a new controller adopted %d engines in term %d", self._pool, len(keep), membership.term)
        others = [record for record, _ in found if not membership.has(record.engine)]
        await asyncio.gather(*(self._fleet.give_up(record, keep) for record in others))
        await asyncio.gather(*map(self._fleet.dispose, others))
        await self._remove_orphan_groups()
        self._standbys.start()
        if membership.is_in_lockstep:
            self._spawn(self._groups.release(membership, keep))
        self._spawn(self.scaler.finish_retiring())

    def _take_over(self, records: Sequence[EngineRecord], membership: Membership) -> None:
        self._membership = membership
        for record in records:
            self._take_in(record)
        self.scaler.wanted_size = len(membership.members)
        self._spawn(self._health.run())
        self._spawn(self._observer.run(self._view))
        self._spawn(NodeWatch(self._pool, self._serving, self._standbys, self.scaler.evacuate).run())
        if self._setup.config.autoscaling is not None:
            self.autoscaler.configure(Autoscaling.parse(self._setup.config.autoscaling))
        if membership.is_in_lockstep:
            self._spawn(self._mend_groups())

    def _view(self) -> PoolView:
        """For the observer."""
        membership = self._membership
        standbys = sum(row["state"] == "warm" for row in self._standbys.status())
        return PoolView(membership, self.scaler.target_size, standbys, beats_of(membership, self._health.last_beat))

    def _serving(self) -> list[EngineRecord]:
        return [record for record in self._records.values() if self._membership.serves(record.engine)]

    def _member_records(self) -> list[EngineRecord]:
        """Lowest rank first; those that leave are among them, who have what a standby wants, and may be all."""
        records = (self._records.get(member.engine) for member in self._membership.members)
        return [record for record in records if record is not None]

    def _take_in(self, record: EngineRecord) -> None:
        self._records[record.engine] = record
        if record.member is not None:
            self._health.watch(record.member)
        self._watches[record.engine] = asyncio.create_task(self._watch(record))

    # -- for autoscaling --------------------------------------------------------------------------------------------------

    def _observe(self) -> Observation | str:
        """What the serving ranks said last; or which of them has not been heard."""
        serving = [member for member in self._membership.members if member.state is MemberState.SERVING]
        beats = [self._health.last_beat(member.engine) for member in serving]
        unheard = [member.engine.rank for member, beat in zip(serving, beats, strict=True) if beat is None]
        if unheard or not serving:
            return f"ranks {unheard} have not been heard" if unheard else "no rank serves"
        loads = [beat.load for beat in beats if beat is not None]
        kv_tokens = sum(member.info.kv_tokens for member in serving)
        return observation(loads, at_s=time.monotonic(), unix_s=time.time(), kv_tokens=kv_tokens)

    # -- for scaling ------------------------------------------------------------------------------------------------------

    def record(self, engine: EngineId) -> EngineRecord | None:
        """What is known of a member."""
        return self._records.get(engine)

    async def declare(self, change: Callable[[Membership], Membership], joiners: Sequence[EngineRecord] = ()) -> None:
        """Decide the next epoch, watch the joiners, and tell every member; the watches judge who does not answer."""
        async with self._changing:
            for record in joiners:
                self._take_in(record)
            await self._decide(change(self._membership))
            # Joiners first: clients hear of a member from the others, and what they send it must find one.
            await self._tell(joiners, self._membership, limit_s=_FENCE_PUSH_S)
            others = [record for record in self._records.values() if record not in joiners]
            await self._tell(others, self._membership, limit_s=_FENCE_PUSH_S)
        self._end_without_experts()

    async def _decide(self, membership: Membership) -> None:
        """Keep the next decision, with process groups where its members step together."""
        prepared = membership.group is not None and membership.group.stamp == GroupStamp(membership.epoch, membership.term)
        if not prepared and membership.epoch <= self._reserved_epoch:
            membership = msgspec.structs.replace(membership, epoch=Epoch(self._reserved_epoch + 1))
        self._reserved_epoch = Epoch(max(self._reserved_epoch, membership.epoch))  # before anything is waited for
        way_back = self.scaler.go_back(membership)
        if way_back is not None:
            membership = msgspec.structs.replace(membership, group=way_back)
        before, records = self._membership, self._records.get
        self._membership = await self._groups.with_group(membership, records, limit_s=_FENCE_PUSH_S, before=before)
        self._observer.on_membership(before, self._membership)

    def switch(self, records: Records) -> GroupSwitch:
        """The switch of groups that begins with the present members; what is decided meanwhile takes higher epochs than its own."""
        epoch = self._reserved_epoch = Epoch(max(self._membership.epoch, self._reserved_epoch) + 1)
        return GroupSwitch(self._pool, self._timeouts, self._groups, self._membership, epoch, records)

    async def lose(self, engine: EngineId, cause: str) -> None:
        """Fence and end a member that does not do its part; done to its end, even where its caller is cancelled by what follows from it."""
        await asyncio.shield(self._spawn(self._lose(engine, cause)))

    async def _mend_groups(self) -> None:
        """Give members whose process group broke a new one, in a new epoch; what they were doing goes on in it."""
        broken: tuple[int, str] | None = None
        while True:
            await asyncio.sleep(_MEND_POLL_S)
            epoch, why = self._membership.epoch, why_broken(self._membership, self._health.last_beat)
            was, broken = broken, (epoch, why) if why else None
            if broken is not None and was is not None and was[0] == epoch and not self.scaler.is_committing:
                self.scaler.on_regrouped()
                logger.warning("pool %s: the process group of epoch %d is replaced: %s", self._pool, epoch, why)
                await self.declare(functools.partial(renewed, epoch=epoch))
                broken = None

    def let_go(self, engine: EngineId) -> EngineRecord | None:
        """Stop watching an engine core that is to be put away; None when it is gone already."""
        record = self._records.pop(engine, None)
        watch = self._watches.pop(engine, None)
        if watch is not None:
            watch.cancel()
        self._health.forget(engine)
        return record

    # -- losses -----------------------------------------------------------------------------------------------------------

    async def _watch(self, record: EngineRecord) -> None:
        """The sentinel call: it fails within milliseconds of the process's death."""
        while True:
            try:
                await record.handle.wait_closed.remote()
                cause = "its step loop ended"
            except ray.exceptions.ActorUnavailableError:
                await asyncio.sleep(_RECONNECT_S)  # the connection broke, which says nothing of the process
                continue
            except ray.exceptions.RayError as error:
                cause = death_cause(error)
            self._spawn(self._lose(record.engine, cause))
            return

    def _on_suspect(self, engine: EngineId, cause: str) -> None:
        self._spawn(self._lose(engine, cause))

    async def report_suspect(self, engine: EngineId, cause: str) -> None:
        """A client cannot reach this engine. Believed when the beats say so too, or when it does not answer a ping."""
        record = self._records.get(engine)
        if record is None:
            return
        if self._health.verdict(engine) is Verdict.ALIVE:
            try:
                limit_s = self._setup.config.health.hang_after_s
                await remote_call(record.handle.ping.remote(), limit_s=limit_s, what=f"{engine}: ping")
            except RaycoreError as error:
                cause = f"{cause}; {error}"
            else:
                logger.info("%s of pool %s was reported (%s), but it lives", engine, self._pool, cause)
                return
        self._spawn(self._lose(engine, cause))

    async def _lose(self, engine: EngineId, cause: str) -> None:
        """Fence, then kill: survivors (and through them clients) hear of it before the process is touched."""
        async with self._changing:
            record = self._records.get(engine)
            if record is None or self._down is not None:
                return  # what the end of the pool finds in the records it puts away itself
            del self._records[engine]
            self._going[engine] = record
            logger.error("%s of pool %s is lost: %s", engine, self._pool, cause)
            is_missed = self._membership.serves(engine)
            is_expert_parallel = self._membership.is_expert_parallel
            await self._decide_without(engine, cause)
            is_over = is_expert_parallel and not self._membership.members
            if is_over:
                self._standbys.end()
            await self._tell(list(self._records.values()), self._membership, limit_s=_FENCE_PUSH_S)
        watch = self._watches.pop(engine, None)
        if watch is not None:
            watch.cancel()
        if is_missed and self._setup.config.standby and not is_over:
            self._spawn(self.scaler.replace(engine.rank))
        await self._fleet.dispose(record)
        del self._going[engine]
        self._end_without_experts(engine.rank if is_over else None)

    async def _decide_without(self, engine: EngineId, cause: str) -> None:
        """The next epoch without an engine that is lost; in an expert-parallel pool the one before it joined, if all can go back there."""
        departure = Departure(engine, cause)
        back = self.scaler.without_joiners(self._membership, departure)
        others = () if back is None else [m.engine for m in self._membership.members if m.engine != engine and not back.has(m.engine)]
        await self._decide(without(self._membership, [departure]) if back is None else back)
        self._health.forget(engine)
        if back is None:
            self.scaler.on_lost(engine, cause)
        else:
            self.scaler.on_returned([record for other in others if (record := self.let_go(other)) is not None], f"{engine} died: {cause}")

    def _end_without_experts(self, only: Rank | None = None) -> None:
        """End an expert-parallel pool that has lost a rank; `only`: it was the only one, and took no other along."""
        if (only is not None or self._membership.lost_with_another()) and self._down is None:
            took = (departure.lost_with for departure in reversed(self._membership.departed) if departure.lost_with is not None)
            lost = next(took) if only is None else only
            logger.error("pool %s ends: its experts were spread over the ranks, and those of rank %d are lost", self._pool, lost)
            self._spawn(self.shut_down(0))

    async def _tell(self, records: Sequence[EngineRecord], membership: Membership, *, limit_s: float, must_answer: bool = False) -> None:
        self._coordinator.tell(membership)

        async def tell(record: EngineRecord) -> None:
            what = f"{record.engine}: membership"
            await remote_call(record.handle.set_membership.remote(membership), limit_s=limit_s, what=what, engine=record.engine)

        for outcome in await asyncio.gather(*map(tell, records), return_exceptions=True):
            if isinstance(outcome, BaseException):
                if must_answer or not isinstance(outcome, RaycoreError):
                    raise outcome
                logger.warning("pool %s epoch %d: %s", self._pool, membership.epoch, outcome)

    async def until_driver_dies(self, hold: Callable[[], Awaitable[None]]) -> None:
        """Await the sentinel's call; its failure ends the pool at once."""
        while True:
            try:
                await hold()
            except ray.exceptions.ActorUnavailableError:
                await asyncio.sleep(_RECONNECT_S)
            except (ray.exceptions.RayError, ValueError):
                break
        logger.warning("the driver of pool %s is gone: the pool ends", self._pool)
        self._spawn(self.shut_down(0))

    async def shut_down(self, drain_s: float) -> None:
        """End the pool; returns when no engine, process or group of it is left. Repeated calls wait for the first."""
        if self._down is None:
            self._down = asyncio.create_task(self._take_down(drain_s))
        await asyncio.shield(self._down)

    async def _take_down(self, drain_s: float) -> None:
        if self._start is not None and not self._start.done():
            self._start.cancel()
            await asyncio.wait([self._start])
        for watch in self._watches.values():
            watch.cancel()
        await self._coordinator.end()
        self.autoscaler.close()
        await self.scaler.close()
        await self._standbys.close()
        self._health.close()
        async with self._changing:
            records, self._records = list(self._records.values()), {}
        going = (self._fleet.dispose(record) for record in list(self._going.values()))
        await asyncio.gather(*(self._fleet.retire(record, drain_s) for record in records), *going)
        await end_clients(self._pool, limit_s=self._timeouts.stop_s)
        names = [name for name in await asyncio.to_thread(named_actors, self._pool) if name.role in _ENGINES]
        strays = await asyncio.gather(*(self._fleet.find(name, _FENCE_PUSH_S) for name in names))
        await asyncio.gather(*(self._fleet.dispose(record) for record, _ in strays))
        await self._remove_orphan_groups()
        self._membership = Membership(pool=self._pool, epoch=self._membership.epoch, term=self._membership.term)
        self._observer.ended()
        self._on_end()

    async def _remove_orphan_groups(self) -> None:
        ours = {record.group_id for record in self._records.values()}
        rows = await asyncio.to_thread(pool_groups, self._pool)
        await asyncio.gather(*(remove_group(row.group_id, limit_s=self._timeouts.stop_s) for row in rows if row.group_id not in ours))

    def status(self) -> dict[str, Any]:
        """For people: members, departures, loads."""
        membership = self._membership
        return {
            "pool": self._pool,
            "epoch": membership.epoch,
            "term": membership.term,
            "lifetime": self._setup.config.lifetime,
            "members": [self._member_status(engine) for engine in sorted(self._records, key=lambda e: e.rank)],
            "operations": self.scaler.status(),
            "autoscaling": self.autoscaler.status(),
            "standbys": self._standbys.status(),
            "departed": [{"rank": d.engine.rank, "incarnation": d.engine.incarnation, "cause": d.cause} for d in membership.departed],
        }

    def _state_of(self, engine: EngineId) -> str:
        return next((member.state.name.lower() for member in self._membership.members if member.engine == engine), "gone")

    def _member_status(self, engine: EngineId) -> dict[str, Any]:
        record, beat = self._records[engine], self._health.last_beat(engine)
        load = None if beat is None else {name: getattr(beat.load, name) for name in beat.load.__struct_fields__}
        return {
            "rank": engine.rank,
            "state": "unknown" if record.member is None else self._state_of(engine),
            "incarnation": engine.incarnation,
            "pid": record.pid,
            "node_id": record.node_id,
            "placement_group": record.group_id,
            "step": None if beat is None else beat.step,
            "load": load,
            "is_sleeping": None if beat is None else beat.is_sleeping,
            "is_paused": None if beat is None else beat.is_paused,
            "memory": {} if beat is None else beat.memory,
            "cache": {} if beat is None else beat.cache,
        }

    def _spawn(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._ended)
        return task

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        with contextlib.suppress(asyncio.CancelledError):
            error = task.exception()
            if error is not None:
                logger.error("pool %s: background work failed", self._pool, exc_info=error)
