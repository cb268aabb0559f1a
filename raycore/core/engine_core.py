"""The engine core: one thread that receives, calls, steps and publishes, in that order, for ever.

It never blocks while it has work, and no client, request or call can end it; only its engine's `step` can.
"""

from __future__ import annotations

import logging
import queue
import time
from collections.abc import Callable
from typing import Any

import msgspec
import numpy as np

from raycore.codec import FrameDecoder
from raycore.config import Limits, Timeouts
from raycore.core import pause as pausing
from raycore.core.beats import Progress
from raycore.core.calls import DEFERRED, CallDispatcher, CallToken, error_record, find_operation
from raycore.core.pause import Pause, PauseState, PauseStep
from raycore.core.requests import RequestTable
from raycore.core.sessions import Session, SessionTable
from raycore.engine import Activity, Engine, EngineRequest, FinishReason, RequestRefused
from raycore.errors import ErrorRecord, FrameError, InvalidRequestError
from raycore.ids import CallId, EngineId, SessionId, Slot
from raycore.membership import Membership
from raycore.messages import (
    PROTOCOL_VERSION,
    Abort,
    Add,
    Attach,
    Attached,
    AttachRefused,
    BadFrame,
    Call,
    CallResult,
    CancelCall,
    ClientFrame,
    Detach,
    EngineFailed,
    MembershipChanged,
    NotMember,
    Refused,
    Renew,
    StepColumns,
    ToEngine,
)
from raycore.operations import Arguments, PauseArguments
from raycore.tensors import can_read
from raycore.transport.channel import EngineListener, Message

_log = logging.getLogger(__name__)

_IDLE_WAIT_S = 0.25
"""An idle core looks at leases this often."""
_BACKLOG_WAIT_S = 0.005
"""A core with slow clients and no work tries their queues this often."""
_HOUSEKEEPING_S = 0.1
_UINT32_BYTES = 4


class CoreCounters:
    """What was dropped or refused, by kind; read by `status` and by tests."""

    def __init__(self) -> None:
        self.bad_frames = 0
        self.stale_frames = 0
        self.ended_sessions = 0


