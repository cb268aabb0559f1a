"""The controller's part in lockstep: a process group for each epoch, and a new one when members report theirs broken."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any

import msgspec

from actors.fleet import EngineRecord
from actors.remote import remote_call
from elastic.ports import allocate_stateless_group_ports, stores_of_leader
from raycore.config import Timeouts
from raycore.errors import ConfigurationError, PoolError, RaycoreError
from raycore.groups import GroupKind
from raycore.ids import EngineId
from raycore.membership import GroupAddress, Handover, Member, Membership
from raycore.messages import Beat
from raycore.waves import Phase

logger = logging.getLogger(__name__)

Records = Callable[[EngineId], EngineRecord | None]
_JOIN_GRACE_S = 5.0
"""Engines give up forming a group by their own limit; their answer takes a moment more."""


class GroupMaker:
    """Has the lowest rank serve the stores, and the members meet there. Decides nothing else."""

    def __init__(self, pool: str, timeouts: Timeouts) -> None:
        self._pool = pool
        self._timeouts = timeouts

    async def with_group(self, membership: Membership, record: Records, *, limit_s: float, before: Membership | None = None) -> Membership:
        """The membership with its groups; without them where the lowest rank does not serve their stores (`why_broken` says so then).

        The same membership for pools that step alone, and where it names its epoch's groups already. Members that are the same as `before`
        keep the groups that it names, if it names any.
        """
        if not membership.is_in_lockstep or (membership.group is not None and membership.group.stamp.epoch == membership.epoch):
            return membership
        if before is not None and membership.group is not None and _engines(before) == _engines(membership):
            return membership
        address: GroupAddress | None = None
        try:
            address = await self.ports(membership, record, limit_s=limit_s)
        except RaycoreError as error:
            logger.warning("pool %s epoch %d has no process groups yet: %s", self._pool, membership.epoch, error)
        return msgspec.structs.replace(membership, group=address)

    async def ports(self, membership: Membership, record: Records, *, limit_s: float) -> GroupAddress:
        """Have the lowest rank serve the stores of these members' groups."""
        kinds = stores_of_leader(allocate_stateless_group_ports(len(membership.members)), "cpu")
        return await self._stores(membership.members[0].engine, membership, kinds, record, limit_s)

    async def handover(self, then: Membership, leavers: Sequence[Member], record: Records, *, limit_s: float) -> Handover:
        """Have the next epoch's lowest rank, whose stores an undo closes, serve the one where its members and the leavers meet."""
        members = tuple(sorted((*then.members, *leavers), key=lambda member: member.engine.rank))
        everybody = msgspec.structs.replace(then, members=members)
        address = await self._stores(then.members[0].engine, everybody, (GroupKind.HANDOVER,), record, limit_s)
        return Handover(address, tuple(member.engine.rank for member in members))

    @staticmethod
    async def _stores(
        engine: EngineId, membership: Membership, kinds: tuple[GroupKind, ...], record: Records, limit_s: float
    ) -> GroupAddress:
        leader = record(engine)
        if leader is None:
            message = f"{engine} is gone"
            raise PoolError(message)
        call: Any = leader.handle.allocate_stateless_group_ports.remote(membership, kinds)
        return await remote_call(call, limit_s=limit_s, what=f"{engine}: stores", engine=engine)

    async def until_formed(self, membership: Membership, records: Sequence[EngineRecord]) -> None:
        """Wait until every member has the group. LockstepError or DeadlineError with the rank that has not."""
        if membership.group is None:
            return
        limit_s = self._timeouts.group_s + _JOIN_GRACE_S
        for record in records:
            call: Any = record.handle.group_formed.remote(membership.group.stamp)
            await remote_call(call, limit_s=limit_s, what=f"{record.engine}: process group", engine=record.engine)

    async def release(self, membership: Membership, records: Sequence[EngineRecord]) -> None:
        """After a controller's restart: once every member is in its groups, those before them go; nobody else will say so."""
        if membership.group is None:
            return
        try:
            await self.until_formed(membership, records)
            for record in records:
                call: Any = record.handle.release_groups.remote(membership.group.stamp)
                await remote_call(call, limit_s=self._timeouts.control_s, what=f"{record.engine}: release", engine=record.engine)
        except RaycoreError as error:
            logger.warning("pool %s: groups are kept until the next switch: %s", self._pool, error)


def _engines(membership: Membership) -> set[EngineId]:
    return {member.engine for member in membership.members}


def check_alike(membership: Membership) -> None:
    """Ranks step together with the same interval, or each alone. ConfigurationError otherwise."""
    intervals = {member.info.sync_interval for member in membership.members}
    if len(intervals) > 1:
        message = f"the ranks' engines differ in sync_interval: {sorted(intervals)}; all must step together, or each alone"
        raise ConfigurationError(message)


def why_broken(membership: Membership, last_beat: Callable[[EngineId], Beat | None]) -> str:
    """Why the members need a new group; empty while they do not."""
    if not membership.is_in_lockstep:
        return ""
    if membership.group is None:
        return "it has none"
    for member in membership.members:
        beat = last_beat(member.engine)
        report = None if beat is None else beat.wave
        if report is not None and report.stamp > membership.group.stamp:
            # The last word of the controller before this one came to it before this one's first.
            return f"{member.engine} is in {report.stamp}, decided is {membership.group.stamp}"
        if report is not None and report.stamp == membership.group.stamp and report.phase is Phase.BROKEN:
            return f"{member.engine}: {report.failure or 'broken'}"
    return ""
