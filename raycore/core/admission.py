"""The engine core's requests from admission to their terminal record: given to the engine, held while paused, refused, aborted."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

import numpy as np

from raycore.config import Limits
from raycore.core.calls import error_record
from raycore.core.intake import Counters
from raycore.core.requests import RequestTable
from raycore.core.sessions import Session, SessionTable
from raycore.core.waiting_room import WaitingRoom
from raycore.engine import EMBED, EMPTY, GENERATE, Detail, Engine, EngineRequest, FinishReason, RequestRefused, StepOutput
from raycore.errors import ErrorRecord, InvalidRequestError, OverloadedError
from raycore.ids import Handle, Slot
from raycore.messages import Abort, Add, Refused, StepColumns
from raycore.sampling import check_decoded

_log = logging.getLogger(__name__)

_UINT32_BYTES = 4


class RequestAdmission:
    """Owns the request table; every request that enters it leaves by exactly one terminal record, or with its session."""

    def __init__(self, engine: Engine, sessions: SessionTable, limits: Limits, counters: Counters) -> None:
        self._engine = engine
        self._sessions = sessions
        self._limits = limits
        self._counters = counters
        self._table = RequestTable()
        self._room = WaitingRoom(limits)
        self._held: dict[int, EngineRequest] = {}

    def __len__(self) -> int:
        return len(self._table)

    @property
    def has_held(self) -> bool:
        """Whether requests wait for a resume."""
        return bool(self._held)

    def add(self, session: Session, add: Add, *, hold: bool, now_s: float) -> None:
        """Take in a request; `hold`: keep it until `release`."""
        if not self._is_wellformed(session, add):
            return
        tokens = len(add.prompt) // _UINT32_BYTES
        tensor_bytes = _bytes_of(add.tensors) if add.tensors else 0
        refusal = None if add.was_admitted else self._room.refusal(session, tokens, tensor_bytes)
        if refusal is not None:
            self._sessions.post(session, Refused(add.slot, refusal))
            return
        delivered = np.frombuffer(add.delivered, np.uint32) if add.delivered else EMPTY
        handle = self._table.add(session, add.slot, add.request_id, len(delivered))
        request = EngineRequest(
            Handle(handle),
            add.request_id,
            np.frombuffer(add.prompt, np.uint32),
            add.sampling,
            delivered,
            add.priority,
            add.tensors or {},
            add.lora,
            EMBED if add.embeds else GENERATE,
        )
        self._room.enter(handle, session, tokens, now_s, tensor_bytes)
        if hold:
            self._held[handle] = request
        else:
            self._give(request)

    def release(self, now_s: float) -> None:
        """Give the held requests to the engine, in order."""
        self._room.begin(now_s)
        held, self._held = self._held, {}
        for request in held.values():
            self._give(request)

    def abort(self, session: Session, abort: Abort) -> None:
        """End what a client no longer wants."""
        if len(abort.slots) % _UINT32_BYTES:
            self._counters.stale_frames += 1
            return
        slots = dict.fromkeys(np.frombuffer(abort.slots, np.uint32).tolist())
        self._end([session.handle_of[slot] for slot in slots if slot in session.handle_of])

    def abort_all(self, *, also_held: bool) -> None:
        """End every request with reason abort."""
        self._end([handle for handle in self._table.handles() if also_held or handle not in self._held])

    def fail_all(self, error: ErrorRecord) -> None:
        """End every request with this error."""
        self._end(list(self._table.handles()), FinishReason.ERROR, Detail(error_type=error.type, error_message=error.message))

    def refuse(self, session: Session, add: Add, error: ErrorRecord) -> None:
        """A request that cannot be served now."""
        if add.slot not in session.handle_of:
            self._sessions.post(session, Refused(add.slot, error))

    def publish(self, output: StepOutput, stamp_ns: int, now_s: float) -> None:
        """Post each session's share of a step."""
        self._room.on_output(output.handles, output.finished, now_s)
        for session, columns in self._table.columns(output, stamp_ns):
            self._sessions.post(session, columns)

    def forget_session(self, session: Session) -> int:
        """A session ended: nobody is told of its requests; returns how many there were."""
        handles = list(session.handle_of.values())
        self._take_from_engine(handles)
        for handle in handles:
            self._room.leave(handle)
            self._table.remove(handle)
        self._table.forget_session(session)
        return len(handles)

    def check_invariants(self) -> None:
        """Raise AssertionError when the tables disagree; for tests."""
        self._table.check_invariants(self._sessions.all())
        self._room.check_invariants(self._sessions.all())
        assert set(self._held) <= set(self._table.handles()), "a held request has no handle"  # noqa: S101

    def _is_wellformed(self, session: Session, add: Add) -> bool:
        if add.slot in session.handle_of:
            self._counters.stale_frames += 1
            return False
        if not 0 <= add.slot < self._limits.session_requests:
            text = f"a session may have {self._limits.session_requests} requests here"
            self._sessions.post(session, Refused(add.slot, ErrorRecord(OverloadedError.__name__, text)))
            return False
        if len(add.prompt) % _UINT32_BYTES or len(add.delivered) % _UINT32_BYTES:
            record = ErrorRecord(InvalidRequestError.__name__, "a token column is not a whole number of uint32")
            self._sessions.post(session, Refused(add.slot, record))
            return False
        try:
            check_decoded(add.sampling)
        except InvalidRequestError as error:
            self._sessions.post(session, Refused(add.slot, ErrorRecord(InvalidRequestError.__name__, str(error))))
            return False
        return True

    def _give(self, request: EngineRequest) -> None:
        try:
            self._check_ability(request)
            self._engine.add(request)
        except (RequestRefused, InvalidRequestError) as refusal:
            self._refuse(request.handle, ErrorRecord(InvalidRequestError.__name__, str(refusal)))
        except Exception as error:  # noqa: BLE001 -- whatever one request does to the engine's door is that request's failure
            _log.warning("request %s failed at admission", request.request_id, exc_info=error)
            self._engine.abort([request.handle])
            self._refuse(request.handle, error_record(error))

    def _check_ability(self, request: EngineRequest) -> None:
        """Refuse what an engine that does not look at it would ignore."""
        info = self._engine.info
        if request.task not in info.tasks:
            raise RequestRefused(f"the model supports {', '.join(info.tasks)}, not {request.task}")
        if request.lora is not None and "add_lora" not in self._engine.utilities():
            raise RequestRefused(f"the engine {info.engine!r} has no LoRA adapters")

    def _refuse(self, handle: Handle, error: ErrorRecord) -> None:
        self._room.leave(handle)
        owner = self._table.remove(handle)
        if owner is not None:
            session, slot = owner
            self._sessions.post(session, Refused(Slot(slot), error))

    def _end(self, handles: list[int], reason: FinishReason = FinishReason.ABORT, detail: Detail | None = None) -> None:
        if not handles:
            return
        self._take_from_engine(handles)
        ended: dict[bytes, tuple[Session, list[int]]] = {}
        for handle in handles:
            self._room.leave(handle)
            owner = self._table.remove(handle)
            if owner is not None:
                ended.setdefault(owner[0].id, (owner[0], []))[1].append(owner[1])
        for session, slots in ended.values():
            details = [] if detail is None else [(Slot(slot), detail) for slot in slots]
            finished = np.array(slots, np.uint32).tobytes()
            self._sessions.post(session, StepColumns(b"", b"", b"", finished, bytes([reason]) * len(slots), details=details))

    def _take_from_engine(self, handles: list[int]) -> None:
        known = [handle for handle in handles if self._held.pop(handle, None) is None]
        if known:
            self._engine.abort(known)


def _bytes_of(value: Any) -> int:
    """Bytes of the tensors in a request's `tensors`, however they are nested."""
    if isinstance(value, Mapping):
        return sum(map(_bytes_of, value.values()))
    if isinstance(value, (list, tuple)):
        return sum(map(_bytes_of, value))
    return int(getattr(value, "nbytes", 0))
