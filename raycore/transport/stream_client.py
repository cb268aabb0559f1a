"""The client's end of a unix-stream channel: read and written from the event loop itself."""

from __future__ import annotations

import asyncio
import socket as sockets
from collections import deque
from collections.abc import Callable, Sequence

from raycore.errors import FrameError
from raycore.transport.channel import Buffer, Message
from raycore.transport.framing import FrameParser, frame, next_read_bytes
from raycore.transport.stream_engine import SOCKET_BUFFER_BYTES

_RECONNECT_S = 0.1
_LAST_GASP_S = 0.02
"""The kernel closes a dead process's sockets one after the other: for a moment its door is open when the connection is not."""
_FAREWELL_S = 0.2
"""How long a farewell may wait for a full socket."""


class StreamClientChannel:
    """`ClientChannel` over a connection of its own to one engine core of this host."""

    def __init__(self, path: str, session: bytes, *, limit_bytes: int) -> None:
        self._path = path
        self._parser = FrameParser(limit_bytes)
        self._queue: deque[Buffer] = deque([session])
        """Bytes to send, in order; the session id goes first."""
        self._socket: sockets.socket | None = None
        self._is_closed = False
        self._loop: asyncio.AbstractEventLoop | None = None
        self._on_messages: Callable[[list[Message]], None] | None = None
        self._on_closed: Callable[[str, bool], None] | None = None
        self._retry: asyncio.TimerHandle | None = None
        self._is_writing = False
        self._read_bytes = next_read_bytes(0)

    def open(self, on_messages: Callable[[list[Message]], None], on_closed: Callable[[str, bool], None]) -> None:
        """Connect, and again while the engine is too busy to accept; what is sent meanwhile is queued."""
        self._loop = asyncio.get_running_loop()
        self._on_messages, self._on_closed = on_messages, on_closed
        self._connect()

    def send(self, message: Sequence[Buffer]) -> None:
        """Write now, or behind what is queued."""
        if self._is_closed:
            return
        buffers = frame(message)
        if self._socket is None or self._queue:
            self._queue.extend(buffers)
            return
        if len(buffers) == 1:
            payload = buffers[0]
            sent = self._write(payload)
            if sent < len(payload):
                self._queue.append(memoryview(payload)[sent:])
                self._wait_for_room()
            return
        self._queue.extend(buffers)
        self._flush()

    def close(self) -> None:
        """Disconnect."""
        if self._is_closed:
            return
        self._is_closed = True
        self._queue.clear()
        self._release()

    def flush_and_close(self) -> None:
        """Write what is queued, for a moment also on a full socket, then disconnect."""
        if self._socket is not None and self._queue and not self._is_closed:
            self._socket.settimeout(_FAREWELL_S)
            try:
                while self._queue:
                    self._socket.sendall(self._queue.popleft())
            except OSError:
                self._queue.clear()
        self.close()

    def _connect(self) -> None:
        self._retry = None
        if self._is_closed or self._loop is None:
            return
        socket = sockets.socket(sockets.AF_UNIX, sockets.SOCK_STREAM)
        socket.setblocking(False)
        socket.setsockopt(sockets.SOL_SOCKET, sockets.SO_SNDBUF, SOCKET_BUFFER_BYTES)
        try:
            socket.connect(self._path)
        except (FileNotFoundError, ConnectionRefusedError):
            socket.close()
            self._loop.call_soon(self._end, "nobody listens on its socket")
            return
        except OSError:
            # its backlog is full: whoever waits for the session has a deadline
            socket.close()
            self._retry = self._loop.call_later(_RECONNECT_S, self._connect)
            return
        self._socket = socket
        self._loop.add_reader(socket.fileno(), self._drain)
        self._flush()

    def _drain(self) -> None:
        """Hand over every message that has come, at once."""
        socket = self._socket
        if socket is None:
            return
        try:
            data = socket.recv(self._read_bytes)
            self._read_bytes = next_read_bytes(len(data))
            messages = self._parser.feed(data)
        except BlockingIOError:
            return
        except (OSError, FrameError) as error:
            self._end(str(error))
            return
        if not data:
            self._end("the engine closed the connection")
        elif messages and self._on_messages is not None:
            self._on_messages(messages)

    def _end(self, reason: str) -> None:
        if self._is_closed:
            return
        on_closed, loop, path = self._on_closed, self._loop, self._path
        self.close()
        if on_closed is not None and loop is not None:
            loop.call_later(_LAST_GASP_S, lambda: on_closed(reason, _is_gone(path)))

    def _write(self, data: Buffer) -> int:
        if self._socket is None:
            return 0
        try:
            return self._socket.send(data)
        except BlockingIOError:
            return 0
        except OSError:
            return 0  # the reader is told of the end, and ends the session

    def _flush(self) -> None:
        while self._queue:
            data = memoryview(self._queue[0]).cast("B")
            sent = self._write(data)
            if sent < data.nbytes:
                self._queue[0] = data[sent:]
                self._wait_for_room()
                return
            self._queue.popleft()
        if self._is_writing and self._socket is not None and self._loop is not None:
            self._is_writing = False
            self._loop.remove_writer(self._socket.fileno())

    def _wait_for_room(self) -> None:
        if not self._is_writing and self._socket is not None and self._loop is not None:
            self._is_writing = True
            self._loop.add_writer(self._socket.fileno(), self._flush)

    def _release(self) -> None:
        if self._retry is not None:
            self._retry.cancel()
        socket, self._socket = self._socket, None
        if socket is None:
            return
        if self._loop is not None and not self._loop.is_closed():
            self._loop.remove_reader(socket.fileno())
            if self._is_writing:
                self._loop.remove_writer(socket.fileno())
        socket.close()


def _is_gone(path: str) -> bool:
    """Whether nobody listens on a path that an engine core bound: it binds once in its life, so its process has ended."""
    with sockets.socket(sockets.AF_UNIX, sockets.SOCK_STREAM) as probe:
        probe.setblocking(False)
        try:
            probe.connect(path)
        except (FileNotFoundError, ConnectionRefusedError):
            return True
        except OSError:
            return False
    return False
