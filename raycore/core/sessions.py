"""The engine core's sessions: order, leases, what is queued for each client, and which of its slots are in use."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence

from raycore.codec import FrameEncoder
from raycore.config import Limits
from raycore.engine import EngineLoad, TokenArray
from raycore.ids import SessionId
from raycore.messages import Attach, EngineFrame, SessionExpired, ToClient
from raycore.tensors import SharedMemoryFiles
from raycore.transport.channel import Buffer, EngineListener, SendResult

_QUIET_S = 0.5
"""With the grace and a housekeeping round, a client that dies is noticed within two seconds, whatever it was doing."""


class Session:
    """One client's conversation with this engine core."""

    __slots__ = (
        "ack",
        "backlog",
        "backlog_bytes",
        "client",
        "encoder",
        "files",
        "gone_since_s",
        "handle_of",
        "id",
        "last_heard_s",
        "last_sent_s",
        "lease_s",
        "next_in",
        "next_out",
        "outbox",
        "pid",
        "previous_slots",
        "waiting",
        "waiting_tokens",
    )

    def __init__(self, session_id: SessionId, attach: Attach, limits: Limits, now_s: float) -> None:
        self.id = session_id
        self.client = attach.client
        self.pid = attach.pid
        self.lease_s = attach.lease_s
        self.last_heard_s = now_s
        self.last_sent_s = now_s
        self.gone_since_s: float | None = None
        self.next_in = 0
        self.next_out = 0
        self.ack = -1
        self.handle_of: dict[int, int] = {}
        self.outbox: list[ToClient] = []
        self.waiting = 0
        self.waiting_tokens = 0
        self.backlog: deque[Sequence[Buffer]] = deque()
        self.backlog_bytes = 0
        self.previous_slots: TokenArray | None = None
        """The slot column of the last StepColumns, so that an equal one is left out."""
        self.files: SharedMemoryFiles | None = None
        """Results that went through shared memory; what the client has not taken goes with the session."""
        self.encoder = FrameEncoder(inline_bytes=limits.inline_tensor_bytes, shared_memory_bytes=limits.shared_memory_bytes)


