"""What a ZeroMQ socket can do now; reading this also resets its edge-triggered descriptor."""

from __future__ import annotations

from typing import Any

import zmq

_EVENTS = int(zmq.EVENTS)  # a plain int: pyzmq's enums cost more than the call


def events_of(socket: zmq.Socket[Any]) -> int:
    """A mask of POLLIN and POLLOUT."""
    events = socket.getsockopt(_EVENTS)
    return events if isinstance(events, int) else 0
