"""Beats and snapshots over ZeroMQ: a PUB per engine core and one of the coordinator, a SUB per watcher and publisher."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Generic, TypeVar

import msgspec
import zmq

from raycore.membership import Endpoints
from raycore.messages import Beat, Snapshot
from raycore.transport.keys import secure_client

_beat_decoder = msgspec.msgpack.Decoder(Beat)
_snapshot_decoder = msgspec.msgpack.Decoder(Snapshot)
_encoder = msgspec.msgpack.Encoder()

Heard = TypeVar("Heard", Beat, Snapshot)


class BeatPublisher:
    """Publishes on PUB sockets; used by one thread only."""

    def __init__(self, sockets: Sequence[zmq.Socket[Any]]) -> None:
        self._sockets = sockets

    def publish(self, beat: Beat | Snapshot) -> None:
        """Send to whoever listens; a slow listener loses beats."""
        payload = _encoder.encode(beat)
        for socket in self._sockets:
            socket.send(payload, zmq.NOBLOCK)


class Subscriber(Generic[Heard]):
    """Hears one publisher. The descriptor is edge-triggered: call `drain` from a timer too."""

    def __init__(
        self,
        endpoints: Endpoints,
        decoder: msgspec.msgpack.Decoder[Heard],
        *,
        use_tcp: bool,
        client_public_key: str = "",
        client_secret_key: str = "",
        context: zmq.Context[Any] | None = None,
    ) -> None:
        self._decoder = decoder
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

    def drain(self) -> list[Heard]:
        """Everything that has arrived; what does not decode is dropped."""
        beats: list[Heard] = []
        while not self._socket.closed:
            try:
                payload = self._socket.recv(zmq.NOBLOCK)
            except zmq.Again:
                break
            try:
                beats.append(self._decoder.decode(payload))
            except msgspec.DecodeError:
                continue
        return beats

    def close(self) -> None:
        """Disconnect."""
        self._socket.close(linger=0)
        if self._owns_context:
            self._context.destroy(linger=0)


class BeatSubscriber(Subscriber[Beat]):
    """Hears one engine core's beats."""

    def __init__(self, endpoints: Endpoints, **settings: Any) -> None:
        super().__init__(endpoints, _beat_decoder, **settings)


class SnapshotSubscriber(Subscriber[Snapshot]):
    """Hears the coordinator; of its endpoints those for beats are meant."""

    def __init__(self, endpoints: Endpoints, **settings: Any) -> None:
        super().__init__(endpoints, _snapshot_decoder, **settings)
