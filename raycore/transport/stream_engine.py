"""The engine core's end of unix-stream channels: one connection per session, no helper threads between the step loop and the socket."""

from __future__ import annotations

import contextlib
import logging
import os
import select
import socket as sockets
import struct
from collections.abc import Sequence
from pathlib import Path

from raycore.errors import FrameError
from raycore.transport.channel import Buffer, Message, SendResult
from raycore.transport.framing import FrameParser, frame, next_read_bytes

_log = logging.getLogger(__name__)

SESSION_ID_BYTES = 16
_READS_A_TURN = 16
"""Reads of one connection in one turn; then the others, and the engine, get theirs."""
SOCKET_BUFFER_BYTES = 4 << 20
_BACKLOG = 512
_CREDENTIALS = struct.Struct("3i")


class _Connection:
    """One client's connection; `session` is known once its first bytes have come."""

    __slots__ = ("parser", "read_bytes", "rest", "session", "socket", "start")

    def __init__(self, socket: sockets.socket, limit_bytes: int) -> None:
        self.socket = socket
        self.parser = FrameParser(limit_bytes)
        self.session = b""
        self.start = b""
        self.read_bytes = next_read_bytes(0)
        self.rest: list[memoryview] = []
        """What of the last message the kernel has not taken yet."""


class StreamListener:
    """`EngineListener` without its waiting: `fileno()` is readable whenever there is something to do here."""

    def __init__(self, path: Path, limit_bytes: int, *, buffer_bytes: int = SOCKET_BUFFER_BYTES) -> None:
        self._buffer_bytes = buffer_bytes
        self._limit_bytes = limit_bytes
        self._door = sockets.socket(sockets.AF_UNIX, sockets.SOCK_STREAM)
        self._door.bind(str(path))
        self._door.listen(_BACKLOG)
        self._door.setblocking(False)
        self._epoll = select.epoll()
        self._epoll.register(self._door, select.EPOLLIN)
        self._by_descriptor: dict[int, _Connection] = {}
        self._by_session: dict[bytes, _Connection] = {}
        self._gone: list[bytes] = []
        self.refused = 0

    def fileno(self) -> int:
        """The descriptor to poll for reading."""
        return self._epoll.fileno()

    def receive(self) -> list[tuple[bytes, Message]]:
        """Every message that is ready; accepts, flushes and notices ends on the way."""
        ready: list[tuple[bytes, Message]] = []
        for descriptor, events in self._epoll.poll(0):
            connection = self._by_descriptor.get(descriptor)
            if connection is None:
                self._accept()
                continue
            if events & select.EPOLLOUT:
                self._flush(connection)
            if events & ~select.EPOLLOUT:
                self._read(connection, ready)
        return ready

    def has(self, session: bytes) -> bool:
        """Whether a session speaks through here."""
        return session in self._by_session

    def send(self, session: bytes, message: Sequence[Buffer]) -> SendResult:
        """Hand one message to the kernel; once a part of it is taken, the rest is kept and goes first."""
        connection = self._by_session.get(session)
        if connection is None:
            return SendResult.GONE
        if connection.rest:
            return SendResult.FULL
        buffers = frame(message)
        try:
            sent = (
                connection.socket.send(buffers[0]) if len(buffers) == 1 else connection.socket.sendmsg(buffers[: os.sysconf("SC_IOV_MAX")])
            )
        except BlockingIOError:
            return SendResult.FULL
        except OSError:
            self._drop(connection)
            return SendResult.GONE
        if len(buffers) > 1 or sent < len(buffers[0]):
            connection.rest = _after(buffers, sent)
            if connection.rest:
                self._epoll.modify(connection.socket, select.EPOLLIN | select.EPOLLOUT)
                self._flush(connection)
        return SendResult.SENT

    def take_gone(self) -> list[bytes]:
        """Sessions whose connection has ended: a client that comes back opens a new one."""
        if not self._gone:
            return []
        gone, self._gone = self._gone, []
        return gone

    def forget(self, session: bytes) -> None:
        """The session ended; its connection may open another one."""

    def close(self) -> None:
        """Close everything. Idempotent."""
        for connection in list(self._by_descriptor.values()):
            self._drop(connection)
        self._door.close()
        self._epoll.close()

    def _accept(self) -> None:
        while True:
            try:
                socket, _ = self._door.accept()
            except (BlockingIOError, InterruptedError):
                return
            except OSError as error:
                _log.warning("a connection could not be accepted: %s", error)
                return
            _, user, _ = _CREDENTIALS.unpack(socket.getsockopt(sockets.SOL_SOCKET, sockets.SO_PEERCRED, _CREDENTIALS.size))
            if user != os.getuid():
                self.refused += 1
                socket.close()
                continue
            socket.setblocking(False)
            socket.setsockopt(sockets.SOL_SOCKET, sockets.SO_SNDBUF, self._buffer_bytes)
            self._by_descriptor[socket.fileno()] = _Connection(socket, self._limit_bytes)
            self._epoll.register(socket, select.EPOLLIN)

    def _read(self, connection: _Connection, ready: list[tuple[bytes, Message]]) -> None:
        for _ in range(_READS_A_TURN):
            asked = connection.read_bytes
            try:
                data = connection.socket.recv(asked)
            except BlockingIOError:
                return
            except OSError:
                data = b""
            if not data:
                self._drop(connection)
                return
            connection.read_bytes = next_read_bytes(len(data))
            if not self._take(connection, data, ready) or len(data) < asked:
                return

    def _take(self, connection: _Connection, data: bytes, ready: list[tuple[bytes, Message]]) -> bool:
        """Add what `data` completes; whether the connection goes on."""
        if not connection.session:
            connection.start += data
            if len(connection.start) < SESSION_ID_BYTES:
                return True
            session, data = connection.start[:SESSION_ID_BYTES], connection.start[SESSION_ID_BYTES:]
            if session in self._by_session:
                self.refused += 1
                self._drop(connection)
                return False
            connection.session, connection.start = session, b""
            self._by_session[session] = connection
        try:
            ready += [(connection.session, message) for message in connection.parser.feed(data)]
        except FrameError as error:
            _log.warning("a connection was closed: %s", error)
            self.refused += 1
            self._drop(connection)
            return False
        return True

    def _flush(self, connection: _Connection) -> None:
        while connection.rest:
            try:
                sent = connection.socket.send(connection.rest[0])
            except BlockingIOError:
                return
            except OSError:
                self._drop(connection)
                return
            connection.rest = _after(connection.rest, sent)
        self._epoll.modify(connection.socket, select.EPOLLIN)

    def _drop(self, connection: _Connection) -> None:
        descriptor = connection.socket.fileno()
        if self._by_descriptor.pop(descriptor, None) is None:
            return
        if connection.session:
            self._by_session.pop(connection.session, None)
            self._gone.append(connection.session)
        connection.rest = []
        with contextlib.suppress(OSError):
            self._epoll.unregister(descriptor)
        connection.socket.close()


def _after(buffers: Sequence[Buffer], sent: int) -> list[memoryview]:
    """What is left of `buffers` when their first `sent` bytes are gone; owned, since a session's encoder goes on."""
    rest: list[memoryview] = []
    for buffer in buffers:
        view = memoryview(buffer).cast("B")
        if sent >= view.nbytes:
            sent -= view.nbytes
            continue
        rest.append(view[sent:])
        sent = 0
    return rest
