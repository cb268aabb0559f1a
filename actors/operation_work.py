"""What the commands of one scaling operation do, with Ray's groups and actors; `actors/scaling.py` says which are due."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable, Coroutine, Sequence
from typing import Any, Protocol

from actors.fleet import EngineRecord, Fleet
from actors.lockstep import Records
from actors.pool_state import make_alike
from actors.remote import remote_call
from actors.roster import with_joining, with_members, with_states, without_engine, without_joining
from actors.standby import StandbyKeeper
from actors.switching import GroupSwitch
from actors.together import all_of
from elastic.operation import Command, Operation, Phase
from raycore.config import Timeouts
from raycore.errors import DeadlineError, PoolError, RaycoreError, ScalingError
from raycore.ids import EngineId, GroupStamp, Rank
from raycore.membership import Membership, MemberState

logger = logging.getLogger(__name__)


class Topology(Protocol):
    """The controller's members, as far as scaling changes them."""

    @property
    def membership(self) -> Membership:
        """The newest decision."""
        ...

    def record(self, engine: EngineId) -> EngineRecord | None:
        """What is known of a member."""
        ...

    async def planned_nodes(self, count: int) -> Sequence[str]:
        """Nodes for so many more ranks; CapacityError."""
        ...

    async def declare(self, change: Callable[[Membership], Membership], joiners: Sequence[EngineRecord] = ()) -> None:
        """Decide the next epoch, take joiners under watch, and tell every member of before and after."""
        ...

    def let_go(self, engine: EngineId) -> EngineRecord | None:
        """Stop watching an engine core that is to be put away."""
        ...

    async def lose(self, engine: EngineId, cause: str) -> None:
        """Fence and end a member that does not do its part."""
        ...

    def switch(self, records: Records) -> GroupSwitch:
        """The switch of groups that begins with the present members."""
        ...


class Driver(Protocol):
    """Who is told what came of a command, and knows where operations are."""

    @property
    def operation(self) -> Operation | None:
        """The one that runs now."""
        ...

    def answer(self, operation: Operation, phase: Phase, rank: Rank, engine: EngineId | None = None) -> None:
        """A rank has done what the phase asked of it."""
        ...

    def fail(self, operation: Operation, error: Exception) -> None:
        """A command went wrong."""
        ...

    def on_lost(self, engine: EngineId, cause: str) -> None:
        """An engine core is gone."""
        ...

    def on_returned(self, joiners: Sequence[EngineRecord], cause: str) -> None:
        """The members go back to what was before; these joiners are put away."""
        ...


