"""The driver of scaling operations: carries out what `elastic/operation.py` decides, with Ray's groups and actors."""

from __future__ import annotations

import asyncio
import itertools
import logging
import secrets
from collections import deque
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from typing import Any, Protocol

import msgspec

from actors.fleet import EngineRecord, Fleet
from actors.lockstep import Records
from actors.pool_observer import Observer
from actors.pool_state import make_alike
from actors.remote import remote_call
from actors.roster import with_joining, with_members, with_states, without_engine, without_joining
from actors.standby import StandbyKeeper
from actors.switching import GroupSwitch
from actors.together import all_of
from elastic import operation as machine
from elastic.operation import Command, Goal, Operation, Outcome, Phase
from raycore.client.control import ScalingReport
from raycore.config import Timeouts
from raycore.errors import (
    CapacityError,
    DeadlineError,
    InvalidArgumentsError,
    PoolError,
    RaycoreError,
    ScalingBusyError,
    ScalingError,
    UnknownRankError,
)
from raycore.ids import EngineId, GroupStamp, Rank
from raycore.load_progress import WeightProgress, added
from raycore.membership import Departure, GroupAddress, Membership, MemberState

logger = logging.getLogger(__name__)

_HISTORY = 16
_MOST_RANKS = 10_000


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


class PoolScaler:
    """One operation at a time; the state machine's only caller. Runs on the controller's event loop."""

    def __init__(
        self, pool: str, topology: Topology, fleet: Fleet, timeouts: Timeouts, standbys: StandbyKeeper, observer: Observer
    ) -> None:
        self._pool = pool
        self._topology = topology
        self._fleet = fleet
        self._timeouts = timeouts
        self._standbys = standbys
        self._observer = observer
        self.wanted_size = 0
        """Ranks that somebody asked for last."""
        self._is_replacement = False
        self._operation: Operation | None = None
        self._joiners: dict[Rank, EngineRecord] = {}
        self._started: list[EngineRecord] = []
        """Joiners of the newest operation, for what is said of their weights."""
        self._ended: asyncio.Future[ScalingReport] | None = None
        self._cause: BaseException | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._switch: GroupSwitch | None = None
        self._tasks: dict[asyncio.Task[None], str] = {}
        """With the operation of each: what an undo left behind when its time was over may run beside the next one."""
        self._begun: set[asyncio.Task[ScalingReport]] = set()
        """Operations that nobody waits for; their ends are in the history."""
        self._is_closed = False
        self._numbers = itertools.count(1)
        self._history: deque[Operation] = deque(maxlen=_HISTORY)

    # -- from callers -----------------------------------------------------------------------------------------------------

    async def scale(self, target: int) -> ScalingReport:
        """Grow or shrink to `target` ranks: the lowest free ranks join, the highest leave."""
        if isinstance(target, bool) or not isinstance(target, int) or not 1 <= target <= _MOST_RANKS:
            message = f"data_parallel_size must be an integer from 1 to {_MOST_RANKS}, not {target!r}"
            raise InvalidArgumentsError(message, method="scale_elastic_ep")
        running = self._operation
        if running is not None:
            return await self._join(running, is_same=running.goal.target == target)
        members = self._members()
        taken = {engine.rank for engine in members}
        if target >= len(members):
            free = (Rank(rank) for rank in itertools.count() if rank not in taken)
            return await self._begin(self._goal(members, joining=tuple(itertools.islice(free, target - len(members)))))
        return await self._begin(self._goal(members[:target], leaving=members[target:]))

    async def begin(self, target: int) -> str:
        """Begin as `scale` does; the operation's id, while it goes on by itself. What `scale` refuses at once is raised here."""
        scaling = asyncio.create_task(self.scale(target))
        self._begun.add(scaling)
        scaling.add_done_callback(self._forget_begun)
        await asyncio.sleep(0)  # its first step: now it is the running operation, or waits for the same one, or has been refused
        if scaling.done():
            return scaling.result().operation
        assert self._operation is not None  # noqa: S101 -- `scale` waits for nothing else
        return self._operation.id

    async def remove(self, ranks: Sequence[int]) -> ScalingReport:
        """Have these ranks leave."""
        members = self._members()
        wanted = set(ranks)
        unknown = wanted - {engine.rank for engine in members}
        if unknown or not wanted:
            serving = [engine.rank for engine in members]
            message = f"ranks {sorted(unknown)} do not serve; ranks are {serving}" if unknown else "no rank was named"
            raise UnknownRankError(message)
        stay = tuple(engine for engine in members if engine.rank not in wanted)
        if not stay:
            message = "a pool keeps at least one rank; end it with shutdown"
            raise InvalidArgumentsError(message, method="remove_ranks")
        running = self._operation
        if running is not None:
            return await self._join(running, is_same={engine.rank for engine in running.goal.leaving} == wanted)
        return await self._begin(self._goal(stay, leaving=tuple(engine for engine in members if engine.rank in wanted)))

    async def replace(self, rank: Rank) -> None:
        """Bring a rank back that was lost, once no operation runs; nothing when the pool has as many ranks as were asked for last."""
        while self._operation is not None and self._ended is not None:
            await asyncio.wait([self._ended])
        members = self._members()
        if len(members) >= self.wanted_size or any(engine.rank == rank for engine in members):
            return
        try:
            report = await self._begin(self._goal(members, joining=(rank,)), is_replacement=True)
        except RaycoreError as error:
            logger.warning("pool %s: rank %d was not replaced: %s", self._pool, rank, error)
        else:
            logger.warning("pool %s: rank %d was replaced in %.3g s", self._pool, rank, sum(report.phases_s.values()))

    async def evacuate(self, engines: Sequence[EngineId]) -> None:
        """Have other ranks serve for these, whose nodes go; without room for others the pool shrinks, down to one rank."""
        while self._operation is not None and self._ended is not None:
            await asyncio.wait([self._ended])
        members = self._members()
        leaving = tuple(engine for engine in members if engine in engines)
        stay = tuple(engine for engine in members if engine not in engines)
        if not leaving:
            return
        taken = {engine.rank for engine in members}
        free = (Rank(rank) for rank in itertools.count() if rank not in taken)
        joining = tuple(itertools.islice(free, len(leaving)))
        try:
            try:
                await self._begin(self._goal(stay, joining, leaving), is_replacement=True)
            except CapacityError:
                if not stay:
                    raise
                await self._begin(self._goal(stay, leaving=leaving), is_replacement=True)
        except RaycoreError as error:
            logger.warning("pool %s: %d ranks whose nodes go could not be moved: %s", self._pool, len(leaving), error)

    def cancel(self, operation: str) -> bool:
        """Undo the running operation of this id; whether it could be: after the decision it is finished instead."""
        running = self._operation
        if running is None or running.id != operation or running.phase.is_decided or running.phase is Phase.ROLLING_BACK:
            return False
        self._take(machine.cancelled(running, self._now()))
        return True

    def status(self) -> list[dict[str, Any]]:
        """The running operation and the last ones, newest first, for people."""
        found = [*([] if self._operation is None else [self._operation]), *reversed(self._history)]
        weights = [added(record.weights for record in self._started), *[WeightProgress()] * len(found)]
        return [_status(operation, of, self._now()) for operation, of in zip(found, weights, strict=False)]

    # -- from the controller ----------------------------------------------------------------------------------------------

    def on_lost(self, engine: EngineId, cause: str) -> None:
        """An engine core is gone."""
        if self._operation is not None:
            self._take(machine.died(self._operation, engine, cause, self._now()))

    @property
    def target_size(self) -> int:
        """Ranks that the running operation leads to, or that somebody asked for last."""
        return self.wanted_size if self._operation is None else self._operation.goal.target

    @property
    def is_committing(self) -> bool:
        """Whether an operation is decided and its members have not all confirmed."""
        return self._operation is not None and self._operation.phase is Phase.COMMIT

    def on_regrouped(self) -> None:
        """The members got new groups because theirs broke: what was prepared beside those is of no use."""
        if self._operation is not None and self._switch is not None:
            self._take(machine.failed(self._operation, "the members' process groups broke and were replaced", self._now()))

    async def finish_retiring(self) -> None:
        """After a controller's restart: who was decided to leave leaves; who was only asked to serves again."""
        members = self._topology.membership.members
        if any(member.state is MemberState.LEAVING for member in members):
            await self._topology.declare(lambda membership: with_states(membership, {}, {MemberState.LEAVING: MemberState.SERVING}))
        retiring = [member.engine for member in members if member.state is MemberState.RETIRING]
        await asyncio.gather(*(self._put_away(engine) for engine in retiring))

    async def close(self) -> None:
        """The pool ends: joiners are put away, whoever waits is told, and nothing is begun any more."""
        self._is_closed = True
        if self._timer is not None:
            self._timer.cancel()
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        joiners, self._joiners = list(self._joiners.values()), {}
        await asyncio.gather(*(self._fleet.dispose(record) for record in joiners))
        self._operation = self._switch = None
        if self._ended is not None and not self._ended.done():
            self._ended.set_exception(PoolError(f"pool {self._pool!r} was taken down while it scaled"))
            self._ended.exception()

    def without_joiners(self, now: Membership, departure: Departure) -> Membership | None:
        """The next epoch where this loss takes an expert-parallel pool back to the members of before; None where it does not."""
        is_told = self._switch is not None and self._switch.is_told
        return self._switch.without_joiners(now, departure) if self._switch is not None and is_told else None

    def go_back(self, membership: Membership) -> GroupAddress | None:
        """The groups that the members of this next epoch have kept, if an operation that is being committed comes to nothing in it.

        It is decided by asking: what is answered must be told.
        """
        return None if self._switch is None else self._switch.go_back(membership)

    def on_returned(self, joiners: Sequence[EngineRecord], cause: str) -> None:
        """The members of before are all there is, and are about to be told; these joiners are no members any more and are put away."""
        if self._operation is not None:
            self._joiners.update({record.engine.rank: record for record in joiners})
            self._take(machine.returned(self._operation, cause, self._now()))

    # -- one operation ----------------------------------------------------------------------------------------------------

    async def _begin(self, goal: Goal, *, is_replacement: bool = False) -> ScalingReport:
        if self._is_closed:
            message = f"pool {self._pool!r} is being taken down"
            raise PoolError(message)
        timeouts = self._timeouts
        moving_s = timeouts.group_s + timeouts.engine_start_s if self._topology.membership.is_expert_parallel else 0.0
        limits_s = {
            Phase.RESERVE: timeouts.reserve_s + timeouts.stop_s,
            Phase.SPAWN: timeouts.engine_start_s,
            Phase.PREPARE: timeouts.control_s + (timeouts.drain_s + 2 * timeouts.group_s if goal.is_in_lockstep else 0.0) + moving_s,
            Phase.READY: timeouts.engine_start_s,  # adapters are loaded in it
            # the decision is kept, everybody is told, and confirms: who does not is ended and named before the phase's time is over
            Phase.COMMIT: timeouts.control_s * (3 if goal.is_in_lockstep else 1),
            Phase.RETIRE: timeouts.drain_s + 4 * timeouts.stop_s + timeouts.control_s,
            Phase.ROLLING_BACK: 4 * timeouts.stop_s + timeouts.control_s,
        }
        operation_id = f"{self._pool}-{next(self._numbers)}-{secrets.token_hex(2)}"
        self._joiners, self._cause, self._switch = {}, None, None
        self._started = []
        self._is_replacement = is_replacement
        ended: asyncio.Future[ScalingReport] = asyncio.get_running_loop().create_future()
        self._ended = ended
        operation, commands = machine.begin(operation_id, goal, limits_s, self._now())
        self._take((operation, ()))  # from here on it is the running one
        if goal.leaving:
            leaving = dict.fromkeys(goal.leaving, MemberState.LEAVING)
            await self._topology.declare(lambda membership: with_states(membership, leaving))
        now = self._operation
        if now is not None and (now.id, now.phase) == (operation.id, operation.phase):  # not cancelled, nor failed, while members were told
            for command in commands:
                self._carry_out(command, now)
        return await asyncio.shield(ended)

    async def _join(self, running: Operation, *, is_same: bool) -> ScalingReport:
        if is_same and running.phase is not Phase.ROLLING_BACK and self._ended is not None:
            return await asyncio.shield(self._ended)
        message = f"operation {running.id} to {running.goal.target} ranks is in {running.phase}"
        raise ScalingBusyError(message, operation=running.id, phase=running.phase)

    def _goal(self, stay: tuple[EngineId, ...], joining: tuple[Rank, ...] = (), leaving: tuple[EngineId, ...] = ()) -> Goal:
        return Goal(stay, joining, leaving, is_in_lockstep=self._topology.membership.is_in_lockstep)

    def _members(self) -> tuple[EngineId, ...]:
        return tuple(sorted((member.engine for member in self._topology.membership.members), key=lambda engine: engine.rank))

    def _take(self, outcome: Outcome) -> None:
        """Keep the new state and start what it commands."""
        operation, commands = outcome
        before = self._operation
        self._operation = operation
        self._observer.on_operation(before, operation)
        if before is None or before.phase is not operation.phase:
            logger.info("pool %s: operation %s: %s %s", self._pool, operation.id, operation.phase, operation.error)
            self._set_timer(operation)
        for command in commands:
            self._carry_out(command, operation)

    def _set_timer(self, operation: Operation) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if not operation.phase.is_end:
            self._timer = asyncio.get_running_loop().call_at(operation.due_s, self._expire)

    def _expire(self) -> None:
        if self._operation is not None:
            self._take(machine.expired(self._operation, self._now()))

    def _carry_out(self, command: Command, operation: Operation) -> None:
        if command is Command.REPORT:
            self._report(operation)
            return
        if command is Command.UNDO:
            for task in self._tasks_of(operation):
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
            self._spawn(each, operation)

    def _report(self, operation: Operation) -> None:
        self._standbys.release()
        self._history.append(operation)
        self._operation = self._switch = None
        ended, self._ended = self._ended, None
        if ended is None or ended.done():
            return
        if operation.phase is Phase.DONE:
            if not self._is_replacement:
                self.wanted_size = operation.goal.target
            ended.set_result(self._result(operation))
            return
        if isinstance(self._cause, RaycoreError):
            error: RaycoreError = self._cause
        else:
            phase = operation.transitions[-3].phase  # before ROLLING_BACK and UNDONE, which follow on each other
            error = ScalingError(f"operation {operation.id} was undone: {operation.error}", operation=operation.id, phase=phase)
        ended.set_exception(error)
        ended.exception()  # whoever waits raises it; if nobody does, the history has it

    def _result(self, operation: Operation) -> ScalingReport:
        steps, weights = operation.transitions, added(record.weights for record in self._started)
        return ScalingReport(
            operation=operation.id,
            ranks=tuple(engine.rank for engine in self._members()),
            joined=tuple(engine.rank for engine in operation.joined),
            left=tuple(engine.rank for engine in operation.goal.leaving),
            phases_s={str(step.phase): after.at_s - step.at_s for step, after in itertools.pairwise(steps)},
            weight_bytes=weights.bytes,
            weight_bytes_from_disk=weights.from_disk_bytes,
        )

    # -- what commands do -------------------------------------------------------------------------------------------------

    async def _reserve(self, operation: Operation) -> None:
        self._standbys.hold()
        standbys = self._standbys.take(operation.goal.joining)
        self._joiners.update(standbys)
        ranks = [rank for rank in operation.goal.joining if rank not in standbys]
        nodes = await self._topology.planned_nodes(len(ranks)) if ranks else ()
        for rank in standbys:
            self._answer(operation, Phase.RESERVE, rank)

        async def reserve(rank: Rank, node_id: str) -> None:
            record = self._joiners[rank] = self._fleet.new_record(rank)
            await self._fleet.reserve(record, node_id)
            self._answer(operation, Phase.RESERVE, rank)

        await all_of(reserve(rank, node_id) for rank, node_id in zip(ranks, nodes, strict=True))

    async def _start_joiner(self, operation: Operation, rank: Rank) -> None:
        record = self._joiners[rank]
        self._started.append(record)
        members = [found for member in self._topology.membership.members if (found := self._topology.record(member.engine)) is not None]
        await self._fleet.start(record, is_joining=True, members=members)
        self._answer(operation, Phase.SPAWN, rank, record.engine)

    async def _prepare_all(self, operation: Operation) -> None:
        """Have everybody know who joins: from here on clients tell joiners what they tell all ranks."""
        joining = [record.member for engine in operation.joined if (record := self._joiners[engine.rank]).member is not None]
        if joining:
            await self._topology.declare(lambda membership: with_joining(membership, joining))
        leavers: tuple[EngineId, ...] = ()
        if operation.goal.is_in_lockstep:
            self._switch = self._topology.switch(self._record)
            leavers = operation.goal.leaving
        await all_of(self._prepare(operation, engine) for engine in (*operation.participants, *leavers))

    async def _prepare(self, operation: Operation, engine: EngineId) -> None:
        """A dense rank has nothing to build: it must only know the pool, and who joins. Ranks in lockstep build their groups."""
        record = self._record(engine)
        if record is None:
            message = f"{engine} is no member any more"
            raise PoolError(message)
        ref = record.handle.set_membership.remote(self._topology.membership)
        await remote_call(ref, limit_s=self._timeouts.control_s, what=f"{engine}: prepare", engine=engine)
        if self._switch is not None:
            await self._switch.prepare(operation, engine)
        self._answer(operation, Phase.PREPARE, engine.rank)

    async def _compare(self, operation: Operation, engine: EngineId) -> None:
        """Make a joiner like the members: adapters, weight version, pause, sleep. Every member knows of it by now."""
        await make_alike(self._joiners[engine.rank], self._topology, limit_s=self._timeouts.engine_start_s)
        self._answer(operation, Phase.READY, engine.rank)

    def _record(self, engine: EngineId) -> EngineRecord | None:
        """Of a member or of a joiner that was spawned."""
        joiner = self._joiners.get(engine.rank)
        return joiner if joiner is not None and joiner.engine == engine else self._topology.record(engine)

    def _releases(self) -> list[Coroutine[Any, Any, None]]:
        """Decided here and now, so that a loss in the next moment finds no way back; nothing to release where they went back."""
        if self._switch is None or self._switch.is_returned:
            return []
        self._switch.is_released = True
        return [self._switch.release()]

    async def _switch_groups(self, operation: Operation, switch: GroupSwitch) -> None:
        """The decision is kept by all, then all are told to go. Who does not keep it is ended, and the others go on without it."""
        failed = await switch.keep(operation)
        was_overtaken = self._topology.membership.epoch > switch.epoch
        joiners = [self._joiners.pop(engine.rank) for engine in operation.joined]
        lost = [record for record in joiners if record.engine in failed]
        for leaver in set(operation.goal.leaving) & set(failed):  # it would hold up the vote; without it the others switch at once
            record = self._topology.let_go(leaver)
            if record is not None:
                await self._fleet.dispose(record)
        causes = {engine: str(error) for engine, error in failed.items()}
        switch.is_told = True
        if lost and switch.before.is_expert_parallel:
            self._joiners.update({record.engine.rank: record for record in joiners})  # put away by the undo, or with the pool
            await self._topology.declare(lambda now: switch.committed(now, (), causes))
            if switch.is_returned:
                self.on_returned((), "; ".join(f"{record.engine} did not keep the decision: {causes[record.engine]}" for record in lost))
            return
        stay = [record for record in joiners if record not in lost]
        added = [record.engine for record in stay]
        await self._topology.declare(lambda now: switch.committed(now, added, causes), stay)
        for record in lost:
            self.on_lost(record.engine, str(failed[record.engine]))
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
        self._answer(operation, Phase.COMMIT, engine.rank)

    def _culprit(self, engine: EngineId) -> EngineId:
        """Who is ended when this one takes too long: its round waits for all of them, and without a joiner there is a way back."""
        operation = self._operation
        joined = () if operation is None else operation.joined
        return next((joiner for joiner in joined if operation is not None and joiner.rank in operation.waiting), engine)

    async def _decide(self, operation: Operation) -> None:
        if self._switch is not None:
            await self._switch_groups(operation, self._switch)
            switch, current = self._switch, self._operation
            if switch is None or (current is not None and current.phase is Phase.ROLLING_BACK):
                return  # they went back
            engines = operation.participants if current is None else current.participants
            await asyncio.gather(*(self._confirm(operation, switch, engine) for engine in engines))
            return
        joiners = [self._joiners.pop(engine.rank) for engine in operation.joined]
        retiring = dict.fromkeys(operation.goal.leaving, MemberState.RETIRING)
        added = [record.member for record in joiners if record.member is not None]
        await self._topology.declare(lambda membership: with_states(with_members(membership, added), retiring), joiners)
        for engine in operation.participants:
            self._answer(operation, Phase.COMMIT, engine.rank)

    async def _retire(self, operation: Operation, engine: EngineId) -> None:
        await self._put_away(engine)
        self._answer(operation, Phase.RETIRE, engine.rank)

    async def _put_away(self, engine: EngineId) -> None:
        """Let requests end for the drain's time; what is left moves when clients hear that the rank is no member; then the process ends."""
        record = self._topology.record(engine)
        if record is None:
            return
        if self._topology.membership.has(engine):
            drain_s = self._timeouts.drain_s
            try:
                limit_s = drain_s + self._timeouts.stop_s
                await remote_call(record.handle.drain.remote(drain_s), limit_s=limit_s, what=f"{engine}: drain", engine=engine)
            except RaycoreError as error:
                logger.warning("pool %s: %s did not drain: %s", self._pool, engine, error)
            await self._topology.declare(lambda membership: without_engine(membership, engine))
        if self._topology.let_go(engine) is not None:
            await self._fleet.retire(record, 0.0)

    async def _undo(self, operation: Operation) -> None:
        held, switch = self._joiners, self._switch  # of this operation: the next one may begin before the last of them is put away
        others = [task for task in self._tasks_of(operation) if task is not asyncio.current_task()]
        await asyncio.gather(*others, return_exceptions=True)  # cancelled: each has put down what it held in a record
        if switch is not None and switch.is_returned:
            group = self._topology.membership.group
            await switch.until_back(GroupStamp() if group is None else group.stamp)
        elif switch is not None:
            await switch.undo(operation)
        joiners = list(held.values())
        held.clear()
        goes_on = () if self._operation is None or self._operation.id == operation.id else self._operation.goal.leaving
        serving = {engine: MemberState.SERVING for engine in operation.goal.leaving if engine not in goes_on}
        joining = {*operation.joined, *(record.engine for record in joiners)}
        if serving or any(member.engine in joining for member in self._topology.membership.joining):
            await self._topology.declare(lambda membership: without_joining(with_states(membership, serving), joining))
        await asyncio.gather(*(self._fleet.dispose(record) for record in joiners))
        for rank in operation.waiting:
            self._answer(operation, Phase.ROLLING_BACK, rank)

    # -- within -----------------------------------------------------------------------------------------------------------

    def _answer(self, operation: Operation, phase: Phase, rank: Rank, engine: EngineId | None = None) -> None:
        """What was left running when a phase's time was over may answer when the next operation runs."""
        if self._operation is not None and self._operation.id == operation.id:
            self._take(machine.answered(self._operation, phase, rank, self._now(), engine))

    def _spawn(self, work: Coroutine[Any, Any, None], operation: Operation) -> None:
        task = asyncio.create_task(self._guarded(work, operation))
        self._tasks[task] = operation.id
        task.add_done_callback(self._tasks.pop)

    def _tasks_of(self, operation: Operation) -> list[asyncio.Task[None]]:
        return [task for task, of in self._tasks.items() if of == operation.id]

    async def _guarded(self, work: Awaitable[None], operation: Operation) -> None:
        try:
            await work
        except Exception as error:
            current = self._operation
            if current is None or current.id != operation.id:
                return
            if current.phase.is_decided or current.phase is Phase.ROLLING_BACK:
                logger.exception("pool %s: operation %s: %s", self._pool, operation.id, current.phase)
                return
            self._cause = self._cause or error
            self._take(machine.failed(current, str(error), self._now()))

    def _forget_begun(self, scaling: asyncio.Task[ScalingReport]) -> None:
        self._begun.discard(scaling)
        if not scaling.cancelled() and scaling.exception() is not None:
            logger.info("pool %s: %s", self._pool, scaling.exception())

    @staticmethod
    def _now() -> float:
        return asyncio.get_running_loop().time()


def _status(operation: Operation, weights: WeightProgress, now_s: float) -> dict[str, Any]:
    begun_s = operation.transitions[0].at_s
    return {
        "operation": operation.id,
        "target": operation.goal.target,
        "phase": str(operation.phase),
        "joining": [*operation.goal.joining],
        "leaving": [engine.rank for engine in operation.goal.leaving],
        "waiting_for": sorted(operation.waiting),
        "error": operation.error,
        "weights": msgspec.to_builtins(weights),
        "age_s": round(now_s - begun_s, 3),
        "phases": [{"phase": str(step.phase), "after_s": round(step.at_s - begun_s, 4)} for step in operation.transitions],
    }
