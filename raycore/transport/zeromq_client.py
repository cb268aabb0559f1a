"""The client's ZeroMQ end: one DEALER per session, read from the descriptor on the event loop."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import zmq

from raycore.config import Limits
from raycore.membership import Endpoints
from raycore.transport.channel import Buffer, Message
from raycore.transport.endpoints import this_host
from raycore.transport.events import Readiness, receive
from raycore.transport.keys import secure_client

_NOBLOCK = int(zmq.NOBLOCK)
_SNDMORE_NOBLOCK = int(zmq.SNDMORE) | int(zmq.NOBLOCK)
_FD = int(zmq.FD)
_COPY_BELOW_BYTES = 1 << 16
_MESSAGES_PER_WAKE_UP = 1024
"""Then the loop's other tasks get a turn."""


def new_context() -> zmq.Context[Any]:
    """A context for one client; its I/O thread ends with it."""
    return zmq.Context(io_threads=1)


def is_same_host(endpoints: Endpoints) -> bool:
    """Whether the engine's ipc socket is what to use from here; so it is where it is gone with its engine and there is no other."""
    if endpoints.host != this_host():
        return False
    return not endpoints.requests_tcp or Path(endpoints.requests_ipc.removeprefix("ipc://")).exists()


class ZmqClientChannel:
    """`ClientChannel` over a DEALER whose routing id is the session id."""

    def __init__(
        self,
        context: zmq.Context[Any],
        endpoints: Endpoints,
        session: bytes,
        *,
        limits: Limits,
        client_public_key: str = "",
        client_secret_key: str = "",
        use_tcp: bool | None = None,
    ) -> None:
        self._context = context
        self._endpoints = endpoints
        self._session = session
        self._limits = limits
        self._keys = (client_public_key, client_secret_key)
        self._use_tcp = not is_same_host(endpoints) if use_tcp is None else use_tcp
        self._queue: deque[Sequence[Buffer]] = deque()
        self._socket: zmq.Socket[Any] | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._on_messages: Callable[[list[Message]], None] | None = None
        self._is_drain_scheduled = False
        self._descriptor = -1

    def open(self, on_messages: Callable[[list[Message]], None], on_closed: Callable[[str, bool], None]) -> None:
        """Connect and register the descriptor's reader. ZeroMQ reconnects by itself: what is lost shows as a gap."""
        socket = self._context.socket(zmq.DEALER)
        socket.routing_id = self._session
        socket.sndhwm = socket.rcvhwm = self._limits.socket_high_water_mark
        socket.maxmsgsize = self._limits.message_bytes
        socket.linger = 0
        endpoint = self._endpoints.requests_ipc
        if self._use_tcp:
            secure_client(socket, server_key=self._endpoints.server_key, public_key=self._keys[0], secret_key=self._keys[1])
            endpoint = self._endpoints.requests_tcp
            socket.ipv6 = "[" in endpoint
        socket.connect(endpoint)
        self._socket, self._on_messages = socket, on_messages
        self._has_message = Readiness(socket)
        self._loop = asyncio.get_running_loop()
        self._descriptor = socket.getsockopt(_FD)
        self._loop.add_reader(self._descriptor, self._drain)

    def send(self, message: Sequence[Buffer]) -> None:
        """Send, or queue behind what is queued; then look whether the send swallowed the descriptor's edge."""
        socket = self._socket
        if socket is None:
            return
        if self._queue or not self._try_send(socket, message):
            self._queue.append(message)
        # the descriptor is edge-triggered, and a send processes the socket's commands: a message that came meanwhile raises no edge
        if self._has_message():
            self._schedule_drain()

    def close(self) -> None:
        """Unregister and close."""
        if self._socket is None:
            return
        if self._loop is not None and not self._loop.is_closed():
            self._loop.remove_reader(self._descriptor)
        self._socket.close(linger=0)
        self._socket = None
        self._queue.clear()

    def flush_and_close(self) -> None:
        """Close, but let ZeroMQ deliver for a moment what was sent (a farewell)."""
        if self._socket is not None:
            self._socket.linger = 200
            if self._loop is not None and not self._loop.is_closed():
                self._loop.remove_reader(self._descriptor)
            self._socket.close()
            self._socket = None

    def _try_send(self, socket: zmq.Socket[Any], message: Sequence[Buffer]) -> bool:
        last = len(message) - 1
        try:
            for index, part in enumerate(message):
                flags = _NOBLOCK if index == last else _SNDMORE_NOBLOCK
                socket.send(part, flags, copy=memoryview(part).nbytes < _COPY_BELOW_BYTES)
        except zmq.Again:
            return False
        return True

    def _schedule_drain(self) -> None:
        if not self._is_drain_scheduled and self._loop is not None:
            self._is_drain_scheduled = True
            self._loop.call_soon(self._drain_again)

    def _drain_again(self) -> None:
        self._is_drain_scheduled = False
        self._drain()

    def _drain(self) -> None:
        """Hand over every ready message at once, then send what was queued."""
        socket = self._socket
        if socket is None:
            return
        ready: list[Message] = []
        has_message = self._has_message
        while len(ready) < _MESSAGES_PER_WAKE_UP and has_message():
            ready.append(receive(socket))
        if ready and self._on_messages is not None:
            self._on_messages(ready)
        if self._socket is None:  # closed by the callback
            return
        while self._queue and self._try_send(socket, self._queue[0]):
            self._queue.popleft()
        if self._has_message():
            self._schedule_drain()
