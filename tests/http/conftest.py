"""The front over a scripted engine in this process; requests go through the ASGI application, without a socket."""

from __future__ import annotations

import signal
from collections.abc import AsyncIterator, Iterator

import pytest

from tests.http.fronts import Fixture, front_of
from tests.support.scripted import Rig


@pytest.fixture(autouse=True)
def signals_as_before() -> Iterator[None]:
    """uvicorn puts back the handler that it found, and within a fixture that is the one of a loop that turned for the fixture only."""
    before = signal.getsignal(signal.SIGINT)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture
async def front() -> AsyncIterator[Fixture]:
    """One rank, no key."""
    async with front_of(Rig()) as opened:
        yield opened


@pytest.fixture
async def keyed() -> AsyncIterator[Fixture]:
    """One rank; the key is "right"."""
    async with front_of(Rig(), key="right") as opened:
        yield opened
