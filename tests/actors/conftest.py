"""Pools that are gone when their test ends."""

from __future__ import annotations

from collections.abc import AsyncIterator

import pytest

from tests.actors.pools import PoolMaker


@pytest.fixture
async def pools(cluster: str) -> AsyncIterator[PoolMaker]:
    """Opens pools on the session's cluster."""
    del cluster
    maker = PoolMaker()
    yield maker
    await maker.close()
