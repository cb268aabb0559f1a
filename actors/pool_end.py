"""Ends pools from outside: by their controller where it answers, by name where nothing answers; sees that nothing is left."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Iterator, Sequence

import msgspec
import ray
import ray.exceptions

from actors.groups import pool_groups, remove_group
from actors.naming import NAMESPACE, ActorName, Role, controller_name, named_actors
from actors.nodes import ActorProcess, actor_processes
from actors.processes import end_process
from actors.remote import remote_call
from raycore import tensors
from raycore.config import Timeouts
from raycore.errors import DeadlineError, RaycoreError
from raycore.transport import endpoints

logger = logging.getLogger(__name__)

_POLL_S = 0.02
_RETRY_S = 0.2
_END_ORDER = (Role.CONTROLLER, Role.COORDINATOR, Role.CLIENT, Role.STANDBY, Role.ENGINE, Role.SENTINEL)
"""The controller first, or it would mourn its engines; the sentinel last, or the controller would mourn its driver."""


class CleanupReport(msgspec.Struct, frozen=True, kw_only=True):
    """What `cleanup` found and removed; all empty when the pool had left nothing."""

    pool: str
    actors: tuple[str, ...] = ()
    placement_groups: tuple[str, ...] = ()
    lingering_pids: tuple[int, ...] = ()
    """Processes that did not go in time."""
    socket_directories: int = 0
    shared_memory_files: int = 0

    def __iter__(self) -> Iterator[str]:
        """Lines for a terminal."""
        for name in self.actors:
            yield f"killed actor {name}"
        for group_id in self.placement_groups:
            yield f"removed placement group {group_id}"
        for pid in self.lingering_pids:
            yield f"process {pid} is still there"
        if self.socket_directories or self.shared_memory_files:
            yield f"removed {self.socket_directories} socket directories and {self.shared_memory_files} shared-memory files"
        if not (self.actors or self.placement_groups or self.lingering_pids or self.socket_directories or self.shared_memory_files):
            yield f"nothing was left of pool {self.pool}"


async def end_pool(pool: str, drain_s: float, timeouts: Timeouts) -> None:
    """Have the controller end the pool; returns when nothing of it is left. A controller that dies meanwhile is asked again.

    Raises DeadlineError when the pool is still there after `drain_s` and the limits of stopping; `cleanup` is for that.
    """
    limit_s = drain_s + 3 * timeouts.stop_s + timeouts.control_s
    until_s = time.monotonic() + limit_s
    while time.monotonic() < until_s:
        try:
            controller = await asyncio.to_thread(ray.get_actor, controller_name(pool), NAMESPACE)
            await remote_call(controller.shutdown.remote(drain_s), limit_s=until_s - time.monotonic(), what=f"pool {pool!r}: shutdown")
        except ValueError:
            break
        except RaycoreError as error:
            logger.info("pool %s: its controller did not answer the shutdown: %s", pool, error)
            await asyncio.sleep(_RETRY_S)
            continue
        break
    else:
        message = f"pool {pool!r} did not end within {limit_s:g} s; `raycore cleanup {pool}` ends it by force"
        raise DeadlineError(message)
    await clean_up(pool, limit_s=timeouts.stop_s)


async def clean_up(pool: str, *, limit_s: float) -> CleanupReport:
    """Remove what is left of a pool, by name, without its controller's help. Idempotent."""
    processes = await asyncio.to_thread(actor_processes, pool)
    names = await asyncio.to_thread(named_actors, pool)
    for role in _END_ORDER:
        await asyncio.gather(*(_kill_actor(name) for name in names if name.role is role))
    lingering = await _end_processes(pool, processes, limit_s)
    rows = await asyncio.to_thread(pool_groups, pool)
    await asyncio.gather(*(remove_group(row.group_id, limit_s=limit_s) for row in rows))
    return CleanupReport(
        pool=pool,
        actors=tuple(str(name) for name in names),
        placement_groups=tuple(row.group_id for row in rows),
        lingering_pids=lingering,
        socket_directories=endpoints.sweep(pool),
        shared_memory_files=tensors.sweep(pool),
    )


async def end_clients(pool: str, *, limit_s: float) -> None:
    """Kill the pool's client actors and see their processes gone."""
    names = [name for name in await asyncio.to_thread(named_actors, pool) if name.role is Role.CLIENT]
    if names:
        processes = [process for process in await asyncio.to_thread(actor_processes, pool) if process.name in names]
        await asyncio.gather(*map(_kill_actor, names))
        await _end_processes(pool, processes, limit_s)


async def _end_processes(pool: str, processes: Sequence[ActorProcess], limit_s: float) -> tuple[int, ...]:
    outcomes = await asyncio.gather(*(end_process(p.pid, p.node_id, pool, limit_s=limit_s) for p in processes))
    return tuple(process.pid for process, is_gone in zip(processes, outcomes, strict=True) if not is_gone)


async def _kill_actor(name: ActorName) -> None:
    def kill() -> None:
        try:
            ray.kill(ray.get_actor(str(name), NAMESPACE), no_restart=True)
        except (ValueError, ray.exceptions.RayError):
            return  # it is gone already

    await asyncio.to_thread(kill)
