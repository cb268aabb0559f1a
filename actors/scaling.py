"""The driver of scaling operations: what callers ask, what `elastic/operation.py` decides, and what is reported of it."""

from __future__ import annotations

import asyncio
import itertools
import logging
import secrets
from collections import deque
from collections.abc import Sequence
from typing import Any

import msgspec

from actors.fleet import EngineRecord, Fleet
from actors.operation_work import OperationWork, Topology, put_away
from actors.pool_observer import Observer
from actors.roster import with_states
from actors.standby import StandbyKeeper
from actors.switching import GroupSwitch
from elastic import operation as machine
from elastic.operation import Command, Goal, Operation, Outcome, Phase
from raycore.client.control import ScalingReport
from raycore.config import Timeouts
from raycore.errors import (
    CapacityError,
    InvalidArgumentsError,
    PoolError,
    RaycoreError,
    ScalingBusyError,
    ScalingError,
    UnknownRankError,
)
from raycore.ids import EngineId, Rank
from raycore.load_progress import WeightProgress, added
from raycore.membership import Departure, GroupAddress, Membership, MemberState

logger = logging.getLogger(__name__)

_HISTORY = 16
_MOST_RANKS = 10_000


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
        self._work: OperationWork | None = None
        """The newest operation's."""
        self._late: list[OperationWork] = []
        """Of operations before it, whose undo was given up and may go on."""
        self._ended: asyncio.Future[ScalingReport] | None = None
        self._cause: BaseException | None = None
        self._timer: asyncio.TimerHandle | None = None
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
        await self._until_idle()
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
        """Have other ranks serve for these, whose nodes go; without room for others, as many as there are standbys: the pool shrinks, down
        to one rank."""
        try:
            try:
                await self._evacuate(engines, only_standbys=False)
            except CapacityError:
                await self._evacuate(engines, only_standbys=True)  # these need no room
        except RaycoreError as error:
            logger.warning("pool %s: %d ranks whose nodes go could not be moved: %s", self._pool, len(engines), error)

    async def _evacuate(self, engines: Sequence[EngineId], *, only_standbys: bool) -> None:
        await self._until_idle()
        members = self._members()
        leaving = tuple(engine for engine in members if engine in engines)
        stay = tuple(engine for engine in members if engine not in engines)
        if not leaving:
            return
        taken = {engine.rank for engine in members}
        free = (Rank(rank) for rank in itertools.count() if rank not in taken)
        room = min(len(leaving), self._standbys.warm) if only_standbys else len(leaving)
        joining = tuple(itertools.islice(free, room))
        if not stay and not joining:
            message = "no other node has room for a rank, and none would be left"
            raise CapacityError(message)
        await self._begin(self._goal(stay, joining, leaving), is_replacement=True)

    async def _until_idle(self) -> None:
        """Until no operation runs; who waits next begins at once, and the others see that one runs."""
        while self._operation is not None and self._ended is not None:
            await asyncio.wait([self._ended])

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
        weights = [self._weights(), *[WeightProgress()] * len(found)]
        return [_status(operation, of, self._now()) for operation, of in zip(found, weights, strict=False)]

    # -- from an operation's work -----------------------------------------------------------------------------------------

    @property
    def operation(self) -> Operation | None:
        """The one that runs now."""
        return self._operation

    def answer(self, operation: Operation, phase: Phase, rank: Rank, engine: EngineId | None = None) -> None:
        """What was left running when a phase's time was over may answer when the next operation runs."""
        if self._operation is not None and self._operation.id == operation.id:
            self._take(machine.answered(self._operation, phase, rank, self._now(), engine))

    def fail(self, operation: Operation, error: Exception) -> None:
        """A command went wrong, which undoes before the decision, and is in the log after it."""
        current = self._operation
        if current is None or current.id != operation.id:
            return
        if current.phase.is_decided or current.phase is Phase.ROLLING_BACK:
            logger.error("pool %s: operation %s: %s", self._pool, operation.id, current.phase, exc_info=error)
            return
        self._cause = self._cause or error
        self._take(machine.failed(current, str(error), self._now()))

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
        await asyncio.gather(*(put_away(engine, self._topology, self._fleet, self._timeouts) for engine in retiring))

    async def close(self) -> None:
        """The pool ends: joiners are put away, whoever waits is told, and nothing is begun any more."""
        self._is_closed = True
        if self._timer is not None:
            self._timer.cancel()
        await asyncio.gather(*(work.close() for work in (*self._late, *([] if self._work is None else [self._work]))))
        self._operation = None
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
        if self._operation is not None and self._work is not None:
            self._work.joiners.update({record.engine.rank: record for record in joiners})
            self._take(machine.returned(self._operation, cause, self._now()))

    # -- one operation ----------------------------------------------------------------------------------------------------

    async def _begin(self, goal: Goal, *, is_replacement: bool = False) -> ScalingReport:
        if self._is_closed:
            message = f"pool {self._pool!r} is being taken down"
            raise PoolError(message)
        if self._operation is not None:
            await self._join(self._operation, is_same=False)
        timeouts = self._timeouts
        moving_s = timeouts.group_s + timeouts.engine_start_s if self._topology.membership.is_expert_parallel else 0.0
        limits_s = {
            Phase.RESERVE: timeouts.reserve_s + timeouts.stop_s,
            Phase.SPAWN: timeouts.engine_start_s * (len(goal.joining) if self._fleet.takes_turns else 1),
            Phase.PREPARE: timeouts.control_s + (timeouts.drain_s + 2 * timeouts.group_s if goal.is_in_lockstep else 0.0) + moving_s,
            Phase.READY: timeouts.engine_start_s,  # adapters are loaded in it
            # the decision is kept, everybody is told, and confirms: who does not is ended and named before the phase's time is over
            Phase.COMMIT: timeouts.control_s * (3 if goal.is_in_lockstep else 1),
            Phase.RETIRE: timeouts.drain_s + 4 * timeouts.stop_s + timeouts.control_s,
            Phase.ROLLING_BACK: 4 * timeouts.stop_s + timeouts.control_s,
        }
        operation_id = f"{self._pool}-{next(self._numbers)}-{secrets.token_hex(2)}"
        self._late = [work for work in (*self._late, self._work) if work is not None and work.is_busy]
        self._work = OperationWork(self._pool, self._topology, self._fleet, self._timeouts, self._standbys, self)
        self._standbys.hold()
        self._cause = None
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
        assert self._work is not None  # noqa: S101 -- it was made with the operation
        self._work.carry_out(command, operation)

    def _report(self, operation: Operation) -> None:
        self._standbys.release()
        self._history.append(operation)
        self._operation = None
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
        steps, weights = operation.transitions, self._weights()
        return ScalingReport(
            operation=operation.id,
            ranks=tuple(engine.rank for engine in self._members()),
            joined=tuple(sorted(engine.rank for engine in operation.joined)),
            left=tuple(engine.rank for engine in operation.goal.leaving),
            phases_s={str(step.phase): after.at_s - step.at_s for step, after in itertools.pairwise(steps)},
            weight_bytes=weights.bytes,
            weight_bytes_from_disk=weights.from_disk_bytes,
        )

    # -- within -----------------------------------------------------------------------------------------------------------

    @property
    def _switch(self) -> GroupSwitch | None:
        """Of the operation that runs."""
        return None if self._operation is None or self._work is None else self._work.switch

    def _weights(self) -> WeightProgress:
        """What the joiners of the newest operation got."""
        return added(() if self._work is None else (record.weights for record in self._work.started))

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
