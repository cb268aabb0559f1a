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
        """Encode a value that the next message will hold, whose buffers go with it.

        TypeError for what cannot be sent; nothing of it is kept.
        """
        before = len(self._writer.buffers)
        try:
            return msgspec.Raw(self._encoder.encode(value))
        except (TypeError, ValueError, OverflowError, RecursionError, RuntimeError) as error:
            del self._writer.buffers[before:]
            msg = f"cannot be sent: {error}"
            raise TypeError(msg) from error


T = TypeVar("T")


class FrameDecoder(Generic[T]):
    """Decodes messages of one type."""

    def __init__(self, kind: type[T], reader: TensorReader) -> None:
        self._reader = reader
        self._decoder = msgspec.msgpack.Decoder(kind, ext_hook=self._reader.tensor)

    def decode(self, message: Message) -> T:
        """The message. FrameError for anything that is not one."""
        self._reader.begin(message)
        try:
            return self._decoder.decode(message[0])
        except FrameError:
            raise
        except Exception as error:
            msg = f"a frame does not decode: {error}"
            raise FrameError(msg) from error

    def decode_part(self, part: msgspec.Raw, kind: Any) -> Any:
        """Decode a part of the message that was decoded last. FrameError likewise."""
        try:
            return msgspec.msgpack.decode(part, type=kind, ext_hook=self._reader.tensor)
        except FrameError:
            raise
        except Exception as error:
            msg = f"does not decode: {error}"
            raise FrameError(msg) from error
