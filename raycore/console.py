"""The console on standard error, one for the process: signs of life that nest in one another must be drawn by the same one."""

from __future__ import annotations

import functools

from rich.console import Console
from rich.status import Status


@functools.cache
def error_console() -> Console:
    """Where everything goes that is not a command's result."""
    return Console(stderr=True)


def working(what: str) -> Status:
    """A sign of life while the block runs; nothing where nobody watches."""
    return error_console().status(what)
