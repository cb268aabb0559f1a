"""The controller's engines: one record each, how one is brought up, and how one is put away without a trace."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import logging
import secrets
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import ray
import ray.exceptions
from ray.util.placement_group import PlacementGroup
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from actors.capacity import Capacity
from actors.engine_actor import EngineActor, EngineDescription
from actors.groups import create_group, node_of, remove_group, wait_ready
from actors.naming import NAMESPACE, ActorName, engine_name, standby_name
from actors.nodes import actor_processes
from actors.processes import end_process
from actors.remote import remote_call
from actors.setup import PoolSetup, actor_resources, rank_demand
from actors.together import each_of
from actors.weights import Giver
from elastic.placement import UNPLANNED
from raycore.errors import CapacityError, ConfigurationError, DeadlineError, EngineDeadError, EngineStartError, RaycoreError
from raycore.ids import EngineId, Incarnation, Rank
from raycore.load_progress import WeightProgress
from raycore.membership import Member

logger = logging.getLogger(__name__)


_TELL_S = 2.0
_LOOK_S = 0.25
"""How often a joiner is asked how much of its weights has come."""


@dataclass(slots=True)
class EngineRecord:
    """All that the controller knows of one engine core; fields fill in the order in which they are made."""

    engine: EngineId
    name: str
    """The actor's."""
    is_standby: bool = False
    """Warm, and without a rank until it starts."""
    group_id: str = ""
    handle: Any = None
    member: Member | None = None
    pid: int = 0
    node_id: str = ""
    weights: WeightProgress = field(default_factory=WeightProgress)
    """Where its weights came from; while it starts, as far as it has come."""


