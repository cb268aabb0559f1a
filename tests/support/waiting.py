"""Waits with a condition and a limit."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from typing import TypeVar

import pytest

T = TypeVar("T")

LIMIT_S = 30.0
_POLL_S = 0.01


async def until(condition: Callable[[], T], what: str, limit_s: float = LIMIT_S) -> T:
    """The first true answer of the condition; the event loop goes on meanwhile."""
    end_s = time.monotonic() + limit_s
    while not (answer := condition()):
        if time.monotonic() > end_s:
            pytest.fail(f"not within {limit_s:g} s: {what}")
        await asyncio.sleep(_POLL_S)
    return answer


def wait_until(condition: Callable[[], T], what: str, limit_s: float = LIMIT_S) -> T:
    """The same where there is no event loop."""
    end_s = time.monotonic() + limit_s
    while not (answer := condition()):
        if time.monotonic() > end_s:
            pytest.fail(f"not within {limit_s:g} s: {what}")
        time.sleep(_POLL_S)
    return answer
