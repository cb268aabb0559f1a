"""The controller actor: a `PoolController` behind Ray calls, named, detached, restarted by Ray when its process dies."""

from __future__ import annotations

import asyncio
import hashlib
import logging
import os
from collections.abc import Awaitable, Sequence
from typing import Any

import ray

from actors.autoscaling import Autoscaling
from actors.metrics import RayMetrics, model_name
from actors.naming import NAMESPACE, sentinel_name
from actors.nodes import is_restarted
from actors.pool_controller import PoolController
from actors.pool_observer import PoolObserver
from actors.setup import PoolSetup
from raycore.client.control import PoolAccess, ScalingReport
from raycore.config import log_level
from raycore.errors import PoolError, RaycoreError
from raycore.event_log import EventLog, event_directory
from raycore.events import Stamp
from raycore.ids import EngineId
from raycore.logs import log_everything_as
from raycore.membership import Membership

logger = logging.getLogger(__name__)

_EXIT_GRACE_S = 0.5
"""The controller outlives its last answer by this, so that the answer gets out."""


@ray.remote(num_cpus=0, max_restarts=-1, max_task_retries=0)
class ControllerActor:
    """Ends itself when the pool has ended."""

    def __init__(self, setup: PoolSetup) -> None:
        self._setup = setup
        log_everything_as(setup.config.pool, "controller", log_level(setup.environment))
        self._me = ray.get_runtime_context().current_actor
        self._is_known = asyncio.Event()
        self._controller = PoolController(setup, self._exit, observer_of(setup))
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

    async def scale(self, target: int) -> ScalingReport:
        """Grow or shrink to `target` ranks; returns when that is done, raises when it was undone."""
        await self._known()
        return await self._controller.scaler.scale(target)

    async def begin_scaling(self, target: int) -> str:
        """Begin as `scale` does and return the operation's id; `status` has what becomes of it."""
        await self._known()
        return await self._controller.scaler.begin(target)

    async def remove_ranks(self, ranks: Sequence[int]) -> ScalingReport:
        """Have these ranks leave."""
        await self._known()
        return await self._controller.scaler.remove(ranks)

    async def autoscale(self, settings: Autoscaling | None) -> None:
        """Scale by a policy from now on; None: no more."""
        await self._known()
        self._controller.autoscaler.configure(settings)

    async def autoscaling(self) -> Autoscaling | None:
        """By what the pool scales itself; None: it does not."""
        await self._known()
        return self._controller.autoscaler.settings

    async def cancel_operation(self, operation: str) -> bool:
        """Undo a running operation; False when it is not running, or decided."""
        return self._controller.scaler.cancel(operation)

    async def shutdown(self, drain_s: float) -> None:
        """End the pool; nothing of it but this actor is left when this returns, and the actor follows."""
        await self._controller.shut_down(drain_s)

    async def ping(self) -> int:
        """This process's pid."""
        return os.getpid()

    async def _known(self) -> None:
        async with asyncio.timeout(self._setup.config.timeouts.engine_start_s):
            await self._is_known.wait()

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


def observer_of(setup: PoolSetup) -> PoolObserver:
    """What tells of this pool, as it was configured."""
    config = setup.config
    model, node_ip = model_name(config.model, config.engine), ray.util.get_node_ip_address()
    directory = event_directory(config.event_log)
    life = hashlib.sha256(setup.keys.server_public.encode()).hexdigest()[:8]  # new with each launch, and the same after a restart
    return PoolObserver(
        Stamp(config.pool, life),
        engine=config.engine,
        model=model,
        node_ip=node_ip,
        sink=RayMetrics(config.pool, model, node_ip) if config.metrics else None,
        log=None if directory is None else EventLog(directory, config.pool),
    )
