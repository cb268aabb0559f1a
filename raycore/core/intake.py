"""The engine core's door for frames: decoding, order, attaching, and what becomes of frames that are not right.

Nothing that arrives here can end the loop. A bad item in a good frame is answered alone; a frame that cannot be read ends its session,
never its requests
for good: the client attaches anew and re-admits them.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import msgspec

from raycore.codec import FrameDecoder
from raycore.config import Limits
from raycore.core.sessions import Session, SessionTable
from raycore.engine import EngineInfo
from raycore.errors import ErrorRecord, FrameError, InvalidRequestError
from raycore.ids import CallId, EngineId, SessionId, Slot
from raycore.membership import Membership
from raycore.messages import (
    OUTSIDE_THE_ORDER,
    PROTOCOL_VERSION,
    Attach,
    Attached,
    AttachRefused,
    BadFrame,
    CallResult,
    ClientFrame,
    Refused,
    ToEngine,
    Wake,
)
from raycore.tensors import TensorReader, can_read
from raycore.transport.channel import Message

_log = logging.getLogger(__name__)

_ADD_TAG, _CALL_TAG = 1, 3
_LEASES_ALLOWED = 10
"""A client may ask for a lease of so many times the pool's own."""


class Counters:
    """What was dropped or refused, by kind; read by `status` and by tests."""

    def __init__(self) -> None:
        self.bad_frames = 0
        self.stale_frames = 0
        self.ended_sessions = 0


class _RawFrame(msgspec.Struct, frozen=True, array_like=True):
    """A client frame whose items are looked at one by one."""

    seq: int
    items: list[msgspec.Raw]


