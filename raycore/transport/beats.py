"""Beats over ZeroMQ: a PUB per engine core, a SUB per watcher and engine."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import msgspec
import zmq

from raycore.membership import Endpoints
from raycore.messages import Beat
from raycore.transport.keys import secure_client

_decoder = msgspec.msgpack.Decoder(Beat)
_encoder = msgspec.msgpack.Encoder()


class BeatPublisher:
    """Publishes beats on an engine core's PUB sockets; used by its beat thread only."""

    def __init__(self, sockets: Sequence[zmq.Socket[Any]]) -> None:
        self._sockets = sockets

    def publish(self, beat: Beat) -> None:
        """Send to whoever listens; a slow listener loses beats."""
        payload = _encoder.encode(beat)
        for socket in self._sockets:
            socket.send(payload, zmq.NOBLOCK)


class BeatSubscriber:
    """Hears one engine core's beats. The descriptor is edge-triggered: call `drain` from a timer too."""

    def __init__(
        self,
        endpoints: Endpoints,
        *,
        use_tcp: bool,
        client_public_key: str = "",
        client_secret_key: str = "",
        context: zmq.Context[Any] | None = None,
    ) -> None:
        self._owns_context = context is None
        self._context: zmq.Context[Any] = zmq.Context(io_threads=1) if context is None else context
        self._socket = self._context.socket(zmq.SUB)
        self._socket.linger = 0
        self._socket.rcvhwm = 64
        self._socket.maxmsgsize = 64 << 10
        self._socket.subscribe(b"")
        if use_tcp:
            secure_client(self._socket, server_key=endpoints.server_key, public_key=client_public_key, secret_key=client_secret_key)
            self._socket.ipv6 = "[" in endpoints.beats_tcp
        self._socket.connect(endpoints.beats_tcp if use_tcp else endpoints.beats_ipc)

    def fileno(self) -> int:
        """The descriptor to register for reading."""
        return self._socket.getsockopt(zmq.FD)

    def drain(self) -> list[Beat]:
        """Every beat that has arrived; what does not decode is dropped."""
        beats: list[Beat] = []
        while not self._socket.closed:
            try:
                payload = self._socket.recv(zmq.NOBLOCK)
            except zmq.Again:
                break
            try:
                beats.append(_decoder.decode(payload))
            except msgspec.DecodeError:
                continue
        return beats

    def close(self) -> None:
        """Disconnect."""
        self._socket.close(linger=0)
        if self._owns_context:
            self._context.destroy(linger=0)
