"""Utility calls: checked at the door, sent to one rank or to all, and their answers put together as the verb says."""

from __future__ import annotations

import asyncio
import contextlib
from typing import Any

import msgspec

from raycore.client.calls import CallTable, remote_error
from raycore.client.fleet import EngineFleet
from raycore.client.operations import arguments_of
from raycore.client.session import EngineSession
from raycore.config import Timeouts
from raycore.errors import (
    DisagreementError,
    EngineDeadError,
    FrameError,
    InvalidArgumentsError,
    NotSupportedError,
    RaycoreError,
    SessionLostError,
)
from raycore.messages import CallResult
from raycore.operations import FanOut, Operation

_LONGEST_S = 1e9


class UtilityDesk:
    """Every call ends by its reply, its deadline, a cancel, the loss of its engine or session, or the end of the client."""

    def __init__(self, fleet: EngineFleet, timeouts: Timeouts, *, in_process: bool) -> None:
        self._fleet = fleet
        self._timeouts = timeouts
        self._in_process = in_process
        self._table = CallTable(asyncio.get_running_loop())

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
        """Every serving rank's result, or its error as the value."""
        operation, struct = self._prepare(method, arguments)
        sessions = self._fleet.sessions()
        if not sessions:
            raise self._fleet.no_engine()
        answers = await asyncio.gather(*(self._send(operation, struct, s, timeout_s) for s in sessions), return_exceptions=True)
        for answer in answers:
            if isinstance(answer, BaseException) and not isinstance(answer, RaycoreError):
                raise answer
        return {session.engine.rank: answer for session, answer in zip(sessions, answers, strict=True)}

    async def agree(self, method: str, timeout_s: float | None, arguments: dict[str, Any]) -> Any:
        """The one result of all ranks; their first error, or DisagreementError."""
        results = await self.all(method, timeout_s, arguments)
        _raise_first(results)
        first, *others = results.values()
        if any(other != first for other in others):
            msg = f"ranks answered {method} differently: {results}"
            raise DisagreementError(msg, method=method, results=results)
        return first

    async def any(self, method: str, timeout_s: float | None, arguments: dict[str, Any]) -> Any:
        """The result of one serving rank, whichever."""
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

    def on_session_lost(self, session: EngineSession, reason: str) -> None:
        """Whether its calls ran is not known."""
        self._table.fail_session(session, lambda op: SessionLostError(f"{op.name} on {session.engine}: session lost ({reason})"))

    def on_engine_gone(self, session: EngineSession, cause: str) -> None:
        """Its calls will never be answered."""
        rank = session.engine.rank
        self._table.fail_session(
            session, lambda op: EngineDeadError(f"{op.name} on {session.engine}: it is dead: {cause}", rank=rank, cause=cause)
        )

    def close(self) -> None:
        """Every call fails with ClientClosedError."""
        self._table.close()

    def _prepare(self, method: str, arguments: dict[str, Any]) -> tuple[Operation, msgspec.Struct]:
        operation, struct = arguments_of(method, arguments)
        if self._in_process and operation.refused_in_process is not None:
            reason = operation.refused_in_process(struct)
            if reason:
                raise NotSupportedError(reason, method=method)
        return operation, struct

    async def _send(self, operation: Operation, arguments: msgspec.Struct, session: EngineSession, timeout_s: float | None) -> Any:
        limit_s = _checked(timeout_s, operation.name) or operation.timeout_s or self._timeouts.call_s
        call_id, future = self._table.open(operation, session, limit_s)
        try:
            session.call(call_id, operation.name, arguments)
            return await future
        except BaseException as error:
            if self._table.forget(call_id) is not None:
                session.cancel_call(call_id)
            if isinstance(error, TypeError) and not isinstance(error, RaycoreError):
                msg = f"{operation.name}: an argument {error}"
                raise InvalidArgumentsError(msg, method=operation.name) from error
            raise


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
