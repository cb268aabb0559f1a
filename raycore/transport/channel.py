"""The two ends of a channel, as Protocols: what a session needs of the bytes below it."""

from __future__ import annotations

import enum
from collections.abc import Callable, Sequence
from typing import Any, Protocol

Buffer = Any
"""Anything with the buffer protocol: bytes, memoryview, a ZeroMQ frame's buffer."""

Message = list[Buffer]
"""One message: the encoded frame, then its out-of-band buffers."""


class SendResult(enum.Enum):
    """What became of a message handed to a listener."""

    SENT = 0
    FULL = 1
    """The peer does not take it now; try again later, in order."""
    GONE = 2
    """The peer's connection is closed."""


class ClientChannel(Protocol):
    """A client's end: one session with one engine core, used on one event loop."""

    def open(self, on_messages: Callable[[list[Message]], None], on_closed: Callable[[str, bool], None]) -> None:
        """Connect; from now on hand over every ready message at once, in order, on the event loop.

        `on_closed(reason, peer_is_gone)` is called at most once, when the connection has ended and messages may be lost. `peer_is_gone`:
        nobody listens there any more, so the engine's process has ended.
        """
        ...

    def send(self, message: Sequence[Buffer]) -> None:
        """Send in order; what the peer does not take yet is queued."""
        ...

    def close(self) -> None:
        """Disconnect and drop what is queued; no callback follows. Idempotent."""
        ...

    def flush_and_close(self) -> None:
        """Disconnect, but let what was sent go out first (a farewell). Idempotent."""
        ...


class EngineListener(Protocol):
    """An engine core's end: all its sessions, used by the step thread, except `wake`."""

    def receive(self) -> list[tuple[bytes, Message]]:
        """Every message that is ready now, as (session id, message); never blocks."""
        ...

    def wait(self, timeout_s: float) -> None:
        """Block until something is ready, `wake` is called, or the time is over."""
        ...

    def wake(self) -> None:
        """End a `wait` from any thread."""
        ...

    def send(self, session: bytes, message: Sequence[Buffer]) -> SendResult:
        """Hand one message to a session's peer; never blocks."""
        ...

    def take_gone(self) -> list[bytes]:
        """Sessions whose connection has ended for good since the last call, where that is known without a send; what they said before is
        among what `receive` gave.
        """
        ...

    def forget(self, session: bytes) -> None:
        """Drop what is kept for a session that ended."""
        ...

    def close(self) -> None:
        """Release sockets and files. Idempotent."""
        ...
