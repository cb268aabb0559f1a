"""An event loop whose time is counted, not waited for: nothing outside can delay it, so a run is a function of its seed."""

from __future__ import annotations

import asyncio
import selectors
from collections.abc import Callable
from typing import Any

_TURN_S = 1e-9
"""What a turn of the loop takes, so that a wait too short to be told apart on the clock ends in some turn."""


class StalledError(AssertionError):
    """Nothing is scheduled and the work is not done: somebody waits for ever."""


class _Jump(selectors.SelectSelector):
    """Waits for nothing: the time to the next timer passes at once."""

    def __init__(self) -> None:
        super().__init__()
        self.loop: VirtualLoop | None = None

    def select(self, timeout: float | None = None) -> list[Any]:
        assert self.loop is not None
        if timeout is None:
            raise StalledError("nothing is scheduled")
        self.loop.now_s += max(timeout, _TURN_S)
        return []


class VirtualLoop(asyncio.SelectorEventLoop):
    """Seconds from 0; what asyncio would give to a thread runs at once."""

    def __init__(self) -> None:
        self.now_s = 0.0
        jump = _Jump()
        super().__init__(jump)
        jump.loop = self

    def time(self) -> float:
        return self.now_s

    def run_in_executor(self, executor: Any, func: Callable[..., Any], *args: Any) -> asyncio.Future[Any]:
        del executor
        future = self.create_future()
        try:
            future.set_result(func(*args))
        except Exception as error:  # noqa: BLE001 -- what a thread would hand back
            future.set_exception(error)
        return future
