"""A channel within one process: what a client hands over, an engine core in the same thread receives; the promises are a socket's."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Sequence

from raycore.transport.channel import Buffer, Message, SendResult


class MemoryListener:
    """`EngineListener` for engine cores that are stepped by their client's thread, or by a test."""

    def __init__(self, *, capacity: int | None = None) -> None:
        self._inbox: deque[tuple[bytes, Message]] = deque()
        self._peers: dict[bytes, MemoryChannel] = {}
        self._capacity = capacity
        self.on_wake: Callable[[], None] = lambda: None
        """Called whenever there is something to receive."""

    def receive(self) -> list[tuple[bytes, Message]]:
        """Take everything."""
        ready = list(self._inbox)
        self._inbox.clear()
        return ready

    def wait(self, timeout_s: float) -> None:
        """Nothing to wait for: whoever steps the core decides when."""

    def wake(self) -> None:
        """Tell whoever steps the core."""
        self.on_wake()

    def send(self, session: bytes, message: Sequence[Buffer]) -> SendResult:
        """Put into the peer's inbox, up to the capacity that the test chose."""
        peer = self._peers.get(session)
        if peer is None:
            return SendResult.GONE
        if self._capacity is not None and peer.backlog >= self._capacity:
            return SendResult.FULL
        peer.deliver([bytes(part) if index == 0 else part for index, part in enumerate(message)])
        return SendResult.SENT

    def take_gone(self) -> list[bytes]:
        """Nobody dies alone within one process."""
        return []

    def forget(self, session: bytes) -> None:
        """Nothing is kept beyond the peer's own life."""

    def close(self) -> None:
        """Disconnect everybody."""
        self._peers.clear()
        self._inbox.clear()

    def connect(self, session: bytes, channel: MemoryChannel) -> None:
        """A channel opened."""
        self._peers[session] = channel

    def disconnect(self, session: bytes) -> None:
        """A channel closed."""
        self._peers.pop(session, None)

    def push(self, session: bytes, message: Message) -> None:
        """A client's message."""
        self._inbox.append((session, message))
        self.on_wake()


class MemoryChannel:
    """`ClientChannel` onto a `MemoryListener`."""

    def __init__(self, listener: MemoryListener, session: bytes) -> None:
        self._listener = listener
        self._session = session
        self._inbox: list[Message] = []
        self._on_messages: Callable[[list[Message]], None] | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._is_scheduled = False
        self.is_frozen = False
        """A test's switch: a frozen client takes nothing."""

    @property
    def backlog(self) -> int:
        """Messages that wait for the client."""
        return len(self._inbox)

    def open(self, on_messages: Callable[[list[Message]], None], on_closed: Callable[[str, bool], None]) -> None:
        """Connect; nothing here can break."""
        self._on_messages = on_messages
        self._loop = asyncio.get_running_loop()
        self._listener.connect(self._session, self)

    def send(self, message: Sequence[Buffer]) -> None:
        """Hand over; the payload is copied, as a socket would."""
        if self._on_messages is not None:
            self._listener.push(self._session, [bytes(part) if index == 0 else part for index, part in enumerate(message)])

    def close(self) -> None:
        """Disconnect."""
        self._listener.disconnect(self._session)
        self._on_messages = None
        self._inbox.clear()

    def flush_and_close(self) -> None:
        """Sends are immediate here."""
        self.close()

    def deliver(self, message: Message) -> None:
        """Called by the listener."""
        self._inbox.append(message)
        if not self._is_scheduled and not self.is_frozen and self._loop is not None:
            self._is_scheduled = True
            self._loop.call_soon(self._drain)

    def thaw(self) -> None:
        """Take messages again after `is_frozen`."""
        self.is_frozen = False
        self._drain()

    def _drain(self) -> None:
        self._is_scheduled = False
        ready, self._inbox = self._inbox, []
        if ready and self._on_messages is not None:
            self._on_messages(ready)
