"""All that one engine core binds: a unix stream, a ROUTER on ipc, one under CURVE on TCP where asked for, and PUB sockets for beats."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import zmq

from raycore.config import EngineSpec
from raycore.membership import Endpoints
from raycore.transport.endpoints import make_socket_directory, remove_socket_directory, this_host
from raycore.transport.joint import JointListener
from raycore.transport.keys import secure_server, start_gatekeeper
from raycore.transport.stream_engine import SOCKET_BUFFER_BYTES, StreamListener
from raycore.transport.zeromq_engine import ZmqEngineListener


class EngineSockets:
    """All that one engine core binds: the request listener, and the address for beats. Owns the context and the socket directory."""

    def __init__(self, spec: EngineSpec, *, node_ip: str) -> None:
        self._spec = spec
        self._node_ip = node_ip
        self.context: zmq.Context[Any] = zmq.Context(io_threads=1)
        self._directory: Path | None = None
        self._gatekeeper: Any = None
        self._endpoints: Endpoints | None = None
        self.listener: JointListener | None = None
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
        if spec.tcp == "always" or (spec.tcp == "auto" and not is_loopback(self._node_ip)):
            self._gatekeeper = start_gatekeeper(self.context, spec.client_public_key)
            routers.append(self._router())
            beats.append(self._publisher())
            for socket in (routers[1], beats[1]):
                secure_server(socket, spec.server_public_key, spec.server_secret_key)
            requests_tcp = bind_tcp(routers[1], self._node_ip)
            beats_tcp = bind_tcp(beats[1], self._node_ip)
        limits = spec.limits
        buffer_bytes = min(SOCKET_BUFFER_BYTES, limits.session_backlog_bytes)
        streams = StreamListener(self._directory / "s", limits.message_bytes, buffer_bytes=buffer_bytes)
        self.listener = JointListener(streams, ZmqEngineListener(routers), busy_poll_s=spec.limits.busy_poll_s)
        self.beat_sockets = beats
        self._endpoints = Endpoints(
            host=this_host(),
            requests_ipc=requests_ipc,
            beats_ipc=beats_ipc,
            requests_tcp=requests_tcp,
            beats_tcp=beats_tcp,
            server_key=spec.server_public_key if requests_tcp else "",
            requests_stream=str(self._directory / "s"),
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


def bind_tcp(socket: zmq.Socket[Any], address: str) -> str:
    """Bind to a port of this address that the kernel chooses; the endpoint."""
    host = f"[{address}]" if ":" in address else address
    if ":" in address:
        socket.ipv6 = True
    socket.bind(f"tcp://{host}:0")
    endpoint = socket.getsockopt_string(zmq.LAST_ENDPOINT)
    return endpoint.rstrip("\0")


def is_loopback(address: str) -> bool:
    """Whether an address is of this host only."""
    return address.startswith("127.") or address in ("::1", "localhost")
