"""Encoding and decoding of frames: one typed decoder made once, tensors out of band."""

from __future__ import annotations

from typing import Any, Generic, TypeVar

import msgspec

from raycore.errors import FrameError
from raycore.tensors import SharedMemoryFiles, TensorReader, TensorWriter
from raycore.transport.channel import Message


class FrameEncoder:
    """Encodes messages of one session or endpoint; not for use by two threads."""

    def __init__(self, *, inline_bytes: int = 256, shared_memory_bytes: int = 64 << 10) -> None:
        self._writer = TensorWriter(inline_bytes=inline_bytes, shared_memory_bytes=shared_memory_bytes)
        self._encoder = msgspec.msgpack.Encoder(enc_hook=self._writer.extension)

    def share_memory(self, files: SharedMemoryFiles) -> None:
        """From now on large tensors go through files: the peer is known to see them."""
        self._writer.files = files

    def encode(self, message: Any) -> Message:
        """The frame and its buffers. TypeError for what cannot be sent."""
        payload = self._encoder.encode(message)
        buffers = self._writer.buffers
        if not buffers:
            return [payload]
        self._writer.buffers = []
        return [payload, *buffers]

    def encode_part(self, value: Any) -> msgspec.Raw:
        """Encode a value that a message will hold; its buffers join the next `encode`."""
        return msgspec.Raw(self._encoder.encode(value))


T = TypeVar("T")


class FrameDecoder(Generic[T]):  # noqa: UP046 -- Python 3.11 has no type parameter syntax
    """Decodes messages of one type."""

    def __init__(self, kind: type[T], pool: str) -> None:
        self._reader = TensorReader(pool)
        self._decoder = msgspec.msgpack.Decoder(kind, ext_hook=self._reader.tensor)

    def decode(self, message: Message) -> T:
        """The message. FrameError for anything that is not one."""
        self._reader.buffers = message[1:]
        try:
            return self._decoder.decode(message[0])
        except FrameError:
            raise
        except (msgspec.DecodeError, ValueError, TypeError, OverflowError, RecursionError, OSError) as error:
            msg = f"a frame does not decode: {error}"
            raise FrameError(msg) from error

    def decode_part(self, part: msgspec.Raw, kind: Any) -> Any:
        """Decode a part of the message that was decoded last. FrameError likewise."""
        try:
            return msgspec.msgpack.decode(part, type=kind, ext_hook=self._reader.tensor)
        except FrameError:
            raise
        except (msgspec.DecodeError, ValueError, TypeError, OverflowError, RecursionError, OSError) as error:
            msg = f"does not decode: {error}"
            raise FrameError(msg) from error
