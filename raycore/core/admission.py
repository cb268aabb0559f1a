"""The engine core's requests from admission to their terminal record: given to the engine, held while paused, refused, aborted."""

from __future__ import annotations

import logging

import numpy as np

from raycore.config import Limits
from raycore.core.calls import error_record
from raycore.core.intake import Counters
from raycore.core.requests import RequestTable
from raycore.core.sessions import Session, SessionTable
from raycore.engine import EMPTY, Engine, EngineRequest, FinishReason, RequestRefused, StepOutput
from raycore.errors import AdmissionError, ErrorRecord, InvalidRequestError
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
        self._held: dict[int, EngineRequest] = {}

    def __len__(self) -> int:
        return len(self._table)

    @property
    def has_held(self) -> bool:
        """Whether requests wait for a resume."""
        return bool(self._held)

    def add(self, session: Session, add: Add, *, hold: bool) -> None:
        """Take in a request; `hold`: keep it until `release`."""
        if not self._is_wellformed(session, add):
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
        )
        if hold:
            self._held[handle] = request
        else:
            self._give(request)

    def release(self) -> None:
        """Give the held requests to the engine, in order."""
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

    def publish(self, output: StepOutput, stamp_ns: int) -> None:
        """Post each session's share of a step."""
        for session, columns in self._table.columns(output, stamp_ns):
            self._sessions.post(session, columns)

    def forget_session(self, session: Session) -> int:
        """A session ended: nobody is told of its requests; returns how many there were."""
        handles = list(session.handle_of.values())
        self._take_from_engine(handles)
        for handle in handles:
            self._table.remove(handle)
        self._table.forget_session(session)
        return len(handles)

    def check_invariants(self) -> None:
        """Raise AssertionError when the tables disagree; for tests."""
        self._table.check_invariants(self._sessions.all())
        assert set(self._held) <= set(self._table.handles()), "a held request has no handle"  # noqa: S101

    def _is_wellformed(self, session: Session, add: Add) -> bool:
        if add.slot in session.handle_of:
            self._counters.stale_frames += 1
            return False
        if not 0 <= add.slot < self._limits.session_requests:
            text = f"a session may have {self._limits.session_requests} requests here"
            self._sessions.post(session, Refused(add.slot, ErrorRecord(AdmissionError.__name__, text)))
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
            self._engine.add(request)
        except (RequestRefused, InvalidRequestError) as refusal:
            self._refuse(request.handle, ErrorRecord(InvalidRequestError.__name__, str(refusal)))
        except Exception as error:  # noqa: BLE001 -- whatever one request does to the engine's door is that request's failure
            _log.warning("request %s failed at admission", request.request_id, exc_info=error)
            self._engine.abort([request.handle])
            self._refuse(request.handle, error_record(error))

    def _refuse(self, handle: Handle, error: ErrorRecord) -> None:
        owner = self._table.remove(handle)
        if owner is not None:
            session, slot = owner
            self._sessions.post(session, Refused(Slot(slot), error))

    def _end(self, handles: list[int]) -> None:
        if not handles:
            return
        self._take_from_engine(handles)
        ended: dict[bytes, tuple[Session, list[int]]] = {}
        for handle in handles:
            owner = self._table.remove(handle)
            if owner is not None:
                ended.setdefault(owner[0].id, (owner[0], []))[1].append(owner[1])
        for session, slots in ended.values():
            reasons = bytes([FinishReason.ABORT]) * len(slots)
            self._sessions.post(session, StepColumns(b"", b"", b"", np.array(slots, np.uint32).tobytes(), reasons))

    def _take_from_engine(self, handles: list[int]) -> None:
        known = [handle for handle in handles if self._held.pop(handle, None) is None]
        if known:
            self._engine.abort(known)
