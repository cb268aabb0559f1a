"""The public entry points: bring a pool up, attach to one, use an engine in process, look, clean up."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from raycore.errors import ConfigurationError

if TYPE_CHECKING:
    from actors.launch import Connection, Launch
    from actors.pool_end import CleanupReport
    from raycore.client.blocking import BlockingClient


def launch(**config: Any) -> Launch:
    """A pool of engine cores on Ray, with the fields of `raycore.config.PoolConfig`.

    `async with launch(...) as client` gives an asynchronous client, `with launch(...) as client` a blocking one. Leaving the block ends
    a scoped pool.
    """
    from actors.launch import launch as launch_on_ray

    return launch_on_ray(**config)


def connect(pool: str) -> Connection:
    """A client of a running pool, from any process of its Ray cluster; used like `launch`. Leaving the block lets the pool go on."""
    from actors.launch import connect as connect_on_ray

    return connect_on_ray(pool)


def make_client(*, multiprocess_mode: bool = True, asyncio_mode: bool = True, **config: Any) -> Launch | BlockingClient:
    """The reference's factory. Without processes: one engine in this process, no Ray, stepped by the blocking client that is returned.

    With processes: `launch(**config)`, whose `async with` (asyncio_mode) or `with` gives the client.
    """
    if multiprocess_mode:
        return launch(**config)
    if asyncio_mode:
        msg = "asyncio_mode needs multiprocess_mode: an engine in this process would block the event loop while it steps"
        raise ConfigurationError(msg)
    from raycore.client.in_process import in_process_client

    return in_process_client(**config)


def pool_status(pool: str) -> dict[str, Any]:
    """What the pool's controller reports: members, loads, departures, epoch."""
    from actors.launch import pool_status as status_on_ray

    return status_on_ray(pool)


def cleanup(pool: str) -> CleanupReport:
    """Remove what a pool left whose driver and controller are gone; says what that was."""
    from actors.cleanup import cleanup as cleanup_on_ray

    return cleanup_on_ray(pool)