class SessionTable:
    """All sessions of one engine core, and the sending of their frames."""

    def __init__(self, listener: EngineListener, limits: Limits, pool: str, on_end: Callable[[Session, str], None]) -> None:
        self._listener = listener
        self._limits = limits
        self._on_end = on_end
        self._pool = pool
        self._sessions: dict[bytes, Session] = {}
        self._dirty: list[Session] = []
        self._has_backlog = False
        self.pause_stamp = 0
        self.is_paused = False
        self.unit_ns = 0
        """These three are told to every session with each frame."""
        self._stranger_encoder = FrameEncoder()
        self._farewells: dict[bytes, tuple[float, Sequence[Buffer]]] = {}
        """SessionExpired for clients that take nothing now: until when to try, and the message."""

    def __len__(self) -> int:
        return len(self._sessions)

    def all(self) -> list[Session]:
        """A snapshot of the sessions."""
        return list(self._sessions.values())

    def get(self, session_id: bytes) -> Session | None:
        """The session of this id."""
        return self._sessions.get(session_id)

    def open(self, session_id: SessionId, attach: Attach, now_s: float, *, shares_memory: bool) -> Session:
        """A client attached."""
        session = Session(session_id, attach, self._limits, now_s)
        if shares_memory:
            session.files = SharedMemoryFiles(self._pool)
            session.encoder.share_memory(session.files)
        self._sessions[session_id] = session
        return session

    def end(self, session: Session, reason: str) -> None:
        """Forget a session; its requests are `on_end`'s to abort. Later frames of it are answered with SessionExpired."""
        if self._sessions.pop(session.id, None) is None:
            return
        session.backlog.clear()
        session.outbox.clear()
        if session.files is not None:
            session.files.discard_all()
        self._on_end(session, reason)
        if session.id not in self._farewells:
            self._listener.forget(session.id)

    def end_gone(self, session_id: bytes) -> None:
        """The session's connection has ended and cannot come back."""
        session = self._sessions.get(session_id)
        if session is not None:
            self.end(session, "disconnected")

    def post(self, session: Session, item: ToClient) -> None:
        """Queue an item for the session's next frame."""
        if not session.outbox:
            self._dirty.append(session)
        session.outbox.append(item)

    def flush(self, load: EngineLoad, now_s: float) -> None:
        """Send one frame to every session that has items."""
        if not self._dirty:
            return
        dirty, self._dirty = self._dirty, []
        for session in dirty:
            items = session.outbox
            if items:
                session.outbox = []
                self._send_items(session, items, load, now_s)

    def keep_in_touch(self, load: EngineLoad, now_s: float) -> None:
        """An empty frame to sessions that were told nothing for a while: they learn the load, and a client that is gone is noticed."""
        for session in self.all():
            if now_s - session.last_sent_s > _QUIET_S and not session.backlog:
                self._send_items(session, [], load, now_s)

    def answer(self, session: Session, load: EngineLoad, now_s: float) -> None:
        """An empty frame at once."""
        if not session.backlog:
            self._send_items(session, [], load, now_s)

    def _send_items(self, session: Session, items: list[ToClient], load: EngineLoad, now_s: float) -> None:
        own = len(session.handle_of)
        frame = EngineFrame(session.next_out, session.ack, load, own, items, self.pause_stamp, self.is_paused, self.unit_ns)
        session.next_out += 1
        session.last_sent_s = now_s
        self._send(session, session.encoder.encode(frame), now_s)
        if session.files is not None:
            session.files.prune()

    def tell_expired(self, session_id: bytes, reason: str) -> None:
        """Answer a frame of a session that is not known (any more)."""
        frame = EngineFrame(-1, -1, EngineLoad(), 0, [SessionExpired(reason)])
        self._listener.send(session_id, self._stranger_encoder.encode(frame))
        if session_id not in self._sessions:
            self._listener.forget(session_id)

    def tell_stranger(self, session_id: bytes, item: ToClient) -> None:
        """Answer a peer that has no session."""
        self._listener.send(session_id, self._stranger_encoder.encode(EngineFrame(-1, -1, EngineLoad(), 0, [item])))
        if session_id not in self._sessions:
            self._listener.forget(session_id)

    def forget_stranger(self, session_id: bytes) -> None:
        """Keep nothing for a peer that has no session."""
        if session_id not in self._sessions:
            self._listener.forget(session_id)

    def retry_backlogs(self, now_s: float) -> None:
        """Send what slow clients left, and notice peers that came back."""
        self._retry_farewells(now_s)
        self._has_backlog = False
        for session in self.all():
            while session.backlog:
                result = self._listener.send(session.id, session.backlog[0])
                if result is not SendResult.SENT:
                    self._note(session, result, now_s)
                    self._has_backlog = True
                    break
                session.gone_since_s = None
                session.backlog_bytes -= _size(session.backlog.popleft())

    def _retry_farewells(self, now_s: float) -> None:
        for session_id, (until_s, message) in list(self._farewells.items()):
            if self._listener.send(session_id, message) is not SendResult.FULL or now_s > until_s:
                del self._farewells[session_id]
                self._listener.forget(session_id)

    def expire(self, now_s: float) -> None:
        """End the sessions that are silent past their lease or disconnected past the grace."""
        for session in self.all():
            if now_s - session.last_heard_s > session.lease_s:
                self.end(session, f"silent for longer than its lease of {session.lease_s:g} s")
            elif session.gone_since_s is not None and now_s - session.gone_since_s > self._limits.disconnect_grace_s:
                self.end(session, "disconnected")

    def has_backlog(self) -> bool:
        """Whether any client is behind."""
        return self._has_backlog or bool(self._farewells)

    def _send(self, session: Session, message: Sequence[Buffer], now_s: float) -> None:
        if not session.backlog:
            result = self._listener.send(session.id, message)
            if result is SendResult.SENT:
                return
            self._note(session, result, now_s)
        size = _size(message)
        if session.backlog_bytes + size > self._limits.session_backlog_bytes:
            reason = f"its client is behind by more than {self._limits.session_backlog_bytes} bytes"
            expired = EngineFrame(-1, -1, EngineLoad(), 0, [SessionExpired(reason)])
            self._farewells[session.id] = (now_s + session.lease_s, self._stranger_encoder.encode(expired))
            self.end(session, reason)
            return
        session.backlog.append(message)
        session.backlog_bytes += size
        self._has_backlog = True

    @staticmethod
    def _note(session: Session, result: SendResult, now_s: float) -> None:
        if result is SendResult.GONE and session.gone_since_s is None:
            session.gone_since_s = now_s
        elif result is SendResult.FULL:
            session.gone_since_s = None


def _size(message: Sequence[Buffer]) -> int:
    return sum(memoryview(part).nbytes for part in message)
