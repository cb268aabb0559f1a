"""The engine core: one thread that receives, calls, steps and publishes, in that order, for ever.

It never blocks while it has work, and no client, request or call can end it; only its engine's `step` can.
"""

from __future__ import annotations

import concurrent.futures
import logging
import queue
import time
from collections.abc import Callable
from typing import Any, TypeVar

import msgspec
import numpy as np

from raycore.config import Limits, Timeouts
from raycore.core.admission import RequestAdmission
from raycore.core.beats import Progress
from raycore.core.calls import error_record
from raycore.core.desk import CallDesk
from raycore.core.intake import Counters, FrameIntake
from raycore.core.lockstep import Lockstep, Peers
from raycore.core.sessions import Session, SessionTable
from raycore.engine import CHECK_INVARIANTS, Activity, Engine
from raycore.errors import ErrorRecord, LockstepError
from raycore.ids import EngineId
from raycore.membership import Membership
from raycore.messages import Abort, Add, Attach, Call, CancelCall, Detach, EngineFailed, MembershipChanged, NotMember, Renew, ToEngine, Wake
from raycore.pool_state import PoolState
from raycore.routing.work import PaceMeter, step_units
from raycore.transport.channel import EngineListener

_log = logging.getLogger(__name__)
Answer = TypeVar("Answer")

_IDLE_WAIT_S = 0.25
"""An idle core looks at leases this often."""
_BACKLOG_WAIT_S = 0.005
"""A core with slow clients and no work tries their queues this often."""
_HOUSEKEEPING_S = 0.1
_LONG_STEP_S = 1e-3
"""A step that takes this long does something that is worth timing, and clients have sent something meanwhile."""
_REPORT_S = 2.0
"""How old what a status shows of memory may be."""


