"""All that a coordinator binds: PUB sockets for its snapshots, on ipc and, where the pool does, under CURVE on TCP."""

from __future__ import annotations

from pathlib import Path
from typing import Any, final

import zmq

from raycore.membership import Endpoints
from raycore.transport.endpoints import make_socket_directory, remove_socket_directory, this_host
from raycore.transport.engine_sockets import bind_tcp, is_loopback
from raycore.transport.keys import secure_server, start_gatekeeper

_QUEUED = 16
"""Snapshots kept for a slow subscriber; the newest is the only one that matters."""


@final
class CoordinatorSockets:
    """Owns the context and the socket directory."""

    def __init__(self, pool: str, *, node_ip: str, tcp: str, server_keys: tuple[str, str], client_public_key: str) -> None:
        self._pool = pool
        self._node_ip = node_ip
        self._tcp = tcp
        self._server_keys = server_keys
        self._client_public_key = client_public_key
        self.context: zmq.Context[Any] = zmq.Context(io_threads=1)
        self.publishers: list[zmq.Socket[Any]] = []
        self._directory: Path | None = None
        self._gatekeeper: Any = None

    def bind(self) -> Endpoints:
        """Bind everything; of the endpoints only those for beats are in use."""
        self._directory = make_socket_directory(self._pool)
        ipc, tcp = f"ipc://{self._directory}/b", ""
        self._publisher().bind(ipc)
        if self._tcp == "always" or (self._tcp == "auto" and not is_loopback(self._node_ip)):
            self._gatekeeper = start_gatekeeper(self.context, self._client_public_key)
            publisher = self._publisher()
            secure_server(publisher, *self._server_keys)
            tcp = bind_tcp(publisher, self._node_ip)
        return Endpoints(this_host(), "", ipc, "", tcp, self._server_keys[0] if tcp else "")

    def close(self) -> None:
        """Release everything; sockets that others made of the context are closed before."""
        for publisher in self.publishers:
            publisher.close(linger=0)
        if self._gatekeeper is not None:
            self._gatekeeper.stop()
        self.context.term()
        if self._directory is not None:
            remove_socket_directory(self._directory)

    def _publisher(self) -> zmq.Socket[Any]:
        socket = self.context.socket(zmq.PUB)
        socket.sndhwm = _QUEUED
        socket.linger = 0
        self.publishers.append(socket)
        return socket