class OperationWork:
    """One operation's joiners, switch of groups and tasks. Its undo may last beyond its end, beside the next operation's work."""

    def __init__(self, pool: str, topology: Topology, fleet: Fleet, timeouts: Timeouts, standbys: StandbyKeeper, driver: Driver) -> None:
        self.joiners: dict[Rank, EngineRecord] = {}
        """Those that are not members yet, or not any more."""
        self.started: list[EngineRecord] = []
        """All joiners that were started, for what is said of their weights."""
        self.switch: GroupSwitch | None = None
        self._pool = pool
        self._topology = topology
        self._fleet = fleet
        self._timeouts = timeouts
        self._standbys = standbys
        self._driver = driver
        self._tasks: set[asyncio.Task[None]] = set()

    @property
    def is_busy(self) -> bool:
        """Whether something of it still runs."""
        return bool(self._tasks)

    def carry_out(self, command: Command, operation: Operation) -> None:
        """Begin what a command asks for; what comes of it is told to the driver."""
        if command is Command.UNDO:
            for task in list(self._tasks):
                task.cancel()
        goal = operation.goal
        work: dict[Command, Callable[[], list[Coroutine[Any, Any, None]]]] = {
            Command.RESERVE: lambda: [self._reserve(operation)],
            Command.SPAWN: lambda: [self._start_joiner(operation, rank) for rank in goal.joining],
            Command.PREPARE: lambda: [self._prepare_all(operation)],
            Command.COMPARE: lambda: [self._compare(operation, engine) for engine in operation.joined],
            Command.DECIDE: lambda: [self._decide(operation)],
            Command.RETIRE: lambda: [*self._releases(), *(self._retire(operation, engine) for engine in goal.leaving)],
            Command.UNDO: lambda: [self._undo(operation)],
        }
        for each in work[command]():
            self.spawn(each, operation)

    def spawn(self, work: Coroutine[Any, Any, None], operation: Operation) -> None:
        """Run beside what runs; a failure is the driver's to judge."""
        task = asyncio.create_task(self._guarded(work, operation))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _guarded(self, work: Coroutine[Any, Any, None], operation: Operation) -> None:
        try:
            await work
        except Exception as error:  # noqa: BLE001 -- it is the operation's end, or in the log
            self._driver.fail(operation, error)

    async def close(self) -> None:
        """The pool ends: nothing runs any more, and joiners are put away."""
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        joiners, self.joiners = list(self.joiners.values()), {}
        await asyncio.gather(*(self._fleet.dispose(record) for record in joiners))

    async def _reserve(self, operation: Operation) -> None:
        standbys = self._standbys.take(operation.goal.joining)
        self.joiners.update(standbys)
        ranks = [rank for rank in operation.goal.joining if rank not in standbys]
        nodes = await self._topology.planned_nodes(len(ranks)) if ranks else ()
        for rank in standbys:
            self._driver.answer(operation, Phase.RESERVE, rank)

        async def reserve(rank: Rank, node_id: str) -> None:
            record = self.joiners[rank] = self._fleet.new_record(rank)
            await self._fleet.reserve(record, node_id)
            self._driver.answer(operation, Phase.RESERVE, rank)

        await all_of(reserve(rank, node_id) for rank, node_id in zip(ranks, nodes, strict=True))

    async def _start_joiner(self, operation: Operation, rank: Rank) -> None:
        record = self.joiners[rank]
        self.started.append(record)
        members = [found for member in self._topology.membership.members if (found := self._topology.record(member.engine)) is not None]
        await self._fleet.start(record, is_joining=True, members=members)
        self._driver.answer(operation, Phase.SPAWN, rank, record.engine)

    async def _prepare_all(self, operation: Operation) -> None:
        """Have everybody know who joins: from here on clients tell joiners what they tell all ranks."""
        joining = [record.member for engine in operation.joined if (record := self.joiners[engine.rank]).member is not None]
        if joining:
            await self._topology.declare(lambda membership: with_joining(membership, joining))
        leavers: tuple[EngineId, ...] = ()
        if operation.goal.is_in_lockstep:
            self.switch = self._topology.switch(self._record)
            leavers = operation.goal.leaving
        async with self._fleet.beside_steps() if self.switch is not None else contextlib.nullcontext():
            await all_of(self._prepare(operation, engine) for engine in (*operation.participants, *leavers))

    async def _prepare(self, operation: Operation, engine: EngineId) -> None:
        """A dense rank has nothing to build: it must only know the pool, and who joins. Ranks in lockstep build their groups."""
        record = self._record(engine)
        if record is None:
            message = f"{engine} is no member any more"
            raise PoolError(message)
        ref = record.handle.set_membership.remote(self._topology.membership)
        await remote_call(ref, limit_s=self._timeouts.control_s, what=f"{engine}: prepare", engine=engine)
        if self.switch is not None:
            await self.switch.prepare(operation, engine)
        self._driver.answer(operation, Phase.PREPARE, engine.rank)

    async def _compare(self, operation: Operation, engine: EngineId) -> None:
        """Make a joiner like the members: adapters, weight version, pause, sleep. Every member knows of it by now."""
        await make_alike(self.joiners[engine.rank], self._topology, limit_s=self._timeouts.engine_start_s)
        self._driver.answer(operation, Phase.READY, engine.rank)

    def _record(self, engine: EngineId) -> EngineRecord | None:
        """Of a member or of a joiner that was spawned."""
        joiner = self.joiners.get(engine.rank)
        return joiner if joiner is not None and joiner.engine == engine else self._topology.record(engine)

    def _releases(self) -> list[Coroutine[Any, Any, None]]:
        """Decided here and now, so that a loss in the next moment finds no way back; nothing to release where they went back."""
        if self.switch is None or self.switch.is_returned:
            return []
        self.switch.is_released = True
        return [self.switch.release()]

    async def _switch_groups(self, operation: Operation, switch: GroupSwitch) -> None:
        """The decision is kept by all, then all are told to go. Who does not keep it is ended, and the others go on without it."""
        failed = await switch.keep(operation)
        was_overtaken = self._topology.membership.epoch > switch.epoch
        joiners = [self.joiners.pop(engine.rank) for engine in operation.joined]
        lost = [record for record in joiners if record.engine in failed]
        for leaver in set(operation.goal.leaving) & set(failed):  # it would hold up the vote; without it the others switch at once
            record = self._topology.let_go(leaver)
            if record is not None:
                await self._fleet.dispose(record)
        causes = {engine: str(error) for engine, error in failed.items()}
        switch.is_told = True
        if lost and switch.before.is_expert_parallel:
            self.joiners.update({record.engine.rank: record for record in joiners})  # put away by the undo, or with the pool
            await self._topology.declare(lambda now: switch.committed(now, (), causes))
            if switch.is_returned:
                self._driver.on_returned(
                    (), "; ".join(f"{record.engine} did not keep the decision: {causes[record.engine]}" for record in lost)
                )
            return
        stay = [record for record in joiners if record not in lost]
        added = [record.engine for record in stay]
        decided: list[Membership] = []

        def commit(now: Membership) -> Membership:
            decided.append(switch.committed(now, added, causes))
            return decided[-1]

        await self._topology.declare(commit, stay)
        before = [member.engine for member in switch.before.members]
        if switch.is_returned and [member.engine for member in decided[-1].members] == before:
            # another epoch came in between, and experts are not dealt anew: the members of before go on
            returned = [found for engine in added if (found := self._topology.let_go(engine)) is not None]
            self._driver.on_returned(returned, "another epoch was decided meanwhile")
            return
        for record in lost:
            self._driver.on_lost(record.engine, str(failed[record.engine]))
        await asyncio.gather(*(self._fleet.dispose(record) for record in lost))
        # Overtaken by a loss, a member that was told of it first refuses the decision, rightly, and lives.
        members = {engine for engine in operation.goal.stay if not (was_overtaken and isinstance(failed.get(engine), ScalingError))}
        await asyncio.gather(*(self._topology.lose(engine, str(error)) for engine, error in failed.items() if engine in members))

    async def _confirm(self, operation: Operation, switch: GroupSwitch, engine: EngineId) -> None:
        """A round in the new groups; a member that does not get there is ended, unless the groups were overtaken."""
        try:
            await switch.confirmed(engine, switch.stamp)
        except RaycoreError as error:
            if self._topology.membership.group == switch.then.group:
                culprit = self._culprit(engine) if isinstance(error, DeadlineError) else engine
                await self._topology.lose(culprit, f"it did not go over to the new groups: {error}")
        self._driver.answer(operation, Phase.COMMIT, engine.rank)

    def _culprit(self, engine: EngineId) -> EngineId:
        """Who is ended when this one takes too long: its round waits for all of them, and without a joiner there is a way back."""
        operation = self._driver.operation
        joined = () if operation is None else operation.joined
        return next((joiner for joiner in joined if operation is not None and joiner.rank in operation.waiting), engine)

    async def _decide(self, operation: Operation) -> None:
        if self.switch is not None:
            await self._switch_groups(operation, self.switch)
            switch, current = self.switch, self._driver.operation
            if switch is None or (current is not None and current.phase is Phase.ROLLING_BACK):
                return  # they went back
            engines = operation.participants if current is None else current.participants
            await asyncio.gather(*(self._confirm(operation, switch, engine) for engine in engines))
            return
        joiners = [self.joiners.pop(engine.rank) for engine in operation.joined]
        retiring = dict.fromkeys(operation.goal.leaving, MemberState.RETIRING)
        added = [record.member for record in joiners if record.member is not None]
        await self._topology.declare(lambda membership: with_states(with_members(membership, added), retiring), joiners)
        for engine in operation.participants:
            self._driver.answer(operation, Phase.COMMIT, engine.rank)

    async def _retire(self, operation: Operation, engine: EngineId) -> None:
        await put_away(engine, self._topology, self._fleet, self._timeouts)
        self._driver.answer(operation, Phase.RETIRE, engine.rank)

    async def _undo(self, operation: Operation) -> None:
        switch = self.switch
        others = [task for task in self._tasks if task is not asyncio.current_task()]
        await asyncio.gather(*others, return_exceptions=True)  # cancelled: each has put down what it held in a record
        if switch is not None and switch.is_returned:
            group = self._topology.membership.group
            await switch.until_back(GroupStamp() if group is None else group.stamp)
        elif switch is not None:
            await switch.undo(operation)
        joiners, self.joiners = list(self.joiners.values()), {}
        current = self._driver.operation
        goes_on = () if current is None or current.id == operation.id else current.goal.leaving
        serving = {engine: MemberState.SERVING for engine in operation.goal.leaving if engine not in goes_on}
        joining = {*operation.joined, *(record.engine for record in joiners)}
        if serving or any(member.engine in joining for member in self._topology.membership.joining):
            await self._topology.declare(lambda membership: without_joining(with_states(membership, serving), joining))
        unstarted = [record for record in joiners if record.is_standby]
        if unstarted:
            self._standbys.take_back(unstarted)
        await asyncio.gather(*(self._fleet.dispose(record) for record in joiners if not record.is_standby))
        for rank in operation.waiting:
            self._driver.answer(operation, Phase.ROLLING_BACK, rank)


async def put_away(engine: EngineId, topology: Topology, fleet: Fleet, timeouts: Timeouts) -> None:
    """Let requests end for the drain's time; what is left moves when clients hear that the rank is no member; then the process ends."""
    record = topology.record(engine)
    if record is None:
        return
    if topology.membership.has(engine):
        drain_s = timeouts.drain_s
        try:
            limit_s = drain_s + timeouts.stop_s
            await remote_call(record.handle.drain.remote(drain_s), limit_s=limit_s, what=f"{engine}: drain", engine=engine)
        except RaycoreError as error:
            logger.warning("pool %s: %s did not drain: %s", topology.membership.pool, engine, error)
        await topology.declare(lambda membership: without_engine(membership, engine))
    if topology.let_go(engine) is not None:
        await fleet.retire(record, 0.0)
