"""Pending utility calls: each ends by its reply, its deadline, a cancel, the death of its engine or the end of the client, and by nothing
else.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from raycore import errors
from raycore.errors import CallTimeoutError, ErrorRecord, RaycoreError, RemoteCallError, UtilityError
from raycore.ids import CallId, EngineId
from raycore.operations import Operation

if TYPE_CHECKING:
    from raycore.client.session import EngineSession


@dataclass(slots=True)
class PendingCall:
    """One call on one engine."""

    operation: Operation
    session: EngineSession
    future: asyncio.Future[Any]
    deadline_s: float


class CallTable:
    """The calls that wait for an answer, and one timer for the earliest deadline."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._pending: dict[int, PendingCall] = {}
        self._next_id = 0
        self._timer: asyncio.TimerHandle | None = None
        self.late_replies = 0

    def __len__(self) -> int:
        return len(self._pending)

    def open(self, operation: Operation, session: EngineSession, timeout_s: float) -> tuple[CallId, asyncio.Future[Any]]:
        """A new pending call and the future of its result."""
        self._next_id += 1
        call_id = CallId(self._next_id)
        future: asyncio.Future[Any] = self._loop.create_future()
        deadline_s = self._loop.time() + timeout_s
        self._pending[call_id] = PendingCall(operation, session, future, deadline_s)
        timer = self._timer
        if timer is None or deadline_s < timer.when():
            self._set_timer(deadline_s)
        return call_id, future

    def take(self, call_id: CallId) -> PendingCall | None:
        """Remove a call whose reply came; None for one that is not waited for any more, which is counted."""
        call = self._pending.pop(call_id, None)
        if call is None:
            self.late_replies += 1
            return None
        call.session.end_call(call_id)
        if call.future.done():
            self.late_replies += 1
            return None
        return call

    def forget(self, call_id: CallId) -> PendingCall | None:
        """The caller was cancelled."""
        return self._pending.pop(call_id, None)

    def fail_session(self, session: EngineSession, make_error: Callable[[Operation], RaycoreError]) -> None:
        """The session or its engine is lost: exactly its calls fail."""
        for call_id in [call_id for call_id, call in self._pending.items() if call.session is session]:
            call = self._pending.pop(call_id)
            if not call.future.done():
                call.future.set_exception(make_error(call.operation))

    def close(self) -> None:
        """The client ended: every call fails."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        for call in self._pending.values():
            if not call.future.done():
                call.future.set_exception(errors.ClientClosedError(f"the client was closed while {call.operation.name} was waiting"))
        self._pending.clear()

    def _set_timer(self, when_s: float) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._timer = self._loop.call_at(when_s, self._on_deadline)

    def _on_deadline(self) -> None:
        now_s = self._loop.time()
        self._timer = None
        for call_id in [call_id for call_id, call in self._pending.items() if call.deadline_s <= now_s]:
            call = self._pending.pop(call_id)
            call.session.cancel_call(CallId(call_id))
            if not call.future.done():
                rank = call.session.engine.rank
                message = f"{call.operation.name} on rank {rank} gave no result before its deadline"
                call.future.set_exception(CallTimeoutError(message, method=call.operation.name, rank=rank))
        if self._pending:
            self._set_timer(min(call.deadline_s for call in self._pending.values()))


_OWN_ERRORS: dict[str, type[UtilityError]] = {
    kind.__name__: kind
    for kind in (
        errors.UnknownOperationError,
        errors.InvalidArgumentsError,
        errors.NotSupportedError,
        errors.EngineStateError,
        errors.AdapterError,
        errors.SaveError,
        errors.PickleRefusedError,
        errors.UnsendableResultError,
        errors.PauseInProgressError,
    )
}


def remote_error(record: ErrorRecord, method: str, engine: EngineId) -> UtilityError:
    """The engine's error as ours: our own types come back as they were, others as RemoteCallError."""
    kind = _OWN_ERRORS.get(record.type)
    if kind is not None:
        return kind(record.message, method=method, rank=engine.rank)
    message = f"{method} on rank {engine.rank} raised {record.type}: {record.message}"
    return RemoteCallError(message, method=method, rank=engine.rank, remote_type=record.type, traceback=record.traceback)
