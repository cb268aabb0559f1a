"""Utility calls: checked at the door, sent to one rank or to all, and their answers put together as the verb says."""

from __future__ import annotations

import asyncio
import contextlib
from typing import Any

import msgspec

from raycore import pickled
from raycore.client.calls import CallTable, remote_error
from raycore.client.fleet import EngineFleet
from raycore.client.meter import ClientMeter
from raycore.client.operations import arguments_of
from raycore.client.pause_desk import PauseDesk
from raycore.client.pool_calls import ask_all_and_joiners, ask_each, new_pool_call
from raycore.client.session import EngineSession
from raycore.client.sleep_desk import SleepDesk
from raycore.config import Timeouts
from raycore.errors import (
    DisagreementError,
    FrameError,
    InvalidArgumentsError,
    NotSupportedError,
    RaycoreError,
    SessionLostError,
)
from raycore.messages import CallResult
from raycore.operations import (
    OPERATIONS,
    PAUSE_PHASE,
    SLEEP_PHASE,
    FanOut,
    Operation,
    PauseArguments,
    PausePhaseArguments,
    PauseReport,
    SleepArguments,
    WakeUpArguments,
)

_LONGEST_S = 1e9
_OK = "ok"
_IS_PAUSED = "is_scheduler_paused"


class UtilityDesk:
    """Every call ends by its reply, its deadline, a cancel, the loss of its engine or session, or the end of the client."""

    def __init__(
        self, fleet: EngineFleet, timeouts: Timeouts, *, in_process: bool, allow_pickle: bool, meter: ClientMeter | None = None
    ) -> None:
        self._fleet = fleet
        self._timeouts = timeouts
        self._in_process = in_process
        self._allow_pickle = allow_pickle
        self._meter = meter
        self._table = CallTable(asyncio.get_running_loop())
        self._pauses = PauseDesk(fleet, self._send_phase)
        self._sleeps = SleepDesk(fleet, self._pauses, self._send_sleep)

    def __len__(self) -> int:
        return len(self._table)

    @property
    def late_replies(self) -> int:
        """Answers that came when nobody waited any more."""
        return self._table.late_replies

    async def one(self, method: str, rank: int, timeout_s: float | None, arguments: dict[str, Any]) -> Any:
        """One rank's result, or its error."""
        operation, struct = self._prepare(method, arguments)
        return await self._send(operation, struct, self._fleet.of_rank(rank), timeout_s)

    async def all(self, method: str, timeout_s: float | None, arguments: dict[str, Any]) -> dict[int, Any]:
        """Every serving rank's result, or its error as the value; for what all ranks do together: None of each."""
        operation, struct = self._prepare(method, arguments)
        if operation.fan_out is FanOut.TOGETHER:
            result = await self._together(operation, struct, timeout_s)
            return {session.engine.rank: result for session in self._fleet.sessions()}
        if not operation.changes_engine:
            return await ask_each(self._fleet.sessions(), self._fleet, lambda session: self._send(operation, struct, session, timeout_s))
        pool_call = new_pool_call()
        return await ask_all_and_joiners(
            self._fleet, lambda session: self._send(operation, struct, session, timeout_s, pool_call=pool_call)
        )

    async def agree(self, method: str, timeout_s: float | None, arguments: dict[str, Any]) -> Any:
        """The one result of all ranks; their first error, or DisagreementError."""
        if method == _IS_PAUSED:
            self._prepare(method, arguments)
            return await self._pauses.is_paused(method, _checked(timeout_s, method))
        results = await self.all(method, timeout_s, arguments)
        _raise_first(results)
        first, *others = results.values()
        if any(other != first for other in others):
            msg = f"ranks answered {method} differently: {results}"
            raise DisagreementError(msg, method=method, results=results)
        return first

    async def any(self, method: str, timeout_s: float | None, arguments: dict[str, Any]) -> Any:
        """The result of one serving rank, whichever; what all ranks do together is done together."""
        if method in OPERATIONS and OPERATIONS[method].fan_out is FanOut.TOGETHER:
            return next(iter((await self.all(method, timeout_s, arguments)).values()), None)
        sessions = self._fleet.sessions()
        if not sessions:
            raise self._fleet.no_engine()
        return await self.one(method, sessions[0].engine.rank, timeout_s, arguments)

    async def declared(self, method: str, rank: int | None, timeout_s: float | None, arguments: dict[str, Any]) -> Any:
        """With the fan-out that the operation declares, or on one rank."""
        if rank is not None:
            return await self.one(method, rank, timeout_s, arguments)
        operation, _ = self._prepare(method, arguments)
        match operation.fan_out:
            case FanOut.AGREE:
                return await self.agree(method, timeout_s, arguments)
            case FanOut.ANY:
                return await self.any(method, timeout_s, arguments)
            case FanOut.TOGETHER:
                return await self.any(method, timeout_s, arguments)
            case FanOut.ALL | FanOut.EVERY_TRUE:
                results = await self.all(method, timeout_s, arguments)
                _raise_first(results)
                return all(results.values()) if operation.fan_out is FanOut.EVERY_TRUE else list(results.values())

    def on_result(self, session: EngineSession, result: CallResult) -> None:
        """An engine answered."""
        call = self._table.take(result.call_id)
        if call is None:
            self._drop(session, result)
            return
        if result.error is not None:
            call.future.set_exception(remote_error(result.error, call.operation.name, session.engine))
            return
        try:
            call.future.set_result(session.decoder.decode_part(result.result, call.operation.result))
        except FrameError as error:
            call.future.set_exception(error)

    @staticmethod
    def _drop(session: EngineSession, result: CallResult) -> None:
        """Take a late result's files, so that nothing of it stays in shared memory."""
        with contextlib.suppress(FrameError):
            session.decoder.decode_part(result.result, Any)

    def on_pause_stamp(self) -> None:
        """A rank carried out a pause or resume over all ranks."""
        self._pauses.on_stamp()

    def on_session_lost(self, session: EngineSession, reason: str) -> None:
        """Whether its calls ran is not known."""
        self._table.fail_session(session, lambda op: SessionLostError(f"{op.name} on {session.engine}: session lost ({reason})"))

    def on_engine_gone(self, session: EngineSession, cause: str) -> None:
        """Its calls will never be answered."""
        self._table.fail_session(session, lambda op: self._fleet.death_of(session.engine, cause, f"{op.name} on {session.engine}: "))

    def close(self) -> None:
        """Every call fails with ClientClosedError."""
        self._pauses.close()
        self._table.close()

    async def wait_closed(self) -> None:
        """Until no task is left."""
        await self._pauses.wait_closed()

    async def _together(self, operation: Operation, arguments: msgspec.Struct, timeout_s: float | None) -> Any:
        limit_s = _checked(timeout_s, operation.name) or operation.timeout_s or self._timeouts.call_s
        match arguments:
            case SleepArguments():
                return await self._sleeps.sleep(arguments, limit_s)
            case WakeUpArguments():
                return await self._sleeps.wake_up(arguments, limit_s)
            case PauseArguments():
                return await self._pauses.set_paused(operation.name, arguments, limit_s)
            case _:
                return await self._pauses.set_paused(operation.name, None, limit_s)

    async def _send_sleep(
        self, phase: Operation, session: EngineSession, arguments: msgspec.Struct, timeout_s: float, pool_call: str
    ) -> Any:
        # errors name what the caller asked for
        asked = msgspec.structs.replace(phase, name="sleep" if phase is SLEEP_PHASE else "wake_up")
        return await self._send(asked, arguments, session, timeout_s, sent_as=phase.name, pool_call=pool_call)

    async def _send_phase(
        self, method: str, session: EngineSession, arguments: PausePhaseArguments, timeout_s: float | None
    ) -> PauseReport:
        # errors name what the caller asked for
        asked = msgspec.structs.replace(OPERATIONS[method], result=PauseReport, timeout_s=None)
        return await self._send(asked, arguments, session, timeout_s, sent_as=PAUSE_PHASE.name)

    def _prepare(self, method: str, arguments: dict[str, Any]) -> tuple[Operation, msgspec.Struct]:
        if method == pickled.METHOD:
            arguments = pickled.with_pickled_function(arguments, is_allowed=self._allow_pickle)
        operation, struct = arguments_of(method, arguments)
        if self._in_process and operation.refused_in_process is not None:
            reason = operation.refused_in_process(struct)
            if reason:
                raise NotSupportedError(reason, method=method)
        return operation, struct

    async def _send(
        self,
        operation: Operation,
        arguments: msgspec.Struct,
        session: EngineSession,
        timeout_s: float | None,
        *,
        sent_as: str = "",
        pool_call: str = "",
    ) -> Any:
        limit_s = _checked(timeout_s, operation.name) or operation.timeout_s or self._timeouts.call_s
        call_id, future = self._table.open(operation, session, limit_s)
        meter = self._meter
        begun_s = 0.0 if meter is None else meter.clock()
        try:
            session.call(call_id, sent_as or operation.name, arguments, pool_call)
            result = await future
        except BaseException as error:
            if meter is not None:
                meter.called(operation.name, type(error).__name__, meter.clock() - begun_s)
            if self._table.forget(call_id) is not None:
                session.cancel_call(call_id)
            if isinstance(error, TypeError) and not isinstance(error, RaycoreError):
                msg = f"{operation.name}: an argument {error}"
                raise InvalidArgumentsError(msg, method=operation.name) from error
            raise
        if meter is not None:
            meter.called(operation.name, _OK, meter.clock() - begun_s)
        return result


def _checked(timeout_s: object, method: str) -> float | None:
    """A deadline as a number of seconds; InvalidArgumentsError for what is none."""
    if timeout_s is None:
        return None
    if isinstance(timeout_s, bool) or not isinstance(timeout_s, (int, float)) or not 0 < timeout_s < _LONGEST_S:
        msg = f"{method}: timeout_s must be a number of seconds above 0, not {timeout_s!r}"
        raise InvalidArgumentsError(msg, method=method)
    return timeout_s


def _raise_first(results: dict[int, Any]) -> None:
    for result in results.values():
        if isinstance(result, RaycoreError):
            raise result
