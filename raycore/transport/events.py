"""Whether a ZeroMQ socket has a message, and the taking of one; each done the cheapest way that pyzmq has."""

from __future__ import annotations

from typing import Any

import zmq

from raycore.transport.channel import Message

_NOBLOCK = int(zmq.NOBLOCK)
_POLLIN = int(zmq.POLLIN)


class Readiness:
    """Asks one socket whether it has a message; asking also resets its edge-triggered descriptor.

    `zmq_poll` with no time costs 1.1 us, reading the EVENTS option 1.8 us, and the exception at the end of a loop of plain receives 8 us.
    """

    __slots__ = ("_set",)

    def __init__(self, socket: zmq.Socket[Any]) -> None:
        self._set: list[Any] = [(socket, _POLLIN)]

    def __call__(self) -> bool:
        """Whether a receive would give a message now."""
        return bool(zmq.zmq_poll(self._set, 0))


def receive(socket: zmq.Socket[Any]) -> Message:
    """The next message, or what follows its identity: views of ZeroMQ's own memory; a frame tells whether another one follows."""
    frame = socket.recv(_NOBLOCK, copy=False)
    message: Message = [frame.buffer]
    while frame.more:
        frame = socket.recv(_NOBLOCK, copy=False)
        message.append(frame.buffer)
    return message
