"""From one engine core (or the coordinator) to others: a DEALER each, for messages that may be lost and say the same twice."""

from __future__ import annotations

from typing import Any, final

import zmq

from raycore.codec import FrameEncoder
from raycore.ids import EngineId
from raycore.membership import Endpoints
from raycore.messages import OUTSIDE_THE_ORDER, ClientFrame, Wake
from raycore.transport.keys import secure_client
from raycore.transport.zeromq_client import is_same_host

_QUEUED = 8
"""Messages kept for a peer that does not take them now; each says the same as the one before."""


@final
class PeerSender:
    """Used from one thread. ZeroMQ connects again by itself; a peer that is gone costs nothing but its socket until it is left out."""

    def __init__(self, context: zmq.Context[Any], *, client_public_key: str = "", client_secret_key: str = "") -> None:
        self._context = context
        self._keys = (client_public_key, client_secret_key)
        self._encoder = FrameEncoder()
        self._peers: dict[EngineId, tuple[Endpoints, zmq.Socket[Any]]] = {}

    def set_peers(self, peers: dict[EngineId, Endpoints]) -> None:
        """These, and no others."""
        for engine in [engine for engine, (known, _) in self._peers.items() if peers.get(engine) != known]:
            self._peers.pop(engine)[1].close(linger=0)
        for engine, endpoints in peers.items():
            if engine not in self._peers:
                self._peers[engine] = (endpoints, self._connect(endpoints))

    def send(self, wake: Wake) -> None:
        """Tell all peers."""
        self.send_to(list(self._peers), wake)

    def send_to(self, engines: list[EngineId], wake: Wake) -> None:
        """Tell these; unknown ones are passed over."""
        message = [bytes(part) for part in self._encoder.encode(ClientFrame(OUTSIDE_THE_ORDER, [wake]))]
        for engine in engines:
            if engine in self._peers:
                try:
                    self._peers[engine][1].send_multipart(message, zmq.NOBLOCK)
                except zmq.Again:
                    continue

    def close(self) -> None:
        """Disconnect. Idempotent."""
        self.set_peers({})

    def _connect(self, endpoints: Endpoints) -> zmq.Socket[Any]:
        socket = self._context.socket(zmq.DEALER)
        socket.linger = 0
        socket.sndhwm = _QUEUED
        if is_same_host(endpoints):
            socket.connect(endpoints.requests_ipc)
        else:
            secure_client(socket, server_key=endpoints.server_key, public_key=self._keys[0], secret_key=self._keys[1])
            socket.ipv6 = "[" in endpoints.requests_tcp
            socket.connect(endpoints.requests_tcp)
        return socket