class EngineCore:
    """Hosts one engine; everything but `post` and `stop` belongs to the thread that calls `run` or `turn`."""

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
        self.counters = CoreCounters()
        self._engine = engine
        self._listener = listener
        self._limits = limits
        self._timeouts = timeouts
        self._clock = clock
        self._pool = membership.pool
        self._decoder = FrameDecoder(ClientFrame, self._pool)
        self._outer_decoder = FrameDecoder(_RawFrame, self._pool)
        self._requests = RequestTable()
        self._sessions = SessionTable(listener, limits, self._pool, self._session_ended)
        self._pause = Pause()
        self._held: dict[int, EngineRequest] = {}
        self._tokens: dict[tuple[bytes, int], CallToken] = {}
        self._clear_cache_for: set[CallToken] = set()
        self._mail: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._housekeeping_due_s = 0.0
        self._stop_by_s: float | None = None
        self._is_stopped = False
        self._calls = CallDispatcher(
            engine,
            engine_id.rank,
            {
                "get_supported_tasks": lambda _arguments, _token: engine.info.tasks,
                "dp_engines_running": lambda _arguments, _token: engine.has_work() or bool(self._held),
                "is_scheduler_paused": lambda _arguments, _token: self._pause.state is not PauseState.RUNNING,
                "pause_scheduler": self._pause_scheduler,
                "resume_scheduler": lambda _arguments, _token: self._apply(pausing.on_resume(self._pause)),
                "execute_dummy_batch": lambda _arguments, _token: engine.idle_step(),
            },
        )

    # -- any thread ---------------------------------------------------------------------------------------------------

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

    # -- the step thread ----------------------------------------------------------------------------------------------

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
        if may_wait and not self._can_step():
            self._listener.wait(_BACKLOG_WAIT_S if self._sessions.has_backlog() else _IDLE_WAIT_S)
        while not self._mail.empty():
            self._mail.get()()
        for session_id, message in self._listener.receive():
            self._on_message(session_id, message)
        if self._can_step():
            self._step()
        if self._pause.state is PauseState.PAUSING and not self._engine.has_work():
            self._apply(pausing.on_idle(self._pause))
        self._housekeeping()
        self._sessions.flush(self.progress.load)
        return self._can_step()

    def fail(self, error: BaseException) -> None:
        """The loop is over: tell every session why."""
        failed = EngineFailed(error_record(error))
        for session in self._sessions.all():
            self._sessions.post(session, failed)
        self._sessions.flush(self.progress.load)

    def check_invariants(self) -> None:
        """Raise AssertionError when the tables disagree; for tests."""
        self._requests.check_invariants(self._sessions.all())

    def _can_step(self) -> bool:
        return self._pause.state is not PauseState.PAUSED and self._engine.has_work()

    def _step(self) -> None:
        engine, progress = self._engine, self.progress
        progress.begin(Activity.STEP, engine.budget_s(Activity.STEP))
        output = engine.step()
        progress.end()
        progress.load = engine.load()
        if len(output.handles) or len(output.finished):
            for session, columns in self._requests.columns(output, time.monotonic_ns()):
                self._sessions.post(session, columns)
        self._calls.profiler.on_step()

    def _housekeeping(self) -> None:
        if self._sessions.has_backlog():
            self._sessions.retry_backlogs(self._clock())
        now_s = self._clock()
        if now_s < self._housekeeping_due_s:
            return
        self._housekeeping_due_s = now_s + _HOUSEKEEPING_S
        self._sessions.expire(now_s)
        if self._stop_by_s is not None and (now_s >= self._stop_by_s or len(self._requests) == 0):
            self._end()

    def _begin_stop(self, drain_s: float) -> None:
        self._stop_by_s = self._clock() + drain_s
        self._housekeeping_due_s = 0.0
        self.membership = _without(self.membership, self.id)
        if self._pause.state is PauseState.PAUSED:
            self._stop_by_s = self._clock()  # nothing will finish

    def _end(self) -> None:
        self._abort_handles(list(self._requests.handles()))
        stopped = EngineFailed(ErrorRecord("EngineStopped", "the engine core was shut down"))
        for session in self._sessions.all():
            self._sessions.post(session, stopped)
        self._is_stopped = True

    def _take_membership(self, membership: Membership) -> None:
        if not membership.supersedes(self.membership):
            return
        self.membership = membership
        for session in self._sessions.all():
            self._sessions.post(session, MembershipChanged(membership))

    # -- frames -------------------------------------------------------------------------------------------------------

    def _on_message(self, session_id: bytes, message: Message) -> None:
        session = self._sessions.get(session_id)
        try:
            frame = self._decoder.decode(message)
        except FrameError as error:
            salvaged = self._salvage(session, message)
            if salvaged is None:
                self._on_bad_frame(session, session_id, error)
                return
            frame = salvaged
        if session is None:
            self._on_stranger(SessionId(session_id), frame)
            return
        if frame.seq != session.next_in:
            self.counters.stale_frames += 1
            self._sessions.end(session, f"frame {frame.seq} came where {session.next_in} was due")
            self._sessions.tell_expired(session_id, "frames were lost")
            return
        self._take_frame(session, frame)

    def _take_frame(self, session: Session, frame: ClientFrame) -> None:
        session.next_in = frame.seq + 1
        session.ack = frame.seq
        session.last_heard_s = self._clock()
        session.gone_since_s = None
        for item in frame.items:
            self._on_item(session, item)

    def _salvage(self, session: Session | None, message: Message) -> ClientFrame | None:
        """A frame whose outer shape is right: its good items; each bad request or call is answered alone. None when nothing can be saved."""
        if session is None:
            return None
        try:
            outer = self._outer_decoder.decode(message)
        except FrameError:
            return None
        if outer.seq != session.next_in:
            return None
        self.counters.bad_frames += 1
        items: list[ToEngine] = []
        for raw in outer.items:
            try:
                items.append(self._decoder.decode_part(raw, ToEngine))
            except FrameError as error:
                self._answer_bad_item(session, raw, error)
        return ClientFrame(outer.seq, items)

    def _answer_bad_item(self, session: Session, raw: msgspec.Raw, error: FrameError) -> None:
        record = ErrorRecord(InvalidRequestError.__name__, str(error))
        match _untyped(raw):
            case [1, int(slot), *_] if slot >= 0 and slot not in session.handle_of:
                self._sessions.post(session, Refused(Slot(slot), record))
            case [3, int(call_id), *_]:
                self._sessions.post(session, CallResult(CallId(call_id), session.encoder.encode_part(None), record))
            case _:
                self._sessions.post(session, BadFrame(record))

    def _on_bad_frame(self, session: Session | None, session_id: bytes, error: FrameError) -> None:
        self.counters.bad_frames += 1
        _log.warning("a frame of %s was dropped: %s", session.client if session else "a stranger", error)
        if session is not None:
            # its number cannot be trusted, so the session's order is lost; its requests are not: the client re-admits them
            self._sessions.end(session, "a frame did not decode")
        self._sessions.tell_stranger(session_id, BadFrame(ErrorRecord(type(error).__name__, str(error))))
        if session is not None:
            self._sessions.tell_expired(session_id, "a frame did not decode")

    def _on_stranger(self, session_id: SessionId, frame: ClientFrame) -> None:
        attach = frame.items[0] if frame.items and isinstance(frame.items[0], Attach) else None
        if attach is None or frame.seq != 0:
            self.counters.stale_frames += 1
            self._sessions.tell_expired(session_id, "this session is not known here (any more)")
            return
        reason = self._refusal(attach)
        if reason:
            self._sessions.tell_stranger(session_id, AttachRefused(reason))
            return
        if attach.replaces is not None and (old := self._sessions.get(attach.replaces)) is not None:
            self._sessions.end(old, "replaced by its client")
        shares_memory = bool(attach.memory_probe) and can_read(attach.memory_probe, self._pool)
        session = self._sessions.open(session_id, attach, self._clock(), shares_memory=shares_memory)
        self._sessions.post(session, Attached(self.id, self._engine.info, self.membership, shares_memory))
        self._take_frame(session, ClientFrame(frame.seq, frame.items[1:]))

    def _refusal(self, attach: Attach) -> str | None:
        if attach.version != PROTOCOL_VERSION:
            return f"this engine speaks protocol version {PROTOCOL_VERSION}, the client {attach.version}"
        if attach.pool != self._pool or attach.incarnation != self.id.incarnation:
            return f"this is {self.id} of pool {self._pool!r}"
        if not 0 < attach.lease_s <= self._limits.lease_s * 10:
            return f"a lease of {attach.lease_s} s is out of range"
        return None

    def _on_item(self, session: Session, item: ToEngine) -> None:
        match item:
            case Add():
                self._on_add(session, item)
            case Abort():
                self._on_abort(session, item)
            case Call():
                self._on_call(session, item)
            case CancelCall():
                self._on_cancel(session, item)
            case Renew():
                pass
            case Detach():
                self._sessions.end(session, "detached")
            case Attach():
                self.counters.stale_frames += 1

    # -- requests -----------------------------------------------------------------------------------------------------

    def _on_add(self, session: Session, add: Add) -> None:
        slot = add.slot
        if slot in session.handle_of or not 0 <= slot < self._limits.session_requests:
            self.counters.stale_frames += 1
            return
        if self._stop_by_s is not None or not self.membership.has(self.id):
            self._sessions.post(session, NotMember(np.uint32(slot).tobytes(), self.membership))
            return
        if len(add.prompt) % _UINT32_BYTES or len(add.delivered) % _UINT32_BYTES:
            self._sessions.post(session, Refused(slot, ErrorRecord("FrameError", "a token column is not uint32")))
            return
        delivered = np.frombuffer(add.delivered, np.uint32)
        handle = self._requests.add(session, slot, add.request_id, len(delivered))
        request = EngineRequest(
            handle,  # type: ignore[arg-type]
            add.request_id,
            np.frombuffer(add.prompt, np.uint32),
            add.sampling,
            delivered,
            add.priority,
            add.tensors or {},
        )
        if self._pause.state is PauseState.RUNNING:
            self._admit(request)
        else:
            self._held[handle] = request

    def _admit(self, request: EngineRequest) -> None:
        try:
            self._engine.add(request)
        except (RequestRefused, InvalidRequestError) as refusal:
            self._refuse(request.handle, ErrorRecord(InvalidRequestError.__name__, str(refusal)))
        except Exception as error:
            _log.exception("request %s failed at admission", request.request_id)
            self._engine.abort([request.handle])
            self._refuse(request.handle, error_record(error))

    def _refuse(self, handle: int, error: ErrorRecord) -> None:
        owner = self._requests.remove(handle)
        if owner is not None:
            session, slot = owner
            self._sessions.post(session, Refused(slot, error))  # type: ignore[arg-type]

    def _on_abort(self, session: Session, abort: Abort) -> None:
        if len(abort.slots) % _UINT32_BYTES:
            self.counters.stale_frames += 1
            return
        slots = np.frombuffer(abort.slots, np.uint32).tolist()
        self._abort_handles([session.handle_of[slot] for slot in dict.fromkeys(slots) if slot in session.handle_of])

    def _abort_handles(self, handles: list[int]) -> None:
        """End requests with reason abort; each gets its terminal record."""
        if not handles:
            return
        self._forget(handles)
        ended: dict[bytes, tuple[Session, list[int]]] = {}
        for handle in handles:
            owner = self._requests.remove(handle)
            if owner is not None:
                ended.setdefault(owner[0].id, (owner[0], []))[1].append(owner[1])
        for session, slots in ended.values():
            reasons = bytes([FinishReason.ABORT]) * len(slots)
            self._sessions.post(session, StepColumns(b"", b"", b"", np.array(slots, np.uint32).tobytes(), reasons))

    def _forget(self, handles: list[int]) -> None:
        known = [handle for handle in handles if self._held.pop(handle, None) is None]
        if known:
            self._engine.abort(known)
            self.progress.load = self._engine.load()

    def _session_ended(self, session: Session, reason: str) -> None:
        self.counters.ended_sessions += 1
        handles = list(session.handle_of.values())
        if handles:
            _log.info("session of %s ended (%s): %d requests aborted", session.client, reason, len(handles))
            self._forget(handles)
            for handle in handles:
                self._requests.remove(handle)
        self._requests.forget_session(session)
        for key in [key for key in self._tokens if key[0] == session.id]:
            self._withdraw(self._tokens.pop(key))

    # -- calls --------------------------------------------------------------------------------------------------------

    def _on_call(self, session: Session, call: Call) -> None:
        token = CallToken(session, call.call_id)
        try:
            operation = find_operation(call.method)
            arguments: Arguments = self._decoder.decode_part(call.arguments, operation.arguments)
            self._tokens[session.id, call.call_id] = token
            self.progress.begin(call.method, operation.timeout_s or self._timeouts.call_s)
            result = self._calls.run(operation, arguments, token)
        except Exception as error:
            self._answer(token, None, error_record(error))
            return
        finally:
            if self.progress.doing is not None:
                self.progress.end()
        if result is not DEFERRED:
            self._answer_value(token, result)

    def _answer_value(self, token: CallToken, result: Any) -> None:
        try:
            encoded = token.session.encoder.encode_part(result)
        except Exception as error:
            self._answer(token, None, ErrorRecord(type(error).__name__, f"the result cannot be sent: {error}"))
            return
        self._answer(token, encoded, None)

    def _answer(self, token: CallToken, result: Any, error: ErrorRecord | None) -> None:
        self._tokens.pop((token.session.id, token.call_id), None)
        if self._sessions.get(token.session.id) is token.session:
            encoded = token.session.encoder.encode_part(None) if result is None else result
            self._sessions.post(token.session, CallResult(token.call_id, encoded, error))

    def _on_cancel(self, session: Session, cancel: CancelCall) -> None:
        token = self._tokens.pop((session.id, cancel.call_id), None)
        if token is not None:
            self._withdraw(token)

    def _withdraw(self, token: CallToken) -> None:
        """Nobody waits for this call any more."""
        self._clear_cache_for.discard(token)
        self._apply(pausing.on_withdrawn(self._pause, token))

    def _pause_scheduler(self, arguments: PauseArguments, token: CallToken) -> Any:
        if arguments.clear_cache:
            self._clear_cache_for.add(token)
        self._apply(pausing.on_pause(self._pause, arguments.mode, token, has_work=self._engine.has_work()))
        return DEFERRED

    def _apply(self, step: PauseStep) -> None:
        """Carry out what the pause machine decided."""
        self._pause = step.pause
        if step.abort_running:
            running = [handle for handle in self._requests.handles() if handle not in self._held]
            self._abort_handles(running)
        for token in step.completed:
            self._complete_pause(token)
        if step.release_held:
            held, self._held = self._held, {}
            for request in held.values():
                self._admit(request)

    def _complete_pause(self, token: CallToken) -> None:
        if token in self._clear_cache_for and not self._engine.has_work():
            reset = self._engine.utilities().get("reset_prefix_cache")
            if reset is not None:
                reset()
        self._clear_cache_for.discard(token)
        self._answer_value(token, None)


class _RawFrame(msgspec.Struct, frozen=True, array_like=True):
    """A client frame whose items are looked at one by one."""

    seq: int
    items: list[msgspec.Raw]


def _untyped(raw: msgspec.Raw) -> Any:
    try:
        return msgspec.msgpack.decode(raw)
    except (msgspec.DecodeError, ValueError, RecursionError):
        return None


def _without(membership: Membership, engine: EngineId) -> Membership:
    members = tuple(member for member in membership.members if member.engine != engine)
    return Membership(membership.pool, membership.epoch, membership.term, members, membership.departed)

