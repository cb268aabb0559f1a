"""A simulated engine core: the shipped wave, rack and participation machines around a loop on the virtual clock."""

from __future__ import annotations

import asyncio
import contextlib
from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

from actors.engine_actor import EngineDescription
from raycore import participation
from raycore.core.beats import Progress
from raycore.core.lockstep import Lockstep
from raycore.engine import EngineInfo
from raycore.errors import LockstepError, RaycoreError
from raycore.groups import EPOCH_KINDS, GroupKind, GroupSet, ProcessGroup
from raycore.ids import EngineId, GroupStamp, Term
from raycore.membership import Endpoints, GroupAddress, Handover, Member, Membership, RankType, ReconfigureDistributedRequest
from raycore.messages import Wake
from raycore.participation import Part, Participation, Stage
from raycore.pool_state import PoolState
from tests.simulation.wires import Wire, WireEnd, Work

if TYPE_CHECKING:
    from tests.simulation.world import World

STEP_S = 0.002
GROUP_S = 3.0


class Admitted:
    """A request on this engine."""

    def __init__(self, request: int, admission: int, total: int, at: int) -> None:
        self.request, self.admission, self.total, self.at = request, admission, total, at


class SimEngine:
    """What an engine actor is, without threads: calls run as coroutines, what touches the wave is posted to the loop's next turn."""

    def __init__(self, world: World, engine: EngineId, group_id: str, sync_interval: int, *, is_expert_parallel: bool = False) -> None:
        self.world, self.id, self.group_id = world, engine, group_id
        kinds = {"sync_interval": sync_interval, "is_expert_parallel": is_expert_parallel}
        self.info = EngineInfo("sim", "sim", 1000, 4096, 1 << 20, ("generate",), **kinds)
        self.member = Member(engine, Endpoints("h", f"r{engine}", f"b{engine}"), self.info, world.next_pid())
        self.membership = Membership("sim")
        self.kept: Membership | None = None
        self.part = Participation()
        self.is_alive, self.frozen_until_s = True, 0.0
        self.has_pool_state = False
        self.died: asyncio.Future[None] = world.loop.create_future()
        self.formed: dict[GroupStamp, asyncio.Future[None]] = {}
        self.begun: set[GroupStamp] = set()
        self.built: asyncio.Future[None] | None = None
        self.admitted: dict[int, Admitted] = {}
        self.group: ProcessGroup | None = None
        self.ends: list[WireEnd] = []
        self.steps = 0
        self.lockstep: Lockstep | None = None
        self._mail: deque[Callable[[], None]] = deque()
        self._wake = asyncio.Event()
        self._peers: list[EngineId] = []
        if sync_interval:
            self.lockstep = Lockstep(self, engine, self, Progress(30.0), collective_s=30.0, regroup_s=600.0, clock=world.loop.time)
            self.lockstep.wake_core = self._wake.set
            self.lockstep.on_stamp = self._confirm
            self.wave_seen = self.lockstep.wave

    # -- what the lockstep needs: an engine, peers ---------------------------------------------------------------------------

    def set_group(self, group: ProcessGroup | None) -> None:
        self.group, self.steps = group, 0

    def set_peers(self, peers: dict[EngineId, Endpoints]) -> None:
        self._peers = list(peers)

    def send(self, wake: Wake) -> None:
        for peer in self._peers:
            self.world.post_wake(peer, wake)

    def close(self) -> None:
        """Nothing of the peers is held."""

    def take_wake(self, wake: Wake) -> None:
        if self.lockstep is not None:
            self.post(lambda: self.lockstep and self.lockstep.take_wake(wake))

    def post(self, action: Callable[[], Any]) -> None:
        self._mail.append(action)
        self._wake.set()

    # -- the loop ------------------------------------------------------------------------------------------------------------

    async def run(self) -> None:
        while self.is_alive:
            await self.thaw()
            while self._mail:
                self._mail.popleft()()
            self._wake.clear()
            if self.lockstep is not None:
                self._look(self.lockstep)
                await self._step_together(self.lockstep)
                self._look(self.lockstep)
                wants, wait_s = self.lockstep.wants_turn(has_work=bool(self.admitted)), self.lockstep.wait_s
            else:
                if self.admitted:
                    await asyncio.sleep(STEP_S)
                    await self.thaw()
                    self._publish()
                wants, wait_s = bool(self.admitted), None
            if not wants and not self._mail:
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(self._wake.wait(), wait_s)
            await asyncio.sleep(0)

    async def _step_together(self, lockstep: Lockstep) -> None:
        has_work = bool(self.admitted)
        is_due = lockstep.advance(has_work=has_work, is_paused=False)
        if not is_due:
            return
        group = self.group
        assert group is not None
        await asyncio.sleep(STEP_S)
        await self.thaw()
        word = self.word()
        values = np.array([self.steps, word], np.int64)
        try:
            await over(group.begin_sum(values))
        except LockstepError as error:
            lockstep.fail(lockstep.wave.stamp, str(error))
            return
        self.world.check(values[1] == word * group.size, f"{self.id}: another rank believes in another placement of experts")
        self.world.check(values[0] == self.steps * group.size, f"{self.id}: step {self.steps} here, {values[0] / group.size} on average")
        self.steps += 1
        if has_work:
            self._publish()
        lockstep.stepped(was_idle=not has_work)

    def word(self) -> int:
        """What every step tells, and must be the same at all ranks."""
        return 0

    def _look(self, lockstep: Lockstep) -> None:
        """Whether this rank is where it was told to be, and went there with the others."""
        before, now, told = self.wave_seen, lockstep.wave, self.membership.group
        self.wave_seen = now
        if now.stamp == before.stamp:
            return
        told_of = GroupStamp(self.membership.epoch, self.membership.term) if told is None else told.stamp
        self.world.check(told_of >= now.stamp, f"{self.id} went over to {now.stamp}, of which nobody told it")
        kept = lockstep._rack.kept
        if now.kept and not before.kept and kept is not None:
            self.world.switched(self.id, before.stamp, now.stamp, [kept[kind].begun for kind in (GroupKind.DP, GroupKind.EP)])

    def _publish(self) -> None:
        for row in list(self.admitted.values()):
            self.world.tell_client("token", self.id, row.request, row.admission, row.at)
            row.at += 1
            if row.at >= row.total:
                del self.admitted[row.request]

    async def thaw(self) -> None:
        while self.is_alive and self.frozen_until_s > self.world.loop.time():
            await asyncio.sleep(min(self.frozen_until_s - self.world.loop.time(), 1.0))
        if not self.is_alive:
            await asyncio.Event().wait()

    def die(self) -> None:
        if not self.is_alive:
            return
        self.is_alive = False
        self.world.note(f"{self.id} dies")
        for end in self.ends:
            end.wire.cut()
        if not self.died.done():
            self.died.set_result(None)

    # -- clients --------------------------------------------------------------------------------------------------------------

    def add(self, request: int, admission: int, total: int, at: int) -> None:
        if not self.membership.serves(self.id):
            self.world.tell_client("refused", self.id, request, admission, self.membership)
            return
        self.admitted[request] = Admitted(request, admission, total, at)
        self._wake.set()

    def abort(self, request: int, admission: int) -> None:
        row = self.admitted.get(request)
        if row is not None and row.admission == admission:
            del self.admitted[request]

    # -- the actor's methods --------------------------------------------------------------------------------------------------

    async def wait_closed(self) -> str:
        await asyncio.shield(self.died)
        return "stopped"

    async def set_membership(self, membership: Membership) -> Membership:
        if not membership.supersedes(self.membership):
            return self.membership
        before, self.membership = self.membership, membership
        was_prepared = self._told(before, membership) if self.lockstep is not None else True
        lockstep = self.lockstep
        if lockstep is not None:
            self.post(lambda: lockstep.take_membership(membership))
        group = membership.group
        if not was_prepared and group is not None and not group.goes_back and membership.has(self.id) and group.stamp not in self.begun:
            self.begun.add(group.stamp)
            self.world.spawn(self._form(membership, group))
        self.world.tell_client("membership", self.id, 0, 0, membership)
        return membership

    def _told(self, before: Membership, membership: Membership) -> bool:
        """What `Reconfigurer.told` does."""
        group = membership.group
        stamp = None if group is None else group.stamp
        is_new = stamp != (None if before.group is None else before.group.stamp)
        was_prepared = self.part.stage in (Stage.READY, Stage.DECIDED, Stage.GONE) and self.part.stamp == stamp
        part = participation.on_told(self.part, membership.term, stamp, is_new=is_new)
        self.part, self.kept = part.state, None
        if stamp is not None and is_new:
            for older in [other for other in self.formed if other < stamp]:
                future = self.formed.pop(older)
                if not future.done():
                    future.set_exception(LockstepError(f"{older} was overtaken by {stamp}"))
        if group is None or not group.goes_back:
            self._drop(part)
        return was_prepared

    async def allocate_stateless_group_ports(self, membership: Membership, kinds: tuple[GroupKind, ...]) -> GroupAddress:
        stamp = GroupStamp(membership.epoch, membership.term)
        self.world.open_stores(stamp, self.id, is_handover=GroupKind.HANDOVER in kinds)
        return GroupAddress(stamp, "h", {str(kind): 1 for kind in kinds})

    async def group_formed(self, stamp: GroupStamp) -> None:
        await asyncio.shield(self.formed.setdefault(stamp, self.world.loop.create_future()))

    async def reconfigure(self, request: ReconfigureDistributedRequest) -> EngineId:
        group = request.membership.group
        assert group is not None
        part = participation.on_prepare(self.part, request.operation, request.term, group.stamp)
        self._heed(request.term)
        self.part = part.state
        self._drop(part)
        if part.builds:
            self.built = self.world.loop.create_future()
            self.world.spawn(self._build(request, group.stamp, self.built))
        assert self.built is not None
        await asyncio.shield(self.built)
        return self.id

    async def undo_reconfiguration(self, operation: str, term: Term) -> None:
        part = participation.on_undo(self.part, operation, term)
        self._heed(term)
        self.part = part.state
        if part.drops is not None:
            self.kept = None
        self._drop(part)

    async def keep_decision(self, operation: str, term: Term, membership: Membership) -> None:
        stamp = GroupStamp() if membership.group is None else membership.group.stamp
        self.part = participation.on_decided(self.part, operation, term, stamp).state
        self._heed(term)
        self.kept = membership
        if not self.membership.has(self.id):
            await self.set_membership(membership)

    def _heed(self, term: Term) -> None:
        self.world.check(term >= self.membership.term, f"{self.id} of term {self.membership.term} does what one of term {term} says")

    async def release_groups(self, stamp: GroupStamp) -> None:
        self.world.check(stamp not in self.world.returned, f"{self.id} is told to let go of what was before {stamp}, and to go back to it")
        self.part = participation.on_released(self.part, stamp).state
        lockstep = self.lockstep
        assert lockstep is not None
        self.post(lambda: lockstep.release(stamp))

    async def drain(self, limit_s: float) -> bool:
        until_s = self.world.loop.time() + limit_s
        while self.admitted and self.world.loop.time() < until_s:
            await asyncio.sleep(0.01)
        return not self.admitted

    async def pool_state(self) -> PoolState:
        return PoolState()

    async def take_pool_state(self, state: PoolState) -> PoolState:
        self.has_pool_state = True
        return state

    async def stop(self, drain_s: float) -> None:
        self.die()

    async def ping(self) -> int:
        return self.member.pid

    async def describe(self) -> EngineDescription:
        held = self.kept if self.kept is not None and self.kept.supersedes(self.membership) else self.membership
        return EngineDescription(engine=self.id, pid=1, node_id="n", group_id=self.group_id, member=self.member, membership=held)

    # -- groups ---------------------------------------------------------------------------------------------------------------

    def _confirm(self, stamp: GroupStamp) -> None:
        future = self.formed.setdefault(stamp, self.world.loop.create_future())
        if not future.done():
            future.set_result(None)

    async def _form(self, membership: Membership, address: GroupAddress) -> None:
        lockstep = self.lockstep
        assert lockstep is not None
        try:
            groups = await self._meet(membership, address)
        except LockstepError as error:
            text = str(error)
            self.post(lambda: lockstep.fail(address.stamp, text))
            return
        ranks = tuple(member.engine.rank for member in membership.members)
        self.post(lambda: lockstep.take_group(groups, ranks))
        self._confirm(address.stamp)

    async def _meet(self, membership: Membership, address: GroupAddress) -> GroupSet:
        members = tuple(member.engine for member in membership.members)
        wires = await self.world.meet(address.stamp, members, self)
        ends = {kind: WireEnd(wire, self.id) for kind, wire in wires.items()}
        self.ends += ends.values()
        if not self.is_alive:
            for wire in wires.values():
                wire.cut()
        return GroupSet(address.stamp, ends)

    async def _build(self, request: ReconfigureDistributedRequest, stamp: GroupStamp, built: asyncio.Future[None]) -> None:
        """What `Reconfigurer._build` does."""
        lockstep, groups = self.lockstep, None
        assert lockstep is not None
        try:
            live = self.membership
            if live.has(self.id) and live.group is not None:
                await asyncio.wait_for(self.group_formed(live.group.stamp), GROUP_S)
            if request.rank_type is RankType.KEEP:
                group = request.membership.group
                assert group is not None
                self.begun.add(stamp)
                groups = await self._meet(request.membership, group)
            if request.handover is not None:
                groups = (groups or GroupSet(stamp, {})).with_group(GroupKind.HANDOVER, await self._meet_leavers(request, request.handover))
            if groups is not None and request.expert_plan is not None:
                await self.prepare_experts(request, stamp, groups)
            await self.world.hop(f"{self.id} has built {stamp}")
            await self.thaw()
            ranks = tuple(member.engine.rank for member in request.membership.members)
            taken: asyncio.Future[bool] = self.world.loop.create_future()
            self.post(lambda: taken.set_result(lockstep.take_standby(groups, stamp, ranks)))
            if not await taken:
                raise LockstepError(f"{self.id} was told of a newer epoch")
            self.part = participation.on_built(self.part, request.operation, stamp).state
        except (RaycoreError, TimeoutError) as error:
            failure = error if isinstance(error, RaycoreError) else LockstepError("its live groups are not formed")
            self.post(lambda: lockstep.abandon(groups, stamp))
            if self.part.operation == request.operation and self.part.stage is Stage.PREPARING:
                self.part = participation.on_undo(self.part, request.operation, self.part.term).state
            built.set_exception(failure)
            built.exception()
        else:
            built.set_result(None)

    async def prepare_experts(self, request: ReconfigureDistributedRequest, stamp: GroupStamp, groups: GroupSet) -> None:
        """Nothing where experts are not spread."""

    async def _meet_leavers(self, request: ReconfigureDistributedRequest, handover: Handover) -> ProcessGroup:
        known = {member.engine.rank: member.engine for member in (*self.membership.members, *request.membership.members)}
        if not set(handover.ranks) <= set(known):
            raise LockstepError(f"the others of {handover.address.stamp} are no members any more")
        members = tuple(known[rank] for rank in handover.ranks)
        wire = (await self.world.meet(handover.address.stamp, members, self, is_handover=True))[GroupKind.EPLB]
        end = WireEnd(wire, self.id)
        self.ends.append(end)
        if not self.is_alive:
            wire.cut()
        return end

    def _drop(self, part: Part) -> None:
        stamp, lockstep = part.drops, self.lockstep
        if stamp is not None and lockstep is not None:
            self.world.close_stores(stamp, self.id)
            self.post(lambda: lockstep.drop_standby(stamp))


async def over(work: Work) -> None:
    """Until a collective has ended; LockstepError when it failed."""
    ended = asyncio.Event()
    work.notify(ended.set)
    await ended.wait()
    work.wait(0.0)


def wires_of(stamp: GroupStamp, members: tuple[EngineId, ...]) -> dict[GroupKind, Wire]:
    return {kind: Wire(stamp, kind, members) for kind in EPOCH_KINDS}
