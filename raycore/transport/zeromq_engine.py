"""The engine core's ZeroMQ end: one ROUTER on ipc, one under CURVE on TCP where asked for."""

from __future__ import annotations

import socket as sockets
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import zmq

from raycore.config import EngineSpec
from raycore.membership import Endpoints
from raycore.transport.channel import Buffer, Message, SendResult
from raycore.transport.endpoints import make_socket_directory, remove_socket_directory, this_host
from raycore.transport.events import Readiness, receive
from raycore.transport.keys import secure_server, start_gatekeeper

_NOBLOCK = int(zmq.NOBLOCK)
_SNDMORE_NOBLOCK = int(zmq.SNDMORE) | int(zmq.NOBLOCK)
_COPY_BELOW_BYTES = 1 << 16
_FAREWELL_MS = 200
"""How long the last frames may take to leave when an engine core closes."""
"""Below this ZeroMQ's copy is cheaper than keeping a reference until the I/O thread is done."""


class ZmqEngineSockets:
    """All that one engine core binds: the request listener, and the address for beats. Owns the context and the socket directory."""

    def __init__(self, spec: EngineSpec, *, node_ip: str) -> None:
        self._spec = spec
        self._node_ip = node_ip
        self.context: zmq.Context[Any] = zmq.Context(io_threads=1)
        self._directory: Path | None = None
        self._gatekeeper: Any = None
        self._endpoints: Endpoints | None = None
        self.listener: ZmqEngineListener | None = None
        self.beat_sockets: list[zmq.Socket[Any]] = []

    @property
    def endpoints(self) -> Endpoints:
        """Where clients find this engine; known after `bind`."""
        if self._endpoints is None:
            msg = "bind() first"
            raise RuntimeError(msg)
        return self._endpoints

    def bind(self) -> Endpoints:
        """Bind everything; TCP on port 0 of the node's address."""
        spec = self._spec
        self._directory = make_socket_directory(spec.pool)
        routers = [self._router()]
        beats = [self._publisher()]
        requests_ipc, beats_ipc = f"ipc://{self._directory}/r", f"ipc://{self._directory}/b"
        routers[0].bind(requests_ipc)
        beats[0].bind(beats_ipc)
        requests_tcp = beats_tcp = ""
        if spec.tcp == "always" or (spec.tcp == "auto" and not _is_loopback(self._node_ip)):
            self._gatekeeper = start_gatekeeper(self.context, spec.client_public_key)
            routers.append(self._router())
            beats.append(self._publisher())
            for socket in (routers[1], beats[1]):
                secure_server(socket, spec.server_public_key, spec.server_secret_key)
            requests_tcp = _bind_tcp(routers[1], self._node_ip)
            beats_tcp = _bind_tcp(beats[1], self._node_ip)
        self.listener = ZmqEngineListener(routers)
        self.beat_sockets = beats
        self._endpoints = Endpoints(
            host=this_host(),
            requests_ipc=requests_ipc,
            beats_ipc=beats_ipc,
            requests_tcp=requests_tcp,
            beats_tcp=beats_tcp,
            server_key=spec.server_public_key if requests_tcp else "",
        )
        return self._endpoints

    def close(self) -> None:
        """Close every socket, the context and its threads, and remove the directory. Call after the users of the sockets have stopped."""
        if self.listener is not None:
            self.listener.close()
        for socket in self.beat_sockets:
            socket.close(linger=0)
        if self._gatekeeper is not None:
            self._gatekeeper.stop()
            self._gatekeeper = None
        self.context.term()
        if self._directory is not None:
            remove_socket_directory(self._directory)

    def _router(self) -> zmq.Socket[Any]:
        socket = self.context.socket(zmq.ROUTER)
        socket.router_mandatory = True
        socket.sndhwm = socket.rcvhwm = self._spec.limits.socket_high_water_mark
        socket.maxmsgsize = self._spec.limits.message_bytes
        socket.linger = 0
        return socket

    def _publisher(self) -> zmq.Socket[Any]:
        socket = self.context.socket(zmq.PUB)
        socket.sndhwm = 16
        socket.linger = 0
        return socket


class ZmqEngineListener:
    """`EngineListener` over ROUTER sockets; a session is answered on the socket it came from."""

    def __init__(self, routers: Sequence[zmq.Socket[Any]]) -> None:
        self._routers = list(routers)
        self._router_of: dict[bytes, zmq.Socket[Any]] = {}
        self._readiness = {router: Readiness(router) for router in self._routers}
        self._waker, self._wakeable = sockets.socketpair()
        self._waker.setblocking(False)
        self._wakeable.setblocking(False)
        self._poll_set = [(router, zmq.POLLIN) for router in self._routers] + [(self._wakeable.fileno(), zmq.POLLIN)]
        self._is_closed = False

    def receive(self) -> list[tuple[bytes, Message]]:
        """Every message that is ready on any socket."""
        ready: list[tuple[bytes, Message]] = []
        for router in self._routers:
            has_message = self._readiness[router]
            while has_message():
                identity = router.recv(_NOBLOCK)
                self._router_of[identity] = router
                ready.append((identity, receive(router)))
        return ready

    def wait(self, timeout_s: float) -> None:
        """Poll all sockets and the waker."""
        for ready, _ in zmq.zmq_poll(self._poll_set, max(0, int(timeout_s * 1000))):
            if ready == self._wakeable.fileno():
                self._wakeable.recv(4096)

    def wake(self) -> None:
        """Write to the waker; a full one is awake already."""
        try:
            self._waker.send(b"\0")
        except (BlockingIOError, OSError):
            return

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
        self._waker.close()
        self._wakeable.close()


def _bind_tcp(socket: zmq.Socket[Any], address: str) -> str:
    host = f"[{address}]" if ":" in address else address
    if ":" in address:
        socket.ipv6 = True
    socket.bind(f"tcp://{host}:0")
    endpoint = socket.getsockopt_string(zmq.LAST_ENDPOINT)
    return endpoint.rstrip("\0")


def _is_loopback(address: str) -> bool:
    return address.startswith("127.") or address in ("::1", "localhost")
