"""A ZeroMQ peer that speaks frames, or anything else, by hand."""

from __future__ import annotations

import secrets
import time
from typing import Any

import zmq

from raycore.codec import FrameDecoder, FrameEncoder
from raycore.membership import Member
from raycore.messages import PROTOCOL_VERSION, Attach, ClientFrame, EngineFrame
from raycore.tensors import TensorReader


class RawPeer:
    """One DEALER."""

    def __init__(self, member: Member, pool: str, *, keys: tuple[str, str, str] | None = None, over_tcp: bool = False) -> None:
        self.context = zmq.Context(io_threads=1)
        self.socket = self.context.socket(zmq.DEALER)
        self.socket.linger = 0
        self.socket.routing_id = b"\x02" + secrets.token_bytes(15)
        self.seq = 0
        self._member, self._pool = member, pool
        self.encoder = FrameEncoder()
        self._decoder = FrameDecoder(EngineFrame, TensorReader(pool))
        if keys is not None:
            self.socket.curve_serverkey, self.socket.curve_publickey, self.socket.curve_secretkey = (key.encode() for key in keys)
        self.socket.connect(member.endpoints.requests_tcp if over_tcp else member.endpoints.requests_ipc)

    def __enter__(self) -> RawPeer:
        return self

    def __exit__(self, *_args: object) -> None:
        self.socket.close(linger=0)
        self.context.destroy(linger=0)

    def attach(self, **changes: Any) -> None:
        fields: dict[str, Any] = {
            "version": PROTOCOL_VERSION,
            "pool": self._pool,
            "incarnation": self._member.engine.incarnation,
            "client": "raw",
            "lease_s": 30.0,
            **changes,
        }
        self.send(Attach(**fields))

    def send(self, *items: Any, seq: int | None = None) -> None:
        number = self.seq if seq is None else seq
        self.seq = number + 1
        self.socket.send_multipart(self.encoder.encode(ClientFrame(number, list(items))))

    def send_raw(self, *parts: bytes) -> None:
        self.socket.send_multipart(parts)

    def frame(self, limit_s: float = 10.0) -> EngineFrame | None:
        """The next frame, or None when there is none within the limit."""
        if not self.socket.poll(int(limit_s * 1000)):
            return None
        return self._decoder.decode(self.socket.recv_multipart())

    def item(self, kind: type, limit_s: float = 10.0) -> Any:
        """The next item of this kind; None when there is none within the limit."""
        end_s = time.monotonic() + limit_s
        while (left_s := end_s - time.monotonic()) > 0:
            frame = self.frame(left_s)
            if frame is None:
                return None
            for item in frame.items:
                if isinstance(item, kind):
                    return item
        return None
