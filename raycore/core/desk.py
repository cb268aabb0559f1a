"""Utility calls and the pause state of one engine core: run on the step thread, answered at once or when the engine is idle."""

from __future__ import annotations

from typing import Any

from raycore.config import Timeouts
from raycore.core import pause as pausing
from raycore.core.admission import RequestAdmission
from raycore.core.beats import Progress
from raycore.core.calls import DEFERRED, CallDispatcher, CallToken, error_record, find_operation
from raycore.core.intake import FrameIntake
from raycore.core.pause import Pause, PauseState, PauseStep
from raycore.core.sessions import Session, SessionTable
from raycore.engine import Engine
from raycore.errors import ErrorRecord
from raycore.messages import Call, CallResult, CancelCall
from raycore.operations import Arguments, PauseArguments


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
    ) -> None:
        self.pause = Pause()
        self._engine = engine
        self._sessions = sessions
        self._admission = admission
        self._intake = intake
        self._progress = progress
        self._timeouts = timeouts
        self._tokens: dict[tuple[bytes, int], CallToken] = {}
        self._clear_cache_for: set[CallToken] = set()
        methods = {
            "get_supported_tasks": lambda _arguments, _token: engine.info.tasks,
            "dp_engines_running": lambda _arguments, _token: engine.has_work() or admission.has_held,
            "is_scheduler_paused": lambda _arguments, _token: self.pause.state is not PauseState.RUNNING,
            "pause_scheduler": self._pause_scheduler,
            "resume_scheduler": lambda _arguments, _token: self._apply(pausing.on_resume(self.pause)),
            "execute_dummy_batch": lambda _arguments, _token: engine.idle_step(),
        }
        self._dispatcher = CallDispatcher(engine, rank, methods)

    @property
    def may_step(self) -> bool:
        """Whether the pause state lets the engine step."""
        return self.pause.state is not PauseState.PAUSED

    @property
    def holds_requests(self) -> bool:
        """Whether new requests wait for a resume."""
        return self.pause.state is not PauseState.RUNNING

    def run(self, session: Session, call: Call) -> None:
        """Carry out a call; whatever it raises is its answer."""
        token = CallToken(session, call.call_id)
        try:
            operation = find_operation(call.method)
            arguments: Arguments = self._intake.decode_arguments(call.arguments, operation.arguments)
            self._tokens[session.id, call.call_id] = token
            self._progress.begin(call.method, operation.timeout_s or self._timeouts.call_s)
            try:
                result = self._dispatcher.run(operation, arguments, token)
            finally:
                self._progress.end()
        except Exception as error:  # noqa: BLE001 -- the caller gets it, typed, with its traceback
            self._answer(token, None, error_record(error))
            return
        if result is not DEFERRED:
            self._answer_value(token, result)

    def cancel(self, session: Session, cancel: CancelCall) -> None:
        """Nobody waits for this call any more."""
        token = self._tokens.pop((session.id, cancel.call_id), None)
        if token is not None:
            self._withdraw(token)

    def forget_session(self, session: Session) -> None:
        """Nobody waits for this session's calls any more."""
        for key in [key for key in self._tokens if key[0] == session.id]:
            self._withdraw(self._tokens.pop(key))

    def on_step(self) -> None:
        """A step is over."""
        self._dispatcher.profiler.on_step()

    def on_turn(self) -> None:
        """Complete a pause that waited for the engine to be idle."""
        if self.pause.state is PauseState.PAUSING and not self._engine.has_work():
            self._apply(pausing.on_idle(self.pause))

    def _pause_scheduler(self, arguments: PauseArguments, token: CallToken) -> Any:
        if arguments.clear_cache:
            self._clear_cache_for.add(token)
        self._apply(pausing.on_pause(self.pause, arguments.mode, token, has_work=self._engine.has_work()))
        return DEFERRED

    def _apply(self, step: PauseStep) -> None:
        """Carry out what the pause machine decided."""
        self.pause = step.pause
        if step.abort_running:
            self._admission.abort_all(also_held=False)
        for token in step.completed:
            self._complete_pause(token)
        if step.release_held:
            self._admission.release()

    def _complete_pause(self, token: CallToken) -> None:
        is_wanted = token in self._clear_cache_for
        self._clear_cache_for.discard(token)
        if is_wanted and not self._engine.has_work():
            reset = self._engine.utilities().get("reset_prefix_cache")
            try:
                if reset is not None:
                    reset()
            except Exception as error:  # noqa: BLE001 -- the pause holds; its caller is told that the cache does too
                self._answer(token, None, error_record(error))
                return
        self._answer_value(token, None)

    def _withdraw(self, token: CallToken) -> None:
        self._clear_cache_for.discard(token)
        self._apply(pausing.on_withdrawn(self.pause, token))

    def _answer_value(self, token: CallToken, result: Any) -> None:
        try:
            encoded = token.session.encoder.encode_part(result)
        except Exception as error:  # noqa: BLE001 -- a result may hold anything; its caller is told
            self._answer(token, None, ErrorRecord(type(error).__name__, f"the result cannot be sent: {error}"))
            return
        self._answer(token, encoded, None)

    def _answer(self, token: CallToken, result: Any, error: ErrorRecord | None) -> None:
        self._tokens.pop((token.session.id, token.call_id), None)
        if self._sessions.get(token.session.id) is token.session:
            encoded = token.session.encoder.encode_part(None) if result is None else result
            self._sessions.post(token.session, CallResult(token.call_id, encoded, error))
