"""The controller's engines: one record each, how one is brought up, and how one is put away without a trace."""

from __future__ import annotations

import asyncio
import logging
import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import ray
import ray.exceptions
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from actors.engine_actor import EngineActor, EngineDescription
from actors.groups import create_group, remove_group, wait_ready
from actors.naming import NAMESPACE, engine_name
from actors.nodes import actor_processes
from actors.processes import end_process
from actors.remote import remote_call
from actors.setup import PoolSetup, actor_resources, rank_demand
from raycore.errors import ConfigurationError, EngineDeadError, EngineStartError, RaycoreError
from raycore.ids import EngineId, Incarnation, Rank
from raycore.membership import Member

logger = logging.getLogger(__name__)


@dataclass(slots=True)
class EngineRecord:
    """All that the controller knows of one engine core; fields fill in the order in which they are made."""

    engine: EngineId
    group_id: str = ""
    handle: Any = None
    member: Member | None = None
    pid: int = 0
    node_id: str = ""


class Fleet:
    """Makes and ends engine cores of one pool."""

    def __init__(self, setup: PoolSetup) -> None:
        self._setup = setup
        self._pool = setup.config.pool
        self._timeouts = setup.config.timeouts

    async def start_all(self, node_ids: Sequence[str]) -> list[EngineRecord]:
        """One engine core per planned node, ranks in order. The first failure cancels the others, undoes everything and is raised."""
        tasks = [asyncio.create_task(self.start_one(Rank(rank), node_id)) for rank, node_id in enumerate(node_ids)]
        try:
            done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_EXCEPTION)
            for task in tasks:
                if task in done:
                    task.result()
            return [task.result() for task in tasks]
        except BaseException:
            for task in tasks:
                task.cancel()
            outcomes = await asyncio.shield(asyncio.gather(*tasks, return_exceptions=True))
            started = [outcome for outcome in outcomes if isinstance(outcome, EngineRecord)]
            await asyncio.shield(asyncio.gather(*(self.dispose(record) for record in started)))
            raise

    async def start_one(self, rank: Rank, node_id: str) -> EngineRecord:
        """Group, actor, engine, in this order; each step is undone when a later one fails or is cancelled."""
        record = EngineRecord(EngineId(rank, Incarnation(secrets.token_hex(4))))
        try:
            await self._bring_up(record, node_id)
        except BaseException as error:
            await asyncio.shield(self.dispose(record))
            if isinstance(error, RaycoreError):
                raise _named(error, rank) from error
            raise
        return record

    async def _bring_up(self, record: EngineRecord, node_id: str) -> None:
        engine, demand = record.engine, rank_demand(self._setup.config)
        group = await create_group(self._pool, engine, demand, node_id)
        record.group_id = group.id.hex()
        # An actor queued on a group that never gets ready hangs without an error, so the group comes first.
        await wait_ready(group, limit_s=self._timeouts.capacity_s, engine=engine)
        options = EngineActor.options(
            name=engine_name(self._pool, engine),
            namespace=NAMESPACE,
            lifetime="detached",
            scheduling_strategy=PlacementGroupSchedulingStrategy(
                group, placement_group_bundle_index=0, placement_group_capture_child_tasks=False
            ),
            **actor_resources(demand),
        )
        record.handle = options.remote(self._setup.engine(engine.rank, engine.incarnation, record.group_id))
        record.node_id = node_id
        limit_s = self._timeouts.engine_start_s
        member: Member = await remote_call(record.handle.start.remote(), limit_s=limit_s, what=f"{engine}: start", engine=engine)
        record.member, record.pid = member, member.pid

    async def retire(self, record: EngineRecord, drain_s: float) -> None:
        """End an engine core by its own will where it has one, then dispose of it."""
        if record.handle is not None:
            limit_s = drain_s + self._timeouts.stop_s
            try:
                await remote_call(record.handle.stop.remote(drain_s), limit_s=limit_s, what=f"{record.engine}: stop")
            except RaycoreError as error:
                logger.warning("%s of pool %s did not stop by itself: %s", record.engine, self._pool, error)
        await self.dispose(record)

    async def dispose(self, record: EngineRecord) -> None:
        """Kill the actor, see its process gone, remove its group. In this order: a removed group makes a queued actor hang. Idempotent."""
        limit_s = self._timeouts.stop_s
        if record.handle is not None:
            await asyncio.to_thread(ray.kill, record.handle, no_restart=True)
            if not record.pid:
                await self._find_process(record)
            if record.pid and not await end_process(record.pid, record.node_id, self._pool, limit_s=limit_s):
                logger.error("process %d of %s of pool %s is still there after %g s", record.pid, record.engine, self._pool, limit_s)
        if record.group_id and not await remove_group(record.group_id, limit_s=limit_s):
            logger.error("the placement group of %s of pool %s is still there after %g s", record.engine, self._pool, limit_s)

    async def _find_process(self, record: EngineRecord) -> None:
        for process in await asyncio.to_thread(actor_processes, self._pool):
            if process.name.engine == record.engine:
                record.pid, record.node_id = process.pid, process.node_id

    async def find(self, engine: EngineId, limit_s: float) -> tuple[EngineRecord, EngineDescription | None]:
        """A running engine core by its name; without a description when it does not answer."""
        record = EngineRecord(engine)
        try:
            record.handle = await asyncio.to_thread(ray.get_actor, engine_name(self._pool, engine), NAMESPACE)
            facts = await remote_call(record.handle.describe.remote(), limit_s=limit_s, what=f"{engine}: describe")
        except (ValueError, RaycoreError) as error:
            logger.warning("%s of pool %s does not answer: %s", engine, self._pool, error)
            return record, None
        record.group_id, record.member, record.pid, record.node_id = facts.group_id, facts.member, facts.pid, facts.node_id
        return record, facts


def _named(error: RaycoreError, rank: Rank) -> RaycoreError:
    """The same failure with the rank in its text; a wrong configuration stays one."""
    if isinstance(error, ConfigurationError):
        return ConfigurationError(f"rank {rank}: {error}")
    cause = error.cause if isinstance(error, EngineDeadError) else f"{error}"
    return EngineStartError(f"rank {rank} could not start: {cause}", rank=rank, cause=cause)
