"""What every test of the data plane proves besides its own point."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest

from raycore.tensors import SHARED_MEMORY_DIRECTORY
from tests.support.engine_process import Pool, echo_pool


@pytest.fixture(scope="module")
def pool() -> Iterator[Pool]:
    """One echo engine for the module."""
    with echo_pool() as running:
        yield running
        for engine in running.engines:
            state = engine.state()
            assert (state.requests, engine.process.is_alive()) == (0, True)
    assert not left_of(running.name)


def left_of(pool: str) -> list[Path]:
    """Shared-memory files and socket directories of a pool."""
    return [*SHARED_MEMORY_DIRECTORY.glob(f"raycore-{pool}-*"), *Path("/tmp").glob(f"raycore-*/{pool}.*")]


@pytest.fixture(autouse=True)
async def _nothing_is_raised_behind_the_scenes() -> AsyncIterator[None]:
    """What callbacks raise reaches nobody but the loop; here it fails the test. And no task is left."""
    raised: list[dict[str, Any]] = []
    loop = asyncio.get_running_loop()
    loop.set_exception_handler(lambda _loop, context: raised.append(context))
    yield
    left = [task for task in asyncio.all_tasks() if task is not asyncio.current_task() and not task.done()]
    assert not left, left
    assert not raised, raised


@pytest.fixture(autouse=True)
def _no_client_thread_is_left() -> Iterator[None]:
    yield
    until_s = time.monotonic() + 5
    while names := [thread.name for thread in threading.enumerate() if thread.name.startswith("raycore")]:
        assert time.monotonic() < until_s, f"threads are left: {names}"
        time.sleep(0.01)
