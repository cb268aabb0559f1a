"""The controller actor: a `PoolController` behind Ray calls, named, detached, restarted by Ray when its process dies."""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import Awaitable
from typing import Any

import ray

from actors.naming import NAMESPACE, sentinel_name
from actors.nodes import is_restarted
from actors.pool_controller import PoolController
from actors.setup import PoolSetup
from raycore.client.control import PoolAccess
from raycore.errors import PoolError, RaycoreError
from raycore.ids import EngineId
from raycore.membership import Membership

logger = logging.getLogger(__name__)

_EXIT_GRACE_S = 0.5
"""The controller outlives its last answer by this, so that the answer gets out."""


@ray.remote(num_cpus=0, max_restarts=-1, max_task_retries=0)
class ControllerActor:
    """Ends itself when the pool has ended."""

    def __init__(self, setup: PoolSetup) -> None:
        self._setup = setup
        self._me = ray.get_runtime_context().current_actor
        self._is_known = asyncio.Event()
        self._controller = PoolController(setup, self._exit)
        # Ray constructs async actors on their running loop, and constructs them again with the same arguments on a restart.
        self._life = asyncio.create_task(self._recover() if is_restarted() else self._expect_start())
        self._driver_watch: asyncio.Task[None] | None = None

    def __repr__(self) -> str:
        return f"controller {self._setup.config.pool}"

    async def start(self) -> PoolAccess:
        """Bring the pool up; a failure ends the pool and is raised."""
        self._watch_driver()
        try:
            membership = await self._controller.start()
        except RaycoreError:
            self._life = asyncio.create_task(self._controller.shut_down(0))
            raise
        self._is_known.set()
        return self._setup.access(membership)

    async def membership(self) -> Membership:
        """The newest membership."""
        await self._known()
        return self._controller.membership

    async def access(self) -> PoolAccess:
        """What a client needs to reach the pool."""
        await self._known()
        return self._setup.access(self._controller.membership)

    async def status(self) -> dict[str, Any]:
        """Members, departures, loads, for people."""
        await self._known()
        return {**self._controller.status(), "controller_pid": os.getpid()}

    async def report_suspect(self, engine: EngineId, cause: str) -> None:
        """A client cannot reach this engine."""
        await self._known()
        await self._controller.report_suspect(engine, cause)

    async def shutdown(self, drain_s: float) -> None:
        """End the pool; nothing of it but this actor is left when this returns, and the actor follows."""
        await self._controller.shut_down(drain_s)

    async def ping(self) -> int:
        """This process's pid."""
        return os.getpid()

    async def _known(self) -> None:
        await asyncio.wait_for(self._is_known.wait(), self._setup.config.timeouts.engine_start_s)

    async def _expect_start(self) -> None:
        """A controller whose launcher died before it called `start` must not stay."""
        await asyncio.sleep(self._setup.config.timeouts.control_s)
        if not self._controller.is_starting_or_up:
            logger.error("pool %s was never started; its controller ends", self._setup.config.pool)
            await self._controller.shut_down(0)

    async def _recover(self) -> None:
        self._watch_driver()
        try:
            await self._controller.recover()
        except PoolError:
            logger.exception("pool %s could not be recovered; it ends", self._setup.config.pool)
            await self._controller.shut_down(0)
        self._is_known.set()

    def _watch_driver(self) -> None:
        if self._setup.config.lifetime == "scoped" and self._driver_watch is None:
            self._driver_watch = asyncio.create_task(self._controller.until_driver_dies(self._hold_sentinel))

    async def _hold_sentinel(self) -> None:
        sentinel: Any = await asyncio.to_thread(ray.get_actor, sentinel_name(self._setup.config.pool), NAMESPACE)
        outstanding: Awaitable[None] = sentinel.hold.remote()
        await outstanding

    def _exit(self) -> None:
        asyncio.get_running_loop().call_later(_EXIT_GRACE_S, ray.kill, self._me)
