"""The controller's care for the coordinator: made where a pool wants one, told of memberships, replaced when gone, ended at the end."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from typing import Any, final

import ray
import ray.exceptions

from actors.coordinator_actor import create_coordinator
from actors.naming import NAMESPACE, Role, coordinator_name
from actors.nodes import actor_processes
from actors.processes import end_process
from actors.remote import remote_call
from actors.setup import PoolSetup
from raycore.errors import RaycoreError
from raycore.membership import Membership

logger = logging.getLogger(__name__)

_TELL_S = 2.0
_LOOK_S = 5.0
"""Ray restarts a coordinator whose process dies within a second or two; one that is gone for good is noticed this late."""
_AGAIN_S = 0.5


@final
class CoordinatorKeeper:
    """One task of its own; the controller never waits for it, except at the end."""

    def __init__(self, setup: PoolSetup) -> None:
        self._setup = setup
        self._pool = setup.config.pool
        self._limits = setup.config.timeouts
        self._membership = Membership(self._pool)
        self._told: Membership | None = None
        self._handle: Any = None
        self._news = asyncio.Event()
        self._task: asyncio.Task[None] | None = None

    def tell(self, membership: Membership) -> None:
        """The newest decision; the first one of a pool with more than one rank has the coordinator made."""
        self._membership = membership
        self._news.set()
        if self._task is None and self._setup.config.coordinator == "auto" and len(membership.members) > 1:
            self._task = asyncio.create_task(self._run())

    async def end(self) -> None:
        """Kill it for good and see its process gone. A later `tell` makes none."""
        if self._task is None:
            self._task = asyncio.create_task(asyncio.sleep(0))
        self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)
        processes = [found for found in await asyncio.to_thread(actor_processes, self._pool) if found.name.role is Role.COORDINATOR]
        await asyncio.to_thread(_kill, self._pool)
        ends = (end_process(found.pid, found.node_id, self._pool, limit_s=self._limits.stop_s) for found in processes)
        if not all(await asyncio.gather(*ends)):
            logger.error("pool %s: the coordinator's process is still there after %g s", self._pool, self._limits.stop_s)

    async def _run(self) -> None:
        while True:
            try:
                await self._look()
            except (RaycoreError, ray.exceptions.RayError) as error:
                logger.info("pool %s: its coordinator does not answer: %s", self._pool, error)
                self._handle, self._told = None, None
                await asyncio.sleep(_AGAIN_S)
            else:
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(_LOOK_S):
                        await self._news.wait()
                self._news.clear()

    async def _look(self) -> None:
        """Have one, tell it what it has not been told, or see that it lives."""
        if self._handle is None:
            # to its end also when cancelled: what it makes must be known before the pool's end kills it
            making = asyncio.ensure_future(create_coordinator(self._setup))
            try:
                self._handle = await asyncio.shield(making)
            except asyncio.CancelledError:
                await asyncio.wait({making})
                raise
        membership = self._membership
        if membership is not self._told:
            limit_s = self._limits.control_s if self._told is None else _TELL_S
            await remote_call(self._handle.set_membership.remote(membership), limit_s=limit_s, what="the coordinator's membership")
            self._told = membership
        else:
            await remote_call(self._handle.ping.remote(), limit_s=_TELL_S, what="the coordinator's ping")


def _kill(pool: str) -> None:
    try:
        ray.kill(ray.get_actor(coordinator_name(pool), NAMESPACE), no_restart=True)
    except (ValueError, ray.exceptions.RayError):
        return  # there is none
