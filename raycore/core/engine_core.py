"""The engine core: one thread that receives, calls, steps and publishes, in that order, for ever.

It never blocks while it has work, and no client, request or call can end it; only its engine's `step` can.
"""

from __future__ import annotations

import logging
import queue
import time
from collections.abc import Callable

import msgspec
import numpy as np

from raycore.config import Limits, Timeouts
from raycore.core.admission import RequestAdmission
from raycore.core.beats import Progress
from raycore.core.calls import error_record
from raycore.core.desk import CallDesk
from raycore.core.intake import Counters, FrameIntake
from raycore.core.sessions import Session, SessionTable
from raycore.engine import Activity, Engine
from raycore.errors import ErrorRecord
from raycore.ids import EngineId
from raycore.membership import Membership
from raycore.messages import Abort, Add, Attach, Call, CancelCall, Detach, EngineFailed, MembershipChanged, NotMember, Renew, ToEngine
from raycore.transport.channel import EngineListener

_log = logging.getLogger(__name__)

_IDLE_WAIT_S = 0.25
"""An idle core looks at leases this often."""
_BACKLOG_WAIT_S = 0.005
"""A core with slow clients and no work tries their queues this often."""
_HOUSEKEEPING_S = 0.1


class EngineCore:
    """Hosts one engine; everything but `post`, `stop` and `set_membership` belongs to the thread that calls `run` or `turn`."""

    def __init__(
        self,
        engine_id: EngineId,
        engine: Engine,
        listener: EngineListener,
        membership: Membership,
        *,
        limits: Limits,
        timeouts: Timeouts,
        step_budget_s: float,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.id = engine_id
        self.membership = membership
        self.progress = Progress(step_budget_s)
        self.counters = Counters()
        self._engine = engine
        self._listener = listener
        self._clock = clock
        self._sessions = SessionTable(listener, limits, membership.pool, self._session_ended)
        self._admission = RequestAdmission(engine, self._sessions, limits, self.counters)
        self._intake = FrameIntake(engine_id, engine.info, self._sessions, limits, self.counters, lambda: self.membership, clock)
        self._desk = CallDesk(engine, engine_id.rank, self._sessions, self._admission, self._intake, self.progress, timeouts)
        self._mail: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._housekeeping_due_s = 0.0
        self._stop_by_s: float | None = None
        self._is_stopped = False
        self._takes_requests = membership.has(engine_id)
        self._has_more = False

    # -- any thread -------------------------------------------------------------------------------------------------------

    def post(self, action: Callable[[], None]) -> None:
        """Run `action` on the step thread soon."""
        self._mail.put(action)
        self._listener.wake()

    def stop(self, drain_s: float) -> None:
        """Take nothing new, let running requests finish for `drain_s` seconds, abort the rest, and return from `run`."""
        self.post(lambda: self._begin_stop(drain_s))

    def set_membership(self, membership: Membership) -> None:
        """Keep a newer membership and tell every session."""
        self.post(lambda: self._take_membership(membership))

    # -- the step thread --------------------------------------------------------------------------------------------------

    def run(self) -> None:
        """Turn until stopped; raises what a failed step raised, after telling every session."""
        try:
            while not self._is_stopped:
                self.turn()
        except BaseException as error:
            self.fail(error)
            raise

    def turn(self, *, may_wait: bool = True) -> bool:
        """Once around the loop; returns whether there is more to do at once."""
        if may_wait and not self._has_more and self._mail.empty():
            self._listener.wait(_BACKLOG_WAIT_S if self._sessions.has_backlog() else _IDLE_WAIT_S)
        while not self._mail.empty():
            self._mail.get()()
        received = self._listener.receive()
        for session_id, message in received:
            taken = self._intake.take(session_id, message)
            if taken is not None:
                self._take_items(*taken)
        if self._can_step():
            self._step()
        elif received:
            self.progress.load = self._engine.load()
        self._desk.on_turn()
        now_s = self._clock()
        self._housekeeping(now_s)
        self._sessions.flush(self.progress.load, now_s)
        self._intake.release()
        self._has_more = self._can_step()
        return self._has_more

    def fail(self, error: BaseException) -> None:
        """The loop is over: tell every session why."""
        failed = EngineFailed(error_record(error))
        for session in self._sessions.all():
            self._sessions.post(session, failed)
        self._sessions.flush(self.progress.load, self._clock())

    def check_invariants(self) -> None:
        """Raise AssertionError when the tables disagree; for tests."""
        self._admission.check_invariants()

    def _can_step(self) -> bool:
        return self._desk.may_step and self._engine.has_work()

    def _step(self) -> None:
        engine, progress = self._engine, self.progress
        progress.begin(Activity.STEP, engine.budget_s(Activity.STEP))
        output = engine.step()
        progress.end()
        progress.load = engine.load()
        if len(output.handles) or len(output.finished):
            self._admission.publish(output, time.monotonic_ns())
        self._desk.on_step()

    def _take_items(self, session: Session, items: list[ToEngine]) -> None:
        for item in items:
            match item:
                case Add():
                    self._on_add(session, item)
                case Abort():
                    self._admission.abort(session, item)
                case Call():
                    self._desk.run(session, item)
                case CancelCall():
                    self._desk.cancel(session, item)
                case Renew():
                    # answered, so that a client whose last frame from here was lost sees the gap
                    self._sessions.answer(session, self.progress.load, self._clock())
                case Detach():
                    self._sessions.end(session, "detached")
                    return  # what follows it in the frame has no session
                case Attach():
                    self.counters.stale_frames += 1

    def _on_add(self, session: Session, add: Add) -> None:
        if self._takes_requests:
            self._admission.add(session, add, hold=self._desk.holds_requests)
        else:
            self._sessions.post(session, NotMember(np.uint32(add.slot).tobytes(), self.membership))

    def _housekeeping(self, now_s: float) -> None:
        if self._sessions.has_backlog():
            self._sessions.retry_backlogs(now_s)
        if now_s < self._housekeeping_due_s:
            return
        self._housekeeping_due_s = now_s + _HOUSEKEEPING_S
        self._sessions.expire(now_s)
        self._sessions.keep_in_touch(self.progress.load, now_s)
        if self._stop_by_s is not None and (now_s >= self._stop_by_s or len(self._admission) == 0):
            self._end()

    def _begin_stop(self, drain_s: float) -> None:
        # paused requests will not finish, however long the drain
        self._stop_by_s = self._clock() + (drain_s if self._desk.may_step else 0.0)
        self._housekeeping_due_s = 0.0
        self._takes_requests = False
        members = tuple(member for member in self.membership.members if member.engine != self.id)
        self.membership = msgspec.structs.replace(self.membership, members=members)

    def _end(self) -> None:
        self._admission.abort_all(also_held=True)
        stopped = EngineFailed(ErrorRecord("EngineStopped", "the engine core was shut down"))
        for session in self._sessions.all():
            self._sessions.post(session, stopped)
        self._is_stopped = True

    def _take_membership(self, membership: Membership) -> None:
        if not membership.supersedes(self.membership):
            return
        self.membership = membership
        self._takes_requests = self._stop_by_s is None and membership.has(self.id)
        for session in self._sessions.all():
            self._sessions.post(session, MembershipChanged(membership))

    def _session_ended(self, session: Session, reason: str) -> None:
        self.counters.ended_sessions += 1
        aborted = self._admission.forget_session(session)
        self._desk.forget_session(session)
        if aborted:
            _log.info("session of %s ended (%s): %d requests aborted", session.client, reason, aborted)
            self.progress.load = self._engine.load()
