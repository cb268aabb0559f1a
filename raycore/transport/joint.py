"""All that one engine core listens on, as one `EngineListener`: unix streams for this host, ZeroMQ for both."""

from __future__ import annotations

import socket as sockets
import time
from collections.abc import Sequence

import zmq

from raycore.transport.channel import Buffer, Message, SendResult
from raycore.transport.stream_engine import StreamListener
from raycore.transport.zeromq_engine import ZmqEngineListener


class BusyPoll:
    """Whether to look again for a moment before sleeping: while that has been paying, and not otherwise.

    A sleep that ended within the limit would have been spared by looking; a look that found nothing was wasted. The balance of both,
    bounded, decides, so that an engine core that is rarely wanted, or steadily busy, spends next to nothing on it.
    """

    _MOST = 4
    """So few wasted looks in a row end the looking."""

    def __init__(self, limit_s: float) -> None:
        self.limit_s = limit_s
        self._balance = 0

    @property
    def is_wanted(self) -> bool:
        """Whether looking has been paying."""
        return self._balance > 0

    def slept(self, seconds: float) -> None:
        """A sleep ended by news after so long."""
        if self.limit_s and seconds < self.limit_s:
            self._balance = min(self._balance + 1, self._MOST)

    def looked(self, *, found: bool) -> None:
        """A look ended."""
        self._balance = min(self._balance + 1, self._MOST) if found else self._balance - 1


class JointListener:
    """A session is answered through the listener that it came from; one poll waits for all."""

    def __init__(self, streams: StreamListener, zeromq: ZmqEngineListener, *, busy_poll_s: float = 0.0) -> None:
        self._busy_poll = BusyPoll(busy_poll_s)
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
        """Poll all sockets and the waker; for the first moment without sleeping, while that pays."""
        for item, _ in self._look() or self._sleep(timeout_s):
            if item == self._wakeable.fileno():
                self._wakeable.recv(4096)

    def _look(self) -> list[tuple[object, int]]:
        if not self._busy_poll.is_wanted:
            return []
        until_s = time.perf_counter() + self._busy_poll.limit_s
        ready: list[tuple[object, int]] = []
        while not ready and time.perf_counter() < until_s:
            ready = zmq.zmq_poll(self._poll_set, 0)
        self._busy_poll.looked(found=bool(ready))
        return ready

    def _sleep(self, timeout_s: float) -> list[tuple[object, int]]:
        begin_s = time.perf_counter()
        ready = zmq.zmq_poll(self._poll_set, max(0, int(timeout_s * 1000)))
        if ready:
            self._busy_poll.slept(time.perf_counter() - begin_s)
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

    def take_gone(self) -> list[bytes]:
        """Sessions whose stream has ended; ZeroMQ tells of its peers' ends only when something is sent to them."""
        return self._streams.take_gone()

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
