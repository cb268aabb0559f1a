"""The controller's life of one pool: start, losses of engines, recovery after its own death, the end."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from typing import Any

import ray.exceptions

from actors.fleet import EngineRecord, Fleet
from actors.groups import pool_groups, remove_group
from actors.health_watch import HealthWatch
from actors.naming import Role, named_actors
from actors.nodes import cluster_nodes
from actors.remote import death_cause, remote_call
from actors.roster import adopt, first_membership, without
from actors.setup import PoolSetup, rank_demand
from elastic.placement import PlacementPlan, plan_placement
from raycore.errors import CapacityError, PoolError, RaycoreError
from raycore.health import Verdict
from raycore.ids import EngineId
from raycore.membership import Departure, Membership

logger = logging.getLogger(__name__)

_FENCE_PUSH_S = 2.0
"""A survivor that does not take the new membership in this time hangs too; the kill does not wait for it."""
_CAPACITY_POLL_S = 0.25
_RECONNECT_S = 0.2
_LOST_WITH_CONTROLLER = "gone when the controller was restarted"


class PoolController:
    """Owns the pool's membership, records and watches. Every method runs on one event loop; `on_end` is called when nothing is left."""

    def __init__(self, setup: PoolSetup, on_end: Callable[[], None]) -> None:
        config = setup.config
        self._setup = setup
        self._pool = config.pool
        self._timeouts = config.timeouts
        self._fleet = Fleet(setup)
        self._health = HealthWatch(config.health, (setup.keys.client_public, setup.keys.client_secret), self._on_suspect)
        self._on_end = on_end
        self._records: dict[EngineId, EngineRecord] = {}
        self._membership = Membership(pool=self._pool)
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
        records = await self._fleet.start_all(await self._planned_nodes())
        try:
            membership = first_membership(self._pool, [record.member for record in records if record.member is not None])
            await self._tell(records, membership, limit_s=self._timeouts.control_s, must_answer=True)
        except BaseException:
            await asyncio.shield(asyncio.gather(*(self._fleet.dispose(record) for record in records)))
            raise
        self._take_over(records, membership)

    async def _planned_nodes(self) -> Sequence[str]:
        """Nodes for the ranks. What can never fit is refused at once; a busy cluster is waited for until the limit."""
        config = self._setup.config
        until_s = time.monotonic() + self._timeouts.capacity_s
        while True:
            nodes = await asyncio.to_thread(cluster_nodes)
            plan = plan_placement(nodes, rank_demand(config), config.data_parallel_size, config.node_strategy)
            if isinstance(plan, PlacementPlan):
                return plan.nodes
            if plan.is_infeasible or time.monotonic() >= until_s:
                raise CapacityError(plan.text)
            await asyncio.sleep(_CAPACITY_POLL_S)

    async def _adopt_engines(self) -> None:
        names = [name for name in await asyncio.to_thread(named_actors, self._pool) if name.role is Role.ENGINE]
        limit_s = self._setup.config.health.hang_after_s
        found = await asyncio.gather(*(self._fleet.find(name.engine, limit_s) for name in names))
        answered = {record.engine for record, facts in found if facts is not None}
        views = [facts.membership for _, facts in found if facts is not None]
        membership = adopt(views, answered, self._pool, _LOST_WITH_CONTROLLER)
        keep = [record for record, _ in found if membership.has(record.engine)]
        if not keep:
            logger.error("pool %s has no engine left after its controller's restart; it ends", self._pool)
            self._spawn(self.shut_down(0))
            return
        await self._tell(keep, membership, limit_s=_FENCE_PUSH_S)
        self._take_over(keep, membership)
        logger.warning("pool %s: a new controller adopted %d engines in term %d", self._pool, len(keep), membership.term)
        await asyncio.gather(*(self._fleet.dispose(record) for record, _ in found if not membership.has(record.engine)))
        await self._remove_orphan_groups()

    def _take_over(self, records: Sequence[EngineRecord], membership: Membership) -> None:
        self._membership = membership
        for record in records:
            self._records[record.engine] = record
            if record.member is not None:
                self._health.watch(record.member)
            self._watches[record.engine] = asyncio.create_task(self._watch(record))
        self._spawn(self._health.run())

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
            record = self._records.pop(engine, None)
            if record is None or self._down is not None:
                return
            logger.error("%s of pool %s is lost: %s", engine, self._pool, cause)
            self._membership = without(self._membership, [Departure(engine, cause)])
            self._health.forget(engine)
            await self._tell(list(self._records.values()), self._membership, limit_s=_FENCE_PUSH_S)
        watch = self._watches.pop(engine, None)
        if watch is not None:
            watch.cancel()
        await self._fleet.dispose(record)

    async def _tell(self, records: Sequence[EngineRecord], membership: Membership, *, limit_s: float, must_answer: bool = False) -> None:
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
        self._health.close()
        async with self._changing:
            records, self._records = list(self._records.values()), {}
        await asyncio.gather(*(self._fleet.retire(record, drain_s) for record in records))
        names = [name for name in await asyncio.to_thread(named_actors, self._pool) if name.role is Role.ENGINE]
        strays = await asyncio.gather(*(self._fleet.find(name.engine, _FENCE_PUSH_S) for name in names))
        await asyncio.gather(*(self._fleet.dispose(record) for record, _ in strays))
        await self._remove_orphan_groups()
        self._membership = Membership(pool=self._pool, epoch=self._membership.epoch, term=self._membership.term)
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
            "departed": [{"rank": d.engine.rank, "incarnation": d.engine.incarnation, "cause": d.cause} for d in membership.departed],
        }

    def _member_status(self, engine: EngineId) -> dict[str, Any]:
        record, beat = self._records[engine], self._health.last_beat(engine)
        load = None if beat is None else {name: getattr(beat.load, name) for name in beat.load.__struct_fields__}
        return {
            "rank": engine.rank,
            "incarnation": engine.incarnation,
            "pid": record.pid,
            "node_id": record.node_id,
            "placement_group": record.group_id,
            "step": None if beat is None else beat.step,
            "load": load,
        }

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._ended)

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        with contextlib.suppress(asyncio.CancelledError):
            error = task.exception()
            if error is not None:
                logger.error("pool %s: background work failed", self._pool, exc_info=error)
