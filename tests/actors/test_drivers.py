"""What becomes of a pool when its driver is killed: a scoped one ends, a detached one stays until somebody ends it."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from actors.cleanup import cleanup
from actors.control_plane import pool_access
from actors.naming import named_actors
from raycore.errors import PoolNotFoundError
from tests.actors.pools import ask_controller, eventually, membership_when

pytestmark = pytest.mark.ray

REPOSITORY = Path(__file__).parents[2]


@asynccontextmanager
async def driver(address: str, pool: str, lifetime: str) -> AsyncIterator[asyncio.subprocess.Process]:
    """A process whose pool is open."""
    environment = {**os.environ, "RAY_ADDRESS": address}
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "tests.actors.driver_script", pool, lifetime, cwd=REPOSITORY, env=environment, stdout=asyncio.subprocess.PIPE
    )
    try:
        await asyncio.wait_for(_until_open(process), 60)
        yield process
    finally:
        if process.returncode is None:
            process.kill()
        await process.communicate()


async def _until_open(process: asyncio.subprocess.Process) -> None:
    assert process.stdout is not None
    while line := await process.stdout.readline():
        if line.strip() == b"pool is open":
            return
    pytest.fail("the driver ended before its pool was open")


async def test_a_scoped_pool_ends_with_its_killed_driver(cluster: str) -> None:
    async with driver(cluster, "scoped", "scoped") as process:
        assert len((await pool_access("scoped")).membership.members) == 2
        process.kill()
        await eventually(_is_empty("scoped"), "the pool is gone")


async def test_a_scoped_pool_ends_when_driver_and_controller_die_together(cluster: str) -> None:
    async with driver(cluster, "together", "scoped") as process:
        controller = await ask_controller("together", "ping")
        os.kill(controller, signal.SIGSTOP)
        process.kill()
        await process.wait()
        os.kill(controller, signal.SIGKILL)
        await eventually(_is_empty("together"), "the restarted controller ended the pool")


async def test_a_detached_pool_outlives_its_driver_and_a_restart_of_its_controller(cluster: str) -> None:
    async with driver(cluster, "detached", "detached") as process:
        process.kill()
        await process.wait()
    before = await pool_access("detached")
    os.kill(await ask_controller("detached", "ping"), signal.SIGKILL)
    after = await membership_when("detached", lambda m: m.term == 2)
    assert after.members == before.membership.members
    report = await asyncio.to_thread(cleanup, "detached")
    assert [name.split("/")[1] for name in report.actors] == ["controller", "coordinator", "engine", "engine"]
    assert len(report.placement_groups) == 2
    assert report.lingering_pids == ()
    assert named_actors("detached") == []


async def test_cleanup_needs_no_controller_and_may_be_repeated(cluster: str) -> None:
    import ray

    from actors.naming import NAMESPACE, controller_name

    async with driver(cluster, "headless", "detached") as process:
        process.kill()
        await process.wait()
    members = (await pool_access("headless")).membership.members
    os.kill(members[0].pid, signal.SIGSTOP)
    ray.kill(ray.get_actor(controller_name("headless"), NAMESPACE), no_restart=True)
    report = await asyncio.to_thread(cleanup, "headless")
    assert report.lingering_pids == ()
    again = await asyncio.to_thread(cleanup, "headless")
    assert (again.actors, again.placement_groups) == ((), ())
    with pytest.raises(PoolNotFoundError):
        await pool_access("headless")


def _is_empty(pool: str) -> Callable[[], Awaitable[bool]]:
    async def check() -> bool:
        return not await asyncio.to_thread(named_actors, pool)

    return check
