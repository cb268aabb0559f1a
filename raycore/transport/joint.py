"""All that one engine core listens on, as one `EngineListener`: unix streams for this host, ZeroMQ for both."""

from __future__ import annotations

import socket as sockets
import time
from collections.abc import Sequence

import zmq

from raycore.transport.channel import Buffer, Message, SendResult
from raycore.transport.stream_engine import StreamListener
from raycore.transport.zeromq_engine import ZmqEngineListener


class JointListener:
    """A session is answered through the listener that it came from; one poll waits for all."""

    def __init__(self, streams: StreamListener, zeromq: ZmqEngineListener, *, busy_poll_s: float = 0.0) -> None:
        self._busy_poll_s = busy_poll_s
        self._streams = streams
        self._zeromq = zeromq
        self._waker, self._wakeable = sockets.socketpair()
        self._waker.setblocking(False)
        self._wakeable.setblocking(False)
        self._poll_set = [*zeromq.poll_set(), (streams.fileno(), zmq.POLLIN), (self._wakeable.fileno(), zmq.POLLIN)]
        self._is_closed = False

    def receive(self) -> list[tuple[bytes, Message]]:
        """Every message that is ready."""
        ready = self._streams.receive()
        more = self._zeromq.receive()
        return ready + more if more else ready

    def wait(self, timeout_s: float) -> None:
        """Poll all sockets and the waker; for the first moment without sleeping, where that is wanted."""
        ready = self._look_again() if self._busy_poll_s else []
        for item, _ in ready or zmq.zmq_poll(self._poll_set, max(0, int(timeout_s * 1000))):
            if item == self._wakeable.fileno():
                self._wakeable.recv(4096)

    def _look_again(self) -> list[tuple[object, int]]:
        until_s = time.perf_counter() + self._busy_poll_s
        ready: list[tuple[object, int]] = []
        while not ready and time.perf_counter() < until_s:
            ready = zmq.zmq_poll(self._poll_set, 0)
        return ready

    def wake(self) -> None:
        """Write to the waker; a full one is awake already."""
        try:
            self._waker.send(b"\0")
        except (BlockingIOError, OSError):
            return

    def send(self, session: bytes, message: Sequence[Buffer]) -> SendResult:
        """Hand one message to a session's peer; never blocks."""
        return self._streams.send(session, message) if self._streams.has(session) else self._zeromq.send(session, message)

    def forget(self, session: bytes) -> None:
        """Drop what is kept for a session that ended."""
        self._zeromq.forget(session)

    def close(self) -> None:
        """Close everything. Idempotent."""
        if self._is_closed:
            return
        self._is_closed = True
        self._streams.close()
        self._zeromq.close()
        self._waker.close()
        self._wakeable.close()
