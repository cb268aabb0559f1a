"""The controller's part in a switch of groups: asks every participant to prepare, has the decision kept, waits for confirmations."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping, Sequence
from typing import Any

import msgspec

from actors.fleet import EngineRecord
from actors.lockstep import GroupMaker, Records
from actors.remote import remote_call
from actors.roster import brought_back, with_members, without, without_engine
from actors.together import each_of
from elastic.expert_change import plan_change
from elastic.operation import Operation
from raycore.config import Timeouts
from raycore.engines.expert_change import ExpertChange, ExpertReport
from raycore.errors import PoolError, RaycoreError
from raycore.ids import EngineId, Epoch, GroupStamp
from raycore.membership import Departure, GroupAddress, Handover, Membership, RankType, ReconfigureDistributedRequest

logger = logging.getLogger(__name__)

_UNDO_S = 2.0
"""A participant that does not take an undo in this time hangs; its own checks drop what it prepared when it is told of the next epoch."""


class GroupSwitch:
    """One operation's standby groups, from the ports to the release of the old ones. Ranks in lockstep only."""

    def __init__(self, pool: str, timeouts: Timeouts, groups: GroupMaker, before: Membership, epoch: Epoch, records: Records) -> None:
        self.before = before
        self.epoch = epoch
        """Reserved for this operation."""
        self.is_told = False
        """Members were told to go."""
        self.is_released = False
        """All have confirmed, and are about to be told: there is no way back."""
        self.is_returned = False
        """The members were told to go back, which nothing changes any more: they will not be told to let go of the old groups."""
        self._pool = pool
        self._timeouts = timeouts
        self._groups = groups
        self._records = records
        self._asked: set[EngineId] = set()
        self._then: asyncio.Task[Membership] | None = None
        self._expert_plan: ExpertChange | None = None
        self._handover: Handover | None = None
        self._drained: asyncio.Future[Any] | None = None

    @property
    def then(self) -> Membership:
        """The membership that is prepared for. PoolError before its ports are known."""
        if self._then is None or not self._then.done():
            message = f"pool {self._pool}: the next epoch's ports are not known"
            raise PoolError(message)
        return self._then.result()

    @property
    def stamp(self) -> GroupStamp:
        """Of the standby groups."""
        group = self.then.group
        return GroupStamp() if group is None else group.stamp

    async def prepare(self, operation: Operation, engine: EngineId) -> None:
        """Ask one participant, and wait until it is READY; what it raises says why it is not."""
        if self._then is None:
            self._then = asyncio.ensure_future(self._plan(operation))
        then = await asyncio.shield(self._then)
        stays = then.has(engine)
        request = ReconfigureDistributedRequest(
            operation=operation.id,
            term=then.term,
            rank_type=RankType.KEEP if stays else RankType.SHUTDOWN,
            membership=then,
            before=tuple(member.engine.rank for member in self.before.members),
            expert_plan=self._expert_plan,
            handover=self._handover,
        )
        if self._handover is not None:  # all meet in it, so it begins when all can
            if self._drained is None:
                self._drained = asyncio.gather(*map(self._drain, operation.goal.leaving))
            await asyncio.shield(self._drained)
        elif not stays:
            await self._drain(engine)
        record = self._record(engine)
        self._asked.add(engine)
        limit_s = 2 * self._timeouts.group_s + self._timeouts.control_s
        if self._expert_plan is not None:
            limit_s += self._timeouts.engine_start_s  # experts move in it
        await remote_call(record.handle.reconfigure.remote(request), limit_s=limit_s, what=f"{engine}: prepare", engine=engine)

    async def undo(self, operation: Operation) -> None:
        """Have everyone who was asked let go of it; who does not answer is said in the log."""
        for task in (self._then, self._drained):
            if task is not None and not task.done():
                task.cancel()

        async def undo(engine: EngineId) -> None:
            record = self._records(engine)
            if record is not None:
                call: Any = record.handle.undo_reconfiguration.remote(operation.id, self.before.term)
                await remote_call(call, limit_s=_UNDO_S, what=f"{engine}: undo", engine=engine)

        asked = sorted(self._asked, key=lambda e: e.rank)
        await each_of(map(undo, asked), lambda error: logger.warning("pool %s: operation %s: %s", self._pool, operation.id, error))

    async def keep(self, operation: Operation) -> dict[EngineId, RaycoreError]:
        """Give the decision to every participant; who did not take it, and why."""
        then = self.then
        failed: dict[EngineId, RaycoreError] = {}

        async def keep(engine: EngineId) -> None:
            try:
                call: Any = self._record(engine).handle.keep_decision.remote(operation.id, then.term, then)
                await remote_call(call, limit_s=self._timeouts.control_s, what=f"{engine}: decision", engine=engine)
            except RaycoreError as error:
                failed[engine] = error

        await asyncio.gather(*map(keep, (*operation.participants, *operation.goal.leaving)))
        return failed

    async def confirmed(self, engine: EngineId, stamp: GroupStamp) -> None:
        """Wait until this member has made a round in the new groups. LockstepError when they were overtaken."""
        record = self._records(engine)
        if record is None:
            return
        call: Any = record.handle.group_formed.remote(stamp)
        await remote_call(call, limit_s=self._timeouts.control_s, what=f"{engine}: confirmation", engine=engine)

    async def until_back(self, stamp: GroupStamp) -> None:
        """Wait until the members of before are back in their groups, and with their experts; who is not is said in the log."""

        async def back(engine: EngineId) -> None:
            call: Any = self._record(engine).handle.group_formed.remote(stamp)
            await remote_call(call, limit_s=self._timeouts.control_s, what=f"{engine}: way back", engine=engine)

        await each_of(map(back, self._members_before()), self._log)

    async def release(self) -> None:
        """Every member has confirmed: have all of them let go of the groups before."""

        async def release(engine: EngineId) -> None:
            record = self._records(engine)
            if record is not None:
                call: Any = record.handle.release_groups.remote(self.stamp)
                await remote_call(call, limit_s=self._timeouts.control_s, what=f"{engine}: release", engine=engine)

        await each_of((release(member.engine) for member in self.then.members), self._log)

    def _log(self, error: BaseException) -> None:
        logger.warning("pool %s: %s", self._pool, error)

    def committed(self, now: Membership, joined: Sequence[EngineId], lost: Mapping[EngineId, str]) -> Membership:
        """What is decided: the membership that was prepared, or where somebody was lost meanwhile, the others in groups of their own.

        `lost`: who did not keep the decision, and why. Experts were dealt to all who joined: without one of them the old members are what
        is left, all of them, leavers too, for nobody was told to go yet; or the pool ends.
        """
        there = {*joined, *(member.engine for member in now.members)}
        members = tuple(member for member in self.then.members if member.engine in there)
        if members == self.then.members and now.epoch < self.then.epoch:
            return msgspec.structs.replace(self.then, departed=now.departed)
        if self.before.is_expert_parallel:
            missing = next((engine for engine in self._members_before() if self._records(engine) is None), None)
            if missing is None:
                return brought_back(now, self.before, ())
            return without(now, [Departure(missing, lost.get(missing, "it is gone"))])
        return msgspec.structs.replace(now, epoch=Epoch(now.epoch + 1), members=members, joining=(), group=None)

    def without_joiners(self, now: Membership, departure: Departure) -> Membership | None:
        """The next epoch where a joiner of an expert-parallel pool is lost: the members of before, who hold every expert as they did.

        None where there is no way back: a member was lost, a rank has left, or they are about to be told to let go.
        """
        before = self._members_before()
        is_joiner = self.then.has(departure.engine) and departure.engine not in before
        is_whole = self.before.group is not None and all(now.has(engine) for engine in before)
        if not (self.before.is_expert_parallel and self._may_return and is_joiner and is_whole):
            return None
        return brought_back(now, self.before, [departure])

    def go_back(self, membership: Membership) -> GroupAddress | None:
        """Decide that the members go back to the kept groups, where a membership is the old members again and none has let go of them."""
        same = tuple(member.engine for member in membership.members) == self._members_before()
        if not self._may_return or not same:
            return None
        self.is_returned = True
        old = self.before.group
        return None if old is None else msgspec.structs.replace(old, stamp=GroupStamp(membership.epoch, membership.term), goes_back=True)

    @property
    def _may_return(self) -> bool:
        return self.is_told and not self.is_released and not self.is_returned

    def _members_before(self) -> tuple[EngineId, ...]:
        return tuple(member.engine for member in self.before.members)

    def _record(self, engine: EngineId) -> EngineRecord:
        record = self._records(engine)
        if record is None:
            message = f"{engine} is gone"
            raise PoolError(message)
        return record

    async def _plan(self, operation: Operation) -> Membership:
        """The membership after the operation, with the ports of its groups."""
        then = self.before
        for engine in operation.goal.leaving:
            then = without_engine(then, engine)
        joiners = [self._record(engine).member for engine in operation.joined]
        then = msgspec.structs.replace(
            with_members(then, [member for member in joiners if member is not None]), epoch=self.epoch, joining=(), group=None
        )
        if self.before.is_expert_parallel:
            self._expert_plan = await self._plan_experts(then)
            if operation.goal.leaving:
                leavers = [member for member in self.before.members if not then.has(member.engine)]
                self._handover = await self._groups.handover(then, leavers, self._records, limit_s=self._timeouts.control_s)
        return msgspec.structs.replace(then, group=await self._groups.ports(then, self._records, limit_s=self._timeouts.control_s))

    async def _plan_experts(self, then: Membership) -> ExpertChange:
        """Who shall have which experts, by what the members counted."""

        async def ask(engine: EngineId) -> ExpertReport:
            limit_s = self._timeouts.engine_start_s  # a rebalancing that is under way goes on beside the steps, and is waited for
            call: Any = self._record(engine).handle.expert_report.remote(limit_s)
            return await remote_call(call, limit_s=limit_s + self._timeouts.control_s, what=f"{engine}: experts", engine=engine)

        reports = await asyncio.gather(*(ask(member.engine) for member in self.before.members))
        loads = {
            layer: [float(sum(counts)) for counts in zip(*(report.load[layer] for report in reports), strict=True)]
            for layer in reports[0].load
        }
        before, after = (tuple(member.engine.rank for member in membership.members) for membership in (self.before, then))
        return plan_change(reports[0].placement, loads, before, after)

    async def _drain(self, engine: EngineId) -> None:
        """A leaver steps with the others until the switch and not after it, so it drains before; what is left moves at the switch."""
        record = self._record(engine)
        drain_s = self._timeouts.drain_s
        limit_s = drain_s + self._timeouts.stop_s
        await remote_call(record.handle.drain.remote(drain_s), limit_s=limit_s, what=f"{record.engine}: drain", engine=record.engine)
