"""Utility calls and the pause state of one engine core: run on the step thread, answered at once or when the engine is idle."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import msgspec

from raycore.config import Timeouts
from raycore.core import pause as pausing
from raycore.core.admission import RequestAdmission
from raycore.core.beats import Progress
from raycore.core.calls import DEFERRED, CallDispatcher, CallToken, error_record, find_operation
from raycore.core.intake import FrameIntake
from raycore.core.lockstep import Lockstep
from raycore.core.pause import Hold, Pause, PauseState, PauseStep
from raycore.core.pool_log import HeldCall, PoolLog
from raycore.core.sessions import Session, SessionTable
from raycore.core.sleep import SleepKeeper
from raycore.engine import KV_CACHE_STATS, MEMORY_STATS, Engine
from raycore.errors import EngineStateError, ErrorRecord, NotSupportedError, UnsendableResultError
from raycore.messages import Call, CallResult, CancelCall
from raycore.operations import (
    OPERATIONS,
    PHASES,
    Arguments,
    Operation,
    PauseArguments,
    PausePhaseArguments,
    PauseReport,
    SleepArguments,
    SleepPhaseArguments,
    WakeReport,
    WakeUpArguments,
)
from raycore.pool_state import PoolState

_log = logging.getLogger(__name__)


_NOBODY: Any = None
"""The token of what no caller waits for; those operations answer at once."""


class CallDesk:
    """Owns what waits for an answer; no call can end the loop."""

    def __init__(
        self,
        engine: Engine,
        rank: int,
        sessions: SessionTable,
        admission: RequestAdmission,
        intake: FrameIntake,
        progress: Progress,
        timeouts: Timeouts,
        clock: Callable[[], float],
        *,
        allow_pickle: bool = False,
        lockstep: Lockstep | None = None,
        is_member: bool = True,
    ) -> None:
        self.pause = Pause()
        self._engine = engine
        self._sessions = sessions
        self._admission = admission
        self._intake = intake
        self._progress = progress
        self._timeouts = timeouts
        self._clock = clock
        self._lockstep = lockstep
        self._at_rest_for: dict[CallToken, bool] = {}
        """Commits of a pause that are answered when the wave has ended, and whether the cache is to be cleared then."""
        self._tokens: dict[tuple[bytes, int], CallToken] = {}
        self._sleep = SleepKeeper(engine)
        self._log = PoolLog(engine, is_member=is_member)
        self._once_paused: dict[CallToken, Callable[[], None]] = {}
        """What is left to do for these calls when their pause is complete."""
        self._drained_for: set[CallToken] = set()
        """Calls that are answered with a report once running requests have ended."""
        methods = {
            "get_supported_tasks": lambda _arguments, _token: engine.info.tasks,
            "dp_engines_running": lambda _arguments, _token: lockstep.is_stepping if lockstep else engine.has_work() or admission.has_held,
            "is_scheduler_paused": lambda _arguments, _token: self.pause.state is not PauseState.RUNNING,
            "pause_scheduler": self._pause_scheduler,
            "resume_scheduler": self._resume_scheduler,
            "pause_phase": self._pause_phase,
            "sleep": self._fall_asleep_alone,
            "sleep_phase": self._sleep_phase,
            "wake_up": self._wake_up_alone,
            "wake_phase": self._wake_phase,
            "is_sleeping": lambda _arguments, _token: self._sleep.is_sleeping,
            "execute_dummy_batch": self._execute_dummy_batch,
        }
        self._dispatcher = CallDispatcher(engine, rank, methods, allow_pickle=allow_pickle)

    @property
    def may_step(self) -> bool:
        """Whether the pause state lets the engine step."""
        return self.pause.state is not PauseState.PAUSED and not self._sleep.is_sleeping

    @property
    def holds_requests(self) -> bool:
        """Whether new requests wait for a resume."""
        return self.pause.state is not PauseState.RUNNING or self._sleep.is_sleeping

    def run(self, session: Session, call: Call) -> None:
        """Carry out a call; whatever it raises is its answer."""
        token = CallToken(session, call.call_id)
        try:
            operation = find_operation(call.method)
            arguments: Arguments = self._intake.decode_arguments(call.arguments, operation.arguments)
        except Exception as error:  # noqa: BLE001 -- whatever the message holds, its sender gets a typed answer
            self._answer(token, None, error_record(error))
            return
        self._tokens[session.id, call.call_id] = token
        waiting = HeldCall(token, operation, arguments, call.pool_call)
        if call.pool_call and not self._log.is_open:
            self._log.hold(waiting)
        else:
            self._carry_out(waiting)

    def _carry_out(self, call: HeldCall) -> None:
        done = self._log.answer_to(call.call)
        if done is not None:  # the member whose state this rank took had carried it out before
            self._answer_value(call.token, done.result)
            return
        try:
            result = self._perform(call.operation, call.arguments, call.token)
        except Exception as error:  # noqa: BLE001 -- the caller gets it, typed, with its traceback
            self._answer(call.token, None, error_record(error))
            return
        if call.call:
            self._log.record(call.call, call.operation.name, call.arguments, result)
        if result is not DEFERRED:
            self._answer_value(call.token, result)

    def _perform(self, operation: Operation, arguments: Arguments, token: CallToken) -> Any:
        self._progress.begin(operation.name, operation.timeout_s or self._timeouts.call_s)
        try:
            return self._dispatcher.run(operation, arguments, token)
        finally:
            self._progress.end()
            if operation.changes_engine or operation.name in PHASES:
                self.report()

    # -- the pool's state -------------------------------------------------------------------------------------------------

    @property
    def pool_state(self) -> PoolState:
        """What calls to all ranks did here."""
        return self._log.state

    def take_pool_state(self, state: PoolState) -> PoolState:
        """Make this rank, which is about to join, like a member, once; what it has now. What an operation raises is raised."""
        if not self._log.is_open:
            self._log.take(state, lambda method, arguments: self._perform(find_operation(method), arguments, _NOBODY), self._take_stamp)
            self._open_log()
        return self._log.state

    def on_membership(self, *, is_member: bool) -> None:
        """A member carries out calls to all ranks as they come."""
        if is_member and not self._log.is_open:
            self._open_log()

    def _open_log(self) -> None:
        for held in self._log.open():
            if held.token in self._tokens.values():  # its caller still waits
                self._carry_out(held)

    def _take_stamp(self, stamp: int) -> None:
        self._apply(pausing.on_commit(self.pause, "joining", stamp, abort=False))

    def cancel(self, session: Session, cancel: CancelCall) -> None:
        """Nobody waits for this call any more."""
        token = self._tokens.pop((session.id, cancel.call_id), None)
        if token is not None:
            self._withdraw(token)

    def forget_session(self, session: Session) -> None:
        """Nobody waits for this session's calls any more."""
        for key in [key for key in self._tokens if key[0] == session.id]:
            self._withdraw(self._tokens.pop(key))
        self._apply(pausing.on_owner_gone(self.pause, session.id))

    def report(self) -> None:
        """Have the beats tell what the engine takes and how its cache does, where it says so, and whether it sleeps."""
        self._progress.is_sleeping = self._sleep.is_sleeping
        self._progress.memory = self._facts(MEMORY_STATS, dict[str, int]) or self._progress.memory
        self._progress.cache = self._facts(KV_CACHE_STATS, dict[str, int | float]) or self._progress.cache

    def _facts(self, name: str, kind: Any) -> Any:
        stats = self._engine.rpc_methods().get(name)
        if stats is None:
            return None
        try:
            return msgspec.convert(stats(), kind)
        except Exception as error:  # noqa: BLE001 -- a figure for people must not end the loop
            _log.warning("%s failed: %s", name, error)
            return None

    def on_step(self) -> None:
        """A step is over."""
        self._dispatcher.profiler.on_step()

    def on_turn(self) -> None:
        """Complete a pause that waited for the engine to be idle."""
        if self.pause.state is PauseState.PAUSING and not self._engine.has_work():
            self._progress.begin("pause", OPERATIONS["sleep"].timeout_s)  # what follows may be a sleep
            self._apply(pausing.on_idle(self.pause))
            self._progress.end()
        if self._at_rest_for and not self._is_stepping:
            waiting, self._at_rest_for = self._at_rest_for, {}
            for token, clears_cache in waiting.items():
                self._answer_commit(token, clears_cache=clears_cache)

    @property
    def _is_stepping(self) -> bool:
        """Whether steps run here even though this rank has no work that it may do."""
        return self._lockstep is not None and self._lockstep.is_stepping

    def _refuse_alone(self, method: str) -> None:
        """In lockstep a rank cannot stop by itself: the others cannot step without it."""
        if self._lockstep is not None and len(self._lockstep.wave.members) > 1:
            msg = f"{method} of one rank: the ranks of this pool step together; call it for all ranks"
            raise NotSupportedError(msg, method=method)

    def _complete_commit(self, arguments: PausePhaseArguments, token: CallToken) -> Any:
        """A pause is complete when no step runs or will run; in lockstep that is when the wave has ended."""
        if self._is_stepping:
            self._at_rest_for[token] = arguments.clear_cache
            return DEFERRED
        if arguments.clear_cache:
            self._clear_cache()
        return self._report(is_granted=True)

    def _answer_commit(self, token: CallToken, *, clears_cache: bool) -> None:
        try:
            if clears_cache:
                self._clear_cache()
        except Exception as error:  # noqa: BLE001 -- the pause holds; its caller is told that the cache does too
            self._answer(token, None, error_record(error))
            return
        self._answer_value(token, self._report(is_granted=True))

    def _pause_scheduler(self, arguments: PauseArguments, token: CallToken) -> Any:
        self._refuse_alone("pause_scheduler")
        if arguments.clear_cache:
            self._once_paused[token] = self._clear_cache
        self._pause_alone(arguments.mode, token)
        self._sleep.resumes = False  # it now belongs to this caller
        return DEFERRED

    def _pause_alone(self, mode: pausing.PauseMode, token: CallToken) -> None:
        try:
            self._apply(pausing.on_pause(self.pause, mode, token, has_work=self._engine.has_work()))
        except pausing.PauseConflictError:
            self._once_paused.pop(token, None)
            raise

    def _resume_scheduler(self, _arguments: Any, _token: CallToken) -> None:
        self._refuse_alone("resume_scheduler")
        self._sleep.check_awake("resume_scheduler")
        self._apply(pausing.on_resume(self.pause))

    def _execute_dummy_batch(self, _arguments: Any, _token: CallToken) -> None:
        self._refuse_alone("execute_dummy_batch")
        self._sleep.check_awake("execute_dummy_batch")
        self._engine.idle_step()

    def _fall_asleep_alone(self, arguments: SleepArguments, token: CallToken) -> Any:
        """Sleep of this rank alone: its own pause first."""
        self._refuse_alone("sleep")
        self._sleep.check_sleep(arguments.level)
        resumes = self.pause.state is not PauseState.PAUSED

        def fall_asleep() -> None:
            try:
                self._sleep.fall_asleep(arguments.level, resumes=resumes)
            except Exception:
                if resumes:
                    self._apply(pausing.on_resume(self.pause))
                raise

        self._once_paused[token] = fall_asleep
        self._pause_alone(arguments.mode, token)
        return DEFERRED

    def _sleep_phase(self, arguments: SleepPhaseArguments, _token: CallToken) -> None:
        """Sleep of all ranks: they are paused together already."""
        self._sleep.check_sleep(arguments.level)
        if arguments.only_check:
            return
        if self.pause.state is not PauseState.PAUSED:
            raise EngineStateError("the pause that a sleep needs was ended by somebody else; call sleep again")
        self._sleep.fall_asleep(arguments.level, resumes=arguments.resumes)

    def _wake_up_alone(self, arguments: WakeUpArguments, _token: CallToken) -> bool:
        """Wake-up of this rank alone; it goes on at once where the sleep had paused it."""
        self._refuse_alone("wake_up")
        was_sleeping = self._sleep.is_sleeping
        is_awake = self._sleep.wake_up(arguments.tags)
        if was_sleeping and is_awake and self._sleep.resumes:
            self._apply(pausing.on_resume(self.pause))
        self._release_if_running()
        return is_awake

    def _wake_phase(self, arguments: WakeUpArguments, _token: CallToken) -> WakeReport:
        """Wake-up of all ranks, which are resumed together afterwards."""
        was_sleeping = self._sleep.is_sleeping
        try:
            is_awake = self._sleep.wake_up(arguments.tags)
        except EngineStateError as error:
            if was_sleeping:
                raise
            return WakeReport(is_awake=True, refusal=str(error))
        self._release_if_running()
        return WakeReport(is_awake, resumes=was_sleeping and self._sleep.resumes)

    def _release_if_running(self) -> None:
        """A rank whose pause was ended while it slept goes on when it is awake."""
        if not self.holds_requests:
            self._admission.release(self._clock())

    def _pause_phase(self, arguments: PausePhaseArguments, token: CallToken) -> Any:
        """A phase of a pause or resume over all ranks."""
        if arguments.phase == "prepare" and arguments.mode is None:
            self._sleep.check_awake("resume_scheduler")
        client = self.pause.hold.client if self.pause.hold else "another client"
        match arguments.phase:
            case "read":
                step = PauseStep(self.pause)
            case "undo":
                step = pausing.on_undo(self.pause, arguments.operation)
            case "commit":
                step = pausing.on_commit(self.pause, arguments.operation, arguments.stamp, abort=arguments.mode == "abort")
            case "prepare":
                hold = Hold(arguments.operation, token.session.id, token.session.client, PauseState.RUNNING)
                step = pausing.on_prepare(self.pause, hold, arguments.mode)
            case "drain":
                step = pausing.on_drain(self.pause, arguments.operation, token, has_work=self._engine.has_work())
        self._apply(step)
        if step.is_deferred:
            self._drained_for.add(token)
            return DEFERRED
        if arguments.phase == "commit" and not step.is_refused and not self.may_step:
            return self._complete_commit(arguments, token)
        return self._report(is_granted=not step.is_refused, client=client if step.is_refused else "")

    def _report(self, *, is_granted: bool, client: str = "") -> PauseReport:
        pause = self.pause
        is_paused = pause.state is not PauseState.RUNNING
        return PauseReport(is_granted, is_paused, pause.stamp, pause.hold is not None, pausing.is_draining(pause), client)

    def _apply(self, step: PauseStep) -> None:
        """Carry out what the pause machine decided."""
        if step.pause.stamp != self.pause.stamp:
            self._sleep.resumes = False  # a pause that is asked for during sleep outlasts it
            self._log.record_pause(step.pause.stamp)
        self.pause = step.pause
        self._progress.is_paused = step.pause.state is not PauseState.RUNNING
        self._sessions.pause_stamp = step.pause.stamp
        if step.abort_running:
            self._admission.abort_all(also_held=False)
        for token in step.completed:
            if token in self._drained_for:
                self._drained_for.discard(token)
                self._answer_value(token, self._report(is_granted=True))
            else:
                self._complete_pause(token)
        if step.release_held:
            self._admission.release(self._clock())

    def _clear_cache(self) -> None:
        reset = self._engine.utilities().get("reset_prefix_cache")
        if reset is not None and not self._engine.has_work():
            reset()

    def _complete_pause(self, token: CallToken) -> None:
        rest = self._once_paused.pop(token, None)
        if rest is not None:
            try:
                rest()
            except Exception as error:  # noqa: BLE001 -- the pause is complete; its caller is told that the rest is not
                self._answer(token, None, error_record(error))
                return
        self._answer_value(token, None)

    def _withdraw(self, token: CallToken) -> None:
        self._once_paused.pop(token, None)
        self._drained_for.discard(token)
        self._at_rest_for.pop(token, None)
        self._apply(pausing.on_withdrawn(self.pause, token))

    def _answer_value(self, token: CallToken, result: Any) -> None:
        try:
            encoded = token.session.encoder.encode_part(result)
        except Exception as error:  # noqa: BLE001 -- a result may hold anything; its caller is told
            self._answer(token, None, ErrorRecord(UnsendableResultError.__name__, f"the result {error}"))
            return
        self._answer(token, encoded, None)

    def _answer(self, token: CallToken, result: Any, error: ErrorRecord | None) -> None:
        self._tokens.pop((token.session.id, token.call_id), None)
        if self._sessions.get(token.session.id) is token.session:
            encoded = token.session.encoder.encode_part(None) if result is None else result
            self._sessions.post(token.session, CallResult(token.call_id, encoded, error))