def _ignore_wake(_wake: Wake) -> None:
    """This engine steps alone."""


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
        allow_pickle: bool = False,
        debug_checks: bool = False,
        clock: Callable[[], float] = time.monotonic,
        peers: Peers | None = None,
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
        self.lockstep: Lockstep | None = None
        """Where the engine must step together with other ranks."""
        on_wake = _ignore_wake
        if peers is not None:
            limits_s = {"collective_s": timeouts.collective_s, "regroup_s": timeouts.regroup_s}
            self.lockstep = Lockstep(engine, engine_id, peers, self.progress, clock=clock, **limits_s)
            self.lockstep.wake_core = listener.wake
            on_wake = self.lockstep.take_wake
        self._intake = FrameIntake(engine_id, engine.info, self._sessions, limits, self.counters, lambda: self.membership, clock, on_wake)
        self._desk = CallDesk(
            engine,
            engine_id.rank,
            self._sessions,
            self._admission,
            self._intake,
            self.progress,
            timeouts,
            clock,
            allow_pickle=allow_pickle,
            lockstep=self.lockstep,
            is_member=membership.has(engine_id),
        )
        self._mail: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._housekeeping_due_s = 0.0
        self._report_due_s = 0.0
        self._stop_by_s: float | None = None
        self._is_stopped = False
        self._takes_requests = membership.serves(engine_id)
        self._has_more = False
        self._debug_checks = debug_checks
        self._is_unchecked = False
        self._pace = PaceMeter()

    # -- any thread -------------------------------------------------------------------------------------------------------

    def post(self, action: Callable[[], None]) -> None:
        """Run `action` on the step thread soon."""
        self._mail.put(action)
        self._listener.wake()

    def stop(self, drain_s: float) -> None:
        """Take nothing new, let running requests finish for `drain_s` seconds, abort the rest, and return from `run`."""
        self.post(lambda: self._begin_stop(drain_s))

    @property
    def requests(self) -> int:
        """Requests that have no terminal record yet."""
        return len(self._admission)

    def set_membership(self, membership: Membership) -> None:
        """Keep a newer membership and tell every session."""
        self.post(lambda: self._take_membership(membership))

    def pool_state(self) -> concurrent.futures.Future[PoolState]:
        """What calls to all ranks have made of this engine, after every membership that was set before."""
        return self.ask(lambda: self._desk.pool_state)

    def take_pool_state(self, state: PoolState) -> concurrent.futures.Future[PoolState]:
        """Make this rank, which is about to join, like the member whose state this is; what it has then, or what that raised."""
        return self.ask(lambda: self._desk.take_pool_state(state))

    def ask_engine(self, *names: str) -> concurrent.futures.Future[tuple[Any, ...]]:
        """What the engine's RPC methods of these names give, of one moment; KeyError for one that it has not."""
        return self.ask(lambda: tuple(self._engine.rpc_methods()[name]() for name in names))

    def ask(self, question: Callable[[], Answer]) -> concurrent.futures.Future[Answer]:
        """What the step thread answers between two steps."""
        future: concurrent.futures.Future[Answer] = concurrent.futures.Future()

        def answer() -> None:
            if not future.set_running_or_notify_cancel():
                return
            try:
                future.set_result(question())
            except Exception as error:  # noqa: BLE001 -- it is whoever asks who gets it
                future.set_exception(error)

        self.post(answer)
        return future

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
            self._listener.wait(self._wait_s())
        while not self._mail.empty():
            self._mail.get()()
        has_news = self._receive()
        took_s = 0.0
        if self.lockstep is not None:
            took_s = self._step_together(self.lockstep)
            has_news = True
        elif self._can_step():
            took_s = self._step()
            has_news = False
        if took_s >= _LONG_STEP_S and self._receive():
            has_news = True  # it is in the report that goes out with the step: clients route by what is there now
        if has_news:
            self.progress.load = self._engine.load()
        self._desk.on_turn()
        if self._is_unchecked and not self._engine.has_work():
            self._is_unchecked = False
            self.check_invariants()
        now_s = self._clock()
        self._housekeeping(now_s)
        self._sessions.is_paused = self._desk.holds_requests
        self._sessions.flush(self.progress.load, now_s)
        self._intake.release()
        can_step = self._can_step()
        self._has_more = can_step if self.lockstep is None else self.lockstep.wants_turn(has_work=can_step)
        return self._has_more

    def fail(self, error: BaseException) -> None:
        """The loop is over: tell every session why."""
        failed = EngineFailed(error_record(error))
        for session in self._sessions.all():
            self._sessions.post(session, failed)
        self._sessions.flush(self.progress.load, self._clock())

    def check_invariants(self) -> None:
        """Raise AssertionError when the tables, or the engine's own, disagree; for tests, and at idle with `debug_checks`."""
        self._admission.check_invariants()
        check = self._engine.utilities().get(CHECK_INVARIANTS)
        if check is not None:
            check()

    def _can_step(self) -> bool:
        return self._desk.may_step and self._engine.has_work()

    def _receive(self) -> bool:
        """Take in what is there; whether there was anything."""
        received = self._listener.receive()
        for session_id, message in received:
            taken = self._intake.take(session_id, message)
            if taken is not None:
                self._take_items(*taken)
        for session_id in self._listener.take_gone():
            self._sessions.end_gone(session_id)
        return bool(received)

    def _step(self) -> float:
        """One step of the engine, its outputs posted; how long it took, in seconds."""
        engine, progress = self._engine, self.progress
        self._is_unchecked = self._debug_checks
        progress.begin(Activity.STEP, engine.budget_s(Activity.STEP))
        begin_s = self._clock()
        output = engine.step()
        end_s = self._clock()
        progress.end()
        load = progress.load = engine.load()
        if end_s - begin_s >= _LONG_STEP_S and self.lockstep is None:  # in lockstep a step takes as long as the slowest rank's
            self._pace.observe(end_s - begin_s, step_units(load.running, load.kv_tokens_used, output.prefilled))
            self._sessions.unit_ns = self._pace.unit_ns
        if len(output.handles) or len(output.finished):
            self._admission.publish(output, time.monotonic_ns(), end_s)
        self._desk.on_step()
        return end_s - begin_s

    def _step_together(self, lockstep: Lockstep) -> float:
        """Take part in the wave: a step of work, a dummy step, or none until the others are there; how long that took, in seconds."""
        begin_s = self._clock()
        has_work = self._can_step()
        if lockstep.advance(has_work=has_work, is_paused=not self._desk.may_step):
            try:
                if has_work:
                    self._step()
                else:
                    self._idle_step()
            except LockstepError as error:
                # the step in flight is dropped before anything of it is published
                self.progress.end()
                lockstep.fail(lockstep.wave.stamp, str(error))
            else:
                lockstep.stepped(was_idle=not has_work)
        return self._clock() - begin_s

    def _idle_step(self) -> None:
        self.progress.begin(Activity.STEP, self._engine.budget_s(Activity.STEP))
        self._engine.idle_step()
        self.progress.end()

    def _wait_s(self) -> float:
        limit_s = _BACKLOG_WAIT_S if self._sessions.has_backlog() else _IDLE_WAIT_S
        if self.lockstep is not None and (due_s := self.lockstep.wait_s) is not None:
            return min(limit_s, due_s)
        return limit_s

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
                case Attach() | Wake():
                    self.counters.stale_frames += 1

    def _on_add(self, session: Session, add: Add) -> None:
        if self.lockstep is not None and (lost := self.lockstep.lost()) is not None:
            self._admission.refuse(session, add, lost)
        elif self._takes_requests:
            self._admission.add(session, add, hold=self._desk.holds_requests, now_s=self._clock())
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
        if now_s >= self._report_due_s:
            self._report_due_s = now_s + _REPORT_S
            self._desk.report()
        if self.lockstep is not None and len(self._admission) and (lost := self.lockstep.lost()) is not None:
            self._admission.fail_all(lost)
        if self._stop_by_s is not None and (now_s >= self._stop_by_s or self._is_done):
            self._end()

    @property
    def _is_done(self) -> bool:
        """Whether nobody would miss this engine core: no request here, and no wave that its peers cannot finish without it."""
        return len(self._admission) == 0 and not (self.lockstep is not None and self.lockstep.is_stepping)

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
        self._takes_requests = self._stop_by_s is None and membership.serves(self.id)
        if self.lockstep is not None:
            self.lockstep.take_membership(membership)
        self._desk.on_membership(is_member=membership.has(self.id))
        for session in self._sessions.all():
            self._sessions.post(session, MembershipChanged(membership))

    def _session_ended(self, session: Session, reason: str) -> None:
        self.counters.ended_sessions += 1
        aborted = self._admission.forget_session(session)
        self._desk.forget_session(session)
        if aborted:
            _log.info("session of %s ended (%s): %d requests aborted", session.client, reason, aborted)
            self.progress.load = self._engine.load()