class FrameIntake:
    """Turns messages into items of sessions, in order."""

    def __init__(
        self,
        engine: EngineId,
        info: EngineInfo,
        sessions: SessionTable,
        limits: Limits,
        counters: Counters,
        membership: Callable[[], Membership],
        clock: Callable[[], float],
        on_wake: Callable[[Wake], None],
    ) -> None:
        self._engine = engine
        self._info = info
        self._sessions = sessions
        self._limits = limits
        self._counters = counters
        self._membership = membership
        self._clock = clock
        self._on_wake = on_wake
        self._pool = membership().pool
        self._reader = TensorReader(self._pool)
        self._decoder = FrameDecoder(ClientFrame, self._reader)
        self._raw_decoder = FrameDecoder(_RawFrame, self._reader)

    def take(self, session_id: bytes, message: Message) -> tuple[Session, list[ToEngine]] | None:
        """The session and its new items, or None when there is nothing to do."""
        session = self._sessions.get(session_id)
        try:
            frame = self._decoder.decode(message)
        except FrameError as error:
            salvaged = None if session is None else self._salvage(session, message)
            if salvaged is None:
                self._on_bad_frame(session, session_id, error)
                return None
            frame = salvaged
        if session is None:
            if frame.seq == OUTSIDE_THE_ORDER and all(isinstance(item, Wake) for item in frame.items):
                self._on_peer(session_id, frame)
                return None
            return self._on_stranger(SessionId(session_id), frame)
        if frame.seq != session.next_in:
            self._counters.stale_frames += 1
            reason = f"frame {frame.seq} came where {session.next_in} was due"
            self._sessions.tell_expired(session_id, reason)
            self._sessions.end(session, reason)
            return None
        return self._accept(session, frame)

    def release(self) -> None:
        """The messages of this turn are done with."""
        self._reader.release()

    def decode_arguments(self, raw: msgspec.Raw, kind: Any) -> Any:
        """Decode a part of the message that was taken last. FrameError when it does not fit."""
        return self._decoder.decode_part(raw, kind)

    def _accept(self, session: Session, frame: ClientFrame) -> tuple[Session, list[ToEngine]]:
        session.next_in = frame.seq + 1
        session.ack = frame.seq
        session.last_heard_s = self._clock()
        session.gone_since_s = None
        return session, frame.items

    def _on_peer(self, session_id: bytes, frame: ClientFrame) -> None:
        """A peer has no session, and is not answered."""
        for item in frame.items:
            if isinstance(item, Wake):
                self._on_wake(item)
        self._sessions.forget_stranger(session_id)

    def _on_stranger(self, session_id: SessionId, frame: ClientFrame) -> tuple[Session, list[ToEngine]] | None:
        attach = frame.items[0] if frame.items and isinstance(frame.items[0], Attach) else None
        if attach is None or frame.seq != 0:
            self._counters.stale_frames += 1
            self._sessions.tell_expired(session_id, "this session is not known here (any more)")
            return None
        reason = self._refusal(attach)
        if reason:
            self._sessions.tell_stranger(session_id, AttachRefused(reason))
            return None
        if attach.replaces is not None and (old := self._sessions.get(attach.replaces)) is not None:
            self._sessions.end(old, "replaced by its client")
        shares_memory = bool(attach.memory_probe) and can_read(attach.memory_probe, self._pool)
        session = self._sessions.open(session_id, attach, self._clock(), shares_memory=shares_memory)
        self._sessions.post(session, Attached(self._engine, self._info, self._membership(), shares_memory))
        session, items = self._accept(session, frame)
        return session, items[1:]

    def _refusal(self, attach: Attach) -> str | None:
        if attach.version != PROTOCOL_VERSION:
            return f"this engine speaks protocol version {PROTOCOL_VERSION}, the client {attach.version}"
        if attach.pool != self._pool or attach.incarnation != self._engine.incarnation:
            return f"this is {self._engine} of pool {self._pool!r}"
        if not 0 < attach.lease_s <= self._limits.lease_s * _LEASES_ALLOWED:
            return f"a lease of {attach.lease_s} s is out of range"
        return None

    def _on_bad_frame(self, session: Session | None, session_id: bytes, error: FrameError) -> None:
        self._counters.bad_frames += 1
        _log.warning("a frame of %s was dropped: %s", session.client if session else "a stranger", error)
        record = ErrorRecord(type(error).__name__, str(error))
        if session is None:
            self._sessions.tell_stranger(session_id, BadFrame(record))
            return
        # its number cannot be trusted, so the session's order is lost
        self._sessions.tell_expired(session_id, f"a frame did not decode: {error}")
        self._sessions.end(session, "a frame did not decode")

    def _salvage(self, session: Session, message: Message) -> ClientFrame | None:
        """A frame whose outer shape is right: its good items; each bad request or call is answered alone.

        None when nothing can be saved.
        """
        try:
            outer = self._raw_decoder.decode(message)
        except FrameError:
            return None
        if outer.seq != session.next_in:
            return None
        self._counters.bad_frames += 1
        items: list[ToEngine] = []
        for raw in outer.items:
            # a bad request keeps its place in the order: what was before it is answered before it
            try:
                items.append(self._raw_decoder.decode_part(raw, ToEngine))
            except FrameError as error:
                self._answer_bad_item(session, raw, error)
        return ClientFrame(outer.seq, items)

    def _answer_bad_item(self, session: Session, raw: msgspec.Raw, error: FrameError) -> None:
        record = ErrorRecord(InvalidRequestError.__name__, str(error))
        match _untyped(raw):
            case [tag, int(slot), *_] if tag == _ADD_TAG and slot >= 0 and slot not in session.handle_of:
                self._sessions.post(session, Refused(Slot(slot), record))
            case [tag, int(call_id), *_] if tag == _CALL_TAG:
                self._sessions.post(session, CallResult(CallId(call_id), session.encoder.encode_part(None), record))
            case [_, int(_), str(request_id), *_]:
                self._sessions.post(session, BadFrame(record, request_id))  # type: ignore[arg-type]
            case _:
                self._sessions.post(session, BadFrame(record))


def _untyped(raw: msgspec.Raw) -> Any:
    try:
        return msgspec.msgpack.decode(raw)
    except (msgspec.DecodeError, ValueError, RecursionError):
        return None