class Fleet:
    """Makes and ends engine cores of one pool."""

    def __init__(self, setup: PoolSetup, capacity: Capacity) -> None:
        self._setup = setup
        self._capacity = capacity
        self._pool = setup.config.pool
        self._timeouts = setup.config.timeouts
        self._beside_steps = asyncio.Lock()

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
        record = self.new_record(rank)
        try:
            try:
                await self.reserve(record, node_id)
            except RaycoreError as error:
                raise _named(error, rank) from error
            await self.start(record)
        except BaseException:
            await asyncio.shield(self.dispose(record))
            raise
        return record

    def new_record(self, rank: Rank) -> EngineRecord:
        """Of a new engine core, of which nothing is made yet."""
        engine = EngineId(rank, Incarnation(secrets.token_hex(4)))
        return EngineRecord(engine, engine_name(self._pool, engine))

    @property
    def takes_turns(self) -> bool:
        """Whether `beside_steps` lets one begin when the one before has ended."""
        return self._setup.config.device != "cpu"

    @contextlib.asynccontextmanager
    async def beside_steps(self) -> AsyncIterator[None]:
        """For what has members exchange tensors while they step: one such thing at a time where that goes by way of a GPU.

        Kernels of two of NCCL's groups wait for their peers in each GPU's queue, and whatever stops that queue until it is empty, as
        making a group or leaving one does, can let each wait for the other's. Steps must go on, so beside them there is one at a time.
        """
        if not self.takes_turns:
            yield
            return
        async with self._beside_steps:
            yield

    async def start_standby(
        self, node_id: str, members: Callable[[], Sequence[EngineRecord]], may_go_on: Callable[[], Awaitable[Any]]
    ) -> EngineRecord:
        """A warm engine core without a rank; undone when a step of it fails or is cancelled.

        `members`: whom it may join; asked for weights once `may_go_on` has come.
        """
        incarnation = Incarnation(secrets.token_hex(4))
        record = EngineRecord(EngineId(Rank(0), incarnation), standby_name(self._pool, incarnation), is_standby=True)
        try:
            await self.reserve(record, node_id)
            record.handle = self._actor(record, is_joining=True)
            await self._get_ready(record, members(), is_standby=True)
            await may_go_on()
            await self._copying(record, members(), record.handle.warm.remote, what=f"standby {incarnation}")
        except BaseException:
            await asyncio.shield(self.dispose(record))
            raise
        return record

    async def reserve(self, record: EngineRecord, node_id: str) -> None:
        """Have a placement group for the rank; DeadlineError when it does not get ready in time, CapacityError where no node came for it.

        On an unplanned node the group is what makes Ray's autoscaler add one.
        """
        engine, demand = record.engine, rank_demand(self._setup.config)
        creating = asyncio.ensure_future(create_group(record.name, demand, node_id))
        try:
            group = await asyncio.shield(creating)
        except asyncio.CancelledError:
            record.group_id = (await creating).id.hex()  # it is made whether or not somebody still wants it
            raise
        record.group_id = group.id.hex()
        # An actor queued on a group that never gets ready hangs without an error, so the group comes first.
        if node_id != UNPLANNED:
            await wait_ready(group, limit_s=self._timeouts.capacity_s, engine=engine, node_id=node_id)
            record.node_id = node_id
            return
        try:
            await wait_ready(group, limit_s=self._timeouts.new_nodes_s, engine=engine)
        except DeadlineError as error:
            raise await self._capacity.no_node_came() from error
        record.node_id = await node_of(group)

    async def start(self, record: EngineRecord, *, is_joining: bool = False, members: Sequence[EngineRecord] = ()) -> None:
        """Start the actor on its group, and its engine core, or give a standby its rank; what that raises names the rank.

        `is_joining`: others serve already, `members`, from whom it gets what it shares with them.
        """
        engine = record.engine
        if record.is_standby:
            start = functools.partial(record.handle.promote.remote, engine.rank)
            record.is_standby = False
        else:
            record.handle = self._actor(record, is_joining=is_joining)
            start = record.handle.start.remote
        watching = asyncio.create_task(self._watch_weights(record)) if members else None
        try:
            if members and not record.pid:
                await self._get_ready(record, members, is_standby=False)
            member: Member = await self._copying(record, members, start, what=f"{engine}: start")
        except RaycoreError as error:
            raise _named(error, engine.rank) from error
        finally:
            if watching is not None:
                watching.cancel()
        record.member, record.pid = member, member.pid
        if members:
            await self._see_weights(record)

    async def _get_ready(self, record: EngineRecord, members: Sequence[EngineRecord], *, is_standby: bool) -> None:
        """The start of a process takes long, and nothing has to wait for it."""
        info = next((member.member.info for member in members if member.member is not None), None)
        call: Any = record.handle.get_ready.remote(info, is_standby)
        limit_s = self._timeouts.engine_start_s
        record.pid = await remote_call(call, limit_s=limit_s, what=f"{record.name}: process", engine=record.engine)

    async def _copying(
        self, record: EngineRecord, members: Sequence[EngineRecord], begin: Callable[[list[Giver]], Any], *, what: str
    ) -> Any:
        """The result of a call in which the engine core may take weights of members; when it comes to nothing they hear of it at once."""
        async with self.beside_steps() if members else contextlib.nullcontext():
            try:
                call: Any = begin(_givers(members))
                return await remote_call(call, limit_s=self._timeouts.engine_start_s, what=what, engine=record.engine)
            except BaseException:
                await asyncio.shield(self.give_up(record, members))
                raise

    async def give_up(self, record: EngineRecord, members: Sequence[EngineRecord]) -> None:
        """Have nobody wait for an engine core that is given up: it ends, then its peers are told."""
        if not members or record.handle is None:
            return
        await asyncio.to_thread(ray.kill, record.handle, no_restart=True)

        async def end(member: EngineRecord) -> None:
            call: Any = member.handle.end_giving.remote(record.engine)
            await remote_call(call, limit_s=_TELL_S, what=f"{member.engine}: end of a copy")

        await each_of(map(end, members), lambda error: logger.info("pool %s: %s", self._pool, error))

    async def _watch_weights(self, record: EngineRecord) -> None:
        while True:
            await asyncio.sleep(_LOOK_S)
            await self._see_weights(record)

    async def _see_weights(self, record: EngineRecord) -> None:
        try:
            call: Any = record.handle.weight_progress.remote()
            record.weights = await remote_call(call, limit_s=self._timeouts.control_s, what=f"{record.engine}: weights")
        except RaycoreError as error:
            logger.info("%s of pool %s does not tell of its weights: %s", record.engine, self._pool, error)

    def _actor(self, record: EngineRecord, *, is_joining: bool = False) -> Any:
        engine, demand = record.engine, rank_demand(self._setup.config)
        group = PlacementGroup(ray.PlacementGroupID(bytes.fromhex(record.group_id)))
        options = EngineActor.options(
            name=record.name,
            namespace=NAMESPACE,
            lifetime="detached",
            scheduling_strategy=PlacementGroupSchedulingStrategy(
                group, placement_group_bundle_index=0, placement_group_capture_child_tasks=False
            ),
            **actor_resources(demand),
        )
        return options.remote(self._setup.engine(engine.rank, engine.incarnation, record.group_id, is_joining=is_joining))

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
            if str(process.name) == record.name:
                record.pid, record.node_id = process.pid, process.node_id

    async def find(self, name: ActorName, limit_s: float) -> tuple[EngineRecord, EngineDescription | None]:
        """A running engine core by its actor's name; without a description when it does not answer."""
        record = EngineRecord(name.engine, str(name))
        try:
            record.handle = await asyncio.to_thread(ray.get_actor, record.name, NAMESPACE)
            facts = await remote_call(record.handle.describe.remote(), limit_s=limit_s, what=f"{name}: describe")
        except (ValueError, RaycoreError) as error:
            logger.warning("%s does not answer: %s", name, error)
            return record, None
        record.engine = facts.engine
        record.group_id, record.member, record.pid, record.node_id = facts.group_id, facts.member, facts.pid, facts.node_id
        return record, facts


def _givers(members: Sequence[EngineRecord]) -> list[Giver]:
    return [Giver(record.engine, record.member.endpoints.host, record.handle) for record in members if record.member is not None]


def _named(error: RaycoreError, rank: Rank) -> RaycoreError:
    """The same failure with the rank in its text; a wrong configuration and a lack of room stay what they are."""
    if isinstance(error, ConfigurationError | CapacityError):
        return type(error)(f"rank {rank}: {error}")
    cause = error.cause if isinstance(error, EngineDeadError) else f"{error}"
    return EngineStartError(f"rank {rank} could not start: {cause}", rank=rank, cause=cause)
