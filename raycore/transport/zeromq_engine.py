"""The engine core's ZeroMQ listener: ROUTER sockets, asked without blocking."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import zmq

from raycore.transport.channel import Buffer, Message, SendResult
from raycore.transport.events import Readiness, receive

_NOBLOCK = int(zmq.NOBLOCK)
_SNDMORE_NOBLOCK = int(zmq.SNDMORE) | int(zmq.NOBLOCK)
_COPY_BELOW_BYTES = 1 << 16
_MESSAGES_A_TURN = 1024
"""Then the engine gets its step: a peer that floods must not keep it from serving the others."""
_FAREWELL_MS = 200
"""How long the last frames may take to leave when an engine core closes."""
"""Below this ZeroMQ's copy is cheaper than keeping a reference until the I/O thread is done."""


class ZmqEngineListener:
    """`EngineListener` over ROUTER sockets, without its waiting; a session is answered on the socket it came from."""

    def __init__(self, routers: Sequence[zmq.Socket[Any]]) -> None:
        self._routers = list(routers)
        self._router_of: dict[bytes, zmq.Socket[Any]] = {}
        self._readiness = {router: Readiness(router) for router in self._routers}
        self._is_closed = False

    def receive(self) -> list[tuple[bytes, Message]]:
        """Every message that is ready on any socket."""
        ready: list[tuple[bytes, Message]] = []
        for router in self._routers:
            has_message = self._readiness[router]
            while len(ready) < _MESSAGES_A_TURN and has_message():
                identity = router.recv(_NOBLOCK)
                self._router_of[identity] = router
                ready.append((identity, receive(router)))
        return ready

    def poll_set(self) -> list[tuple[Any, int]]:
        """What to poll."""
        return [(router, zmq.POLLIN) for router in self._routers]

    def send(self, session: bytes, message: Sequence[Buffer]) -> SendResult:
        """Send without blocking; all frames of a message or none are accepted once the identity is."""
        router = self._router_of.get(session)
        if router is None:
            return SendResult.GONE
        try:
            router.send(session, _SNDMORE_NOBLOCK)
            last = len(message) - 1
            for index, part in enumerate(message):
                flags = _NOBLOCK if index == last else _SNDMORE_NOBLOCK
                router.send(part, flags, copy=memoryview(part).nbytes < _COPY_BELOW_BYTES)
        except zmq.Again:
            return SendResult.FULL
        except zmq.ZMQError as error:
            if error.errno == zmq.EHOSTUNREACH:
                return SendResult.GONE
            raise
        return SendResult.SENT

    def forget(self, session: bytes) -> None:
        """Drop what is kept for a session that ended."""
        self._router_of.pop(session, None)

    def close(self) -> None:
        """Close sockets and the waker."""
        if self._is_closed:
            return
        self._is_closed = True
        for router in self._routers:
            router.close(linger=_FAREWELL_MS)
