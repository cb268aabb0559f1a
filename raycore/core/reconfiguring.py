"""One engine core's side of a switch of groups: builds beside the live ones on the caller's thread, keeps the decision, lets go."""

from __future__ import annotations

import concurrent.futures
import logging
import threading
from collections.abc import Callable
from typing import Protocol

from raycore import participation
from raycore.config import Timeouts
from raycore.core.beats import Progress
from raycore.core.grouping import GroupKeeper
from raycore.core.lockstep import Lockstep
from raycore.engine import Engine
from raycore.errors import EngineStateError, LockstepError
from raycore.groups import ElasticEngine, GroupKind, GroupSet, Reconfiguration
from raycore.ids import EngineId, GroupStamp, Term
from raycore.membership import Membership, RankType, ReconfigureDistributedRequest
from raycore.participation import Part, Participation, Stage

_log = logging.getLogger(__name__)


class StepThread(Protocol):
    """The engine core, as far as this needs it."""

    progress: Progress

    def post(self, action: Callable[[], None]) -> None:
        """Run `action` on the step thread soon."""
        ...


class Reconfigurer:
    """Owns the participation; from any thread."""

    def __init__(
        self, engine_id: EngineId, engine: Engine, core: StepThread, lockstep: Lockstep, groups: GroupKeeper, timeouts: Timeouts
    ) -> None:
        self.kept_decision: Membership | None = None
        """Decided, and not gone for yet."""
        self._id = engine_id
        self._elastic = engine if isinstance(engine, ElasticEngine) else None
        self._core = core
        self._lockstep = lockstep
        self._groups = groups
        self._timeouts = timeouts
        self._lock = threading.Lock()
        self._state = Participation()
        self._built: concurrent.futures.Future[None] = concurrent.futures.Future()

    @property
    def state(self) -> Participation:
        """How far an operation has come here."""
        with self._lock:
            return self._state

    def prepare(self, request: ReconfigureDistributedRequest, live: Membership) -> None:
        """Build the groups of the next epoch, warm them, have the engine prepare; blocks until READY. What was asked twice is built once.

        ScalingError when the operation was undone or overtaken, LockstepError when the members do not meet, EngineStateError for a rank
        that sleeps.
        """
        if self._core.progress.is_sleeping:
            msg = f"rank {self._id.rank} sleeps; wake the pool up before it is scaled"
            raise EngineStateError(msg)
        group = request.membership.group
        if group is None:
            msg = f"operation {request.operation} names no groups"
            raise LockstepError(msg, rank=self._id.rank)
        with self._lock:
            part = participation.on_prepare(self._state, request.operation, request.term, group.stamp)
            self._state = part.state
            if part.builds:
                self._built = concurrent.futures.Future()
            built = self._built
        self._drop(part)
        if part.builds:
            self._build(request, group.stamp, live, built)
        built.result(self._timeouts.group_s)

    def undo(self, operation: str, term: Term) -> None:
        """Drop what was prepared; what is still being built is dropped when it is there. ScalingError when it is decided here."""
        with self._lock:
            part = participation.on_undo(self._state, operation, term)
            self._state = part.state
            if part.drops is not None:
                self.kept_decision = None
        self._drop(part)

    def keep(self, operation: str, term: Term, membership: Membership) -> None:
        """Keep a decision until told to go. ScalingError unless this rank is ready for it."""
        stamp = GroupStamp() if membership.group is None else membership.group.stamp
        with self._lock:
            self._state = participation.on_decided(self._state, operation, term, stamp).state
            self.kept_decision = membership

    def told(self, before: Membership, membership: Membership) -> bool:
        """A newer membership is held from now on; whether its groups are the ones that stand by here."""
        stamp = None if membership.group is None else membership.group.stamp
        is_new = stamp != (None if before.group is None else before.group.stamp)
        with self._lock:
            was_prepared = self._state.stage in (Stage.READY, Stage.DECIDED, Stage.GONE) and self._state.stamp == stamp
            part = participation.on_told(self._state, membership.term, stamp, is_new=is_new)
            self._state = part.state
            self.kept_decision = None
        if stamp is not None and is_new:
            self._groups.overtake(stamp)
        goes_back = membership.group is not None and membership.group.goes_back
        if not goes_back:  # which needs its standby groups: all must leave the old ones at one round
            self._drop(part)
        return was_prepared

    def release(self, stamp: GroupStamp) -> None:
        """Every member has confirmed: the groups before these go."""
        with self._lock:
            self._state = participation.on_released(self._state, stamp).state
        self._core.post(lambda: self._lockstep.release(stamp))
        self._groups.close_stores(stamp)

    def _build(
        self, request: ReconfigureDistributedRequest, stamp: GroupStamp, live: Membership, built: concurrent.futures.Future[None]
    ) -> None:
        groups: GroupSet | None = None
        try:
            if live.has(self._id) and live.group is not None:
                # a rank whose live groups are still being formed could never vote with the others to leave them
                self._groups.formed(live.group.stamp).result(self._timeouts.group_s)
            if request.rank_type is RankType.KEEP:
                groups = self._groups.form_beside(request.membership)
            if request.handover is not None:
                handover = self._groups.form_handover(request.handover)
                groups = (groups or GroupSet(stamp, {})).with_group(GroupKind.HANDOVER, handover)
            if groups is not None:
                self._prepare_engine(request, stamp, groups)
            self._hand_over(groups, stamp, request.membership)
            with self._lock:
                self._state = participation.on_built(self._state, request.operation, stamp).state
        except BaseException as error:  # noqa: BLE001 -- it is the answer of whoever waits for READY
            self._core.post(lambda: self._lockstep.abandon(groups, stamp))
            self._groups.close_stores(stamp)
            with self._lock:
                if self._state.operation == request.operation and self._state.stage is Stage.PREPARING:
                    self._state = participation.on_undo(self._state, request.operation, self._state.term).state
            built.set_exception(error)
        else:
            built.set_result(None)

    def _prepare_engine(self, request: ReconfigureDistributedRequest, stamp: GroupStamp, groups: GroupSet) -> None:
        if self._elastic is None:
            return
        ranks = tuple(member.engine.rank for member in request.membership.members)
        handover = () if request.handover is None else request.handover.ranks
        self._elastic.prepare(Reconfiguration(stamp, ranks, request.before, request.expert_plan, handover), groups)

    def _hand_over(self, groups: GroupSet | None, stamp: GroupStamp, membership: Membership) -> None:
        ranks = tuple(member.engine.rank for member in membership.members)
        taken: concurrent.futures.Future[bool] = concurrent.futures.Future()
        self._core.post(lambda: taken.set_result(self._lockstep.take_standby(groups, stamp, ranks)))
        if not taken.result(self._timeouts.control_s):
            msg = f"rank {self._id.rank} was told of a newer epoch than {stamp}"
            raise LockstepError(msg, rank=self._id.rank)

    def _drop(self, part: Part) -> None:
        stamp = part.drops
        if stamp is None:
            return
        self._groups.close_stores(stamp)  # whoever still waits there for the others fails now
        self._core.post(lambda: self._lockstep.drop_standby(stamp))
