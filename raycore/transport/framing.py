"""Messages on a byte stream: `parts: uint32, lengths: uint32 x parts`, then the parts. Pure."""

from __future__ import annotations

import struct
from collections.abc import Sequence

from raycore.errors import FrameError
from raycore.transport.channel import Buffer, Message

_MAX_PARTS = 4096
_ONE_PART = struct.Struct("<II")
_COUNT = struct.Struct("<I")
_JOIN_BELOW_BYTES = 1 << 16
"""Below this one copy is cheaper than a gathering write."""
_FEW_BYTES, _MANY_BYTES = 1 << 16, 1 << 20
"""To read at once. A buffer of many costs the allocator a mapping of its own, 40 us each time, so it is only for streams that fill one."""


def next_read_bytes(last_bytes: int) -> int:
    """How much to ask of a stream that gave so much at once."""
    return _MANY_BYTES if last_bytes >= _FEW_BYTES else _FEW_BYTES


def frame(message: Sequence[Buffer]) -> list[Buffer]:
    """The buffers to write for a message, in order."""
    if len(message) == 1:
        payload = message[0]
        header = _ONE_PART.pack(1, len(payload))
        return [header + payload] if len(payload) < _JOIN_BELOW_BYTES else [header, payload]
    sizes = [memoryview(part).nbytes for part in message]
    return [struct.pack(f"<{1 + len(sizes)}I", len(sizes), *sizes), *message]


class FrameParser:
    """Cuts what arrives into messages; their parts are views of what was fed."""

    def __init__(self, limit_bytes: int) -> None:
        self._limit_bytes = limit_bytes
        self._rest = bytearray()
        self._needed = 0

    def feed(self, data: bytes) -> list[Message]:
        """Every message that is complete with `data`. FrameError when a peer claims more than the limit, or nonsense."""
        if self._rest:
            self._rest += data
            if len(self._rest) < self._needed:
                return []
            data = bytes(self._rest)
            self._rest = bytearray()
        messages: list[Message] = []
        view = memoryview(data)
        at, size = 0, len(data)
        while at < size:
            end, message = self._next(view, at, size)
            if message is None:
                break
            messages.append(message)
            at = end
        if at < size:
            self._rest += view[at:]
        return messages

    def _next(self, view: memoryview, at: int, size: int) -> tuple[int, Message | None]:
        """The end and the parts of the message at `at`, or None while it is not complete."""
        self._needed = 0
        if size - at < _ONE_PART.size:
            return at, None
        parts, first = _ONE_PART.unpack_from(view, at)
        begin = at + _COUNT.size * (1 + parts)
        if not 1 <= parts <= _MAX_PARTS or first > self._limit_bytes:
            raise FrameError(f"a peer announced a message of {parts} parts, the first of {first} bytes")
        if parts == 1:
            end = begin + first
            self._needed = end - at
            return (end, [view[begin:end]]) if end <= size else (at, None)
        if size < begin:
            return at, None
        lengths = struct.unpack_from(f"<{parts}I", view, at + _COUNT.size)
        end = begin + sum(lengths)
        if end - at > self._limit_bytes:
            raise FrameError(f"a peer announced a message of {end - at} bytes")
        self._needed = end - at
        if end > size:
            return at, None
        message: Message = []
        for length in lengths:
            message.append(view[begin : begin + length])
            begin += length
        return end, message
