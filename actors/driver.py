"""A pool as its driver sees it: brought up, and ended or let go."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from typing import Any

import ray
import ray.exceptions
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from actors.controller_actor import ControllerActor
from actors.load_view import LoadView
from actors.local_ray import ensure_ray, release_ray
from actors.naming import NAMESPACE, controller_name, named_actors, sentinel_name
from actors.pool_end import end_pool
from actors.remote import remote_call
from actors.sentinel import SentinelActor
from actors.setup import PoolKeys, PoolSetup
from raycore import tensors
from raycore.client.control import PoolAccess
from raycore.config import PoolConfig, forwarded_environment
from raycore.errors import PoolError, PoolExistsError
from raycore.transport import endpoints

logger = logging.getLogger(__name__)

_POLL_S = 0.05
_SOME_MEMORY_BYTES = 1
"""An actor that asks for nothing at all is put on a random node, whatever it prefers: Ray heeds only a node that it must have."""


class PoolDriver:
    """Owns the sentinel of a scoped pool; `open` once, then `close` or, from a finaliser, `abandon`."""

    def __init__(self, config: PoolConfig) -> None:
        self._config = config
        self._sentinel: Any = None
        self._is_open = False
        self._is_made = False

    def acquire_ray(self) -> None:
        """Have Ray; not in a helper thread, where it could not handle SIGTERM. Idempotent; part of `open`."""
        if self._is_open:
            return
        is_ours = ensure_ray(self._config)
        self._is_open = True
        if is_ours and self._config.tcp == "auto":
            # A local Ray has one node: nothing needs to listen on its network address.
            self._config = self._config.model_copy(update={"tcp": "never"})

    async def open(self) -> PoolAccess:
        """Bring the pool up. PoolExistsError when the name is taken; whatever else fails, also a cancellation, leaves nothing."""
        async with LoadView(self._config.pool).shown():
            self.acquire_ray()
            try:
                return await self._start()
            except BaseException:
                await asyncio.shield(self._undo())
                raise

    async def _start(self) -> PoolAccess:
        config = self._config
        endpoints.sweep(config.pool)
        tensors.sweep(config.pool)
        setup = PoolSetup(config=config, keys=PoolKeys.make(), environment=forwarded_environment(config.forward_env))
        controller = await _to_its_end(self._make_controller, setup)
        if config.lifetime == "scoped":
            await _to_its_end(self._make_sentinel)
        limits = config.timeouts
        limit_s = limits.reserve_s * 2 + limits.engine_start_s + limits.control_s * 2
        return await remote_call(controller.start.remote(), limit_s=limit_s, what=f"pool {config.pool!r}: start")

    def _make_controller(self, setup: PoolSetup) -> Any:
        controller = _create_controller(setup)
        self._is_made = True
        return controller

    def _make_sentinel(self) -> None:
        self._sentinel = _create_sentinel(self._config.pool)

    async def _undo(self) -> None:
        try:
            if self._is_made:
                await end_pool(self._config.pool, 0, self._config.timeouts)
        finally:
            await self._let_go()

    async def close(self) -> None:
        """End a scoped pool, let a detached one be; release Ray. Idempotent."""
        if not self._is_open:
            return
        try:
            if self._config.lifetime == "scoped":
                await end_pool(self._config.pool, 0, self._config.timeouts)
        finally:
            await self._let_go()

    async def _let_go(self) -> None:
        if self._is_open:
            self._is_open, self._sentinel = False, None
            await asyncio.to_thread(release_ray)

    def abandon(self) -> None:
        """For garbage collection and interpreter exit: kill the sentinel, so that the controller ends the pool; never raises."""
        if not self._is_open or not ray.is_initialized():
            return
        self._is_open = False
        if self._sentinel is not None:
            try:
                ray.kill(self._sentinel)
                self._wait_until_ended()
            except (ray.exceptions.RayError, PoolError):
                logger.warning("pool %s was abandoned and could not be ended", self._config.pool)
        release_ray()

    def _wait_until_ended(self) -> None:
        # A local Ray that is ours ends next, and would cut the controller's clean-up short.
        until_s = time.monotonic() + self._config.timeouts.stop_s
        while named_actors(self._config.pool) and time.monotonic() < until_s:
            time.sleep(_POLL_S)


async def _to_its_end(work: Callable[..., Any], *arguments: Any) -> Any:
    """Run in a thread; a cancellation waits for its end, since what it makes must be known before it can be undone."""
    task = asyncio.ensure_future(asyncio.to_thread(work, *arguments))
    try:
        return await asyncio.shield(task)
    except asyncio.CancelledError:
        await asyncio.wait({task})
        raise


def _create_controller(setup: PoolSetup) -> Any:
    pool = setup.config.pool
    options = ControllerActor.options(
        name=controller_name(pool),
        namespace=NAMESPACE,
        lifetime="detached",
        scheduling_strategy=_here(or_elsewhere=True),  # another node takes over from one that is lost
        memory=_SOME_MEMORY_BYTES,
    )
    try:
        return options.remote(setup)
    except (ray.exceptions.ActorAlreadyExistsError, ValueError) as error:
        message = f"a pool named {pool!r} runs already; connect to it, or end it with `raycore cleanup {pool}`"
        raise PoolExistsError(message) from error


def _here(*, or_elsewhere: bool) -> NodeAffinitySchedulingStrategy:
    """The driver's node: the loss of another then takes neither the controller nor the sign of the driver's life."""
    return NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=or_elsewhere)


def _create_sentinel(pool: str) -> Any:
    options = SentinelActor.options(name=sentinel_name(pool), namespace=NAMESPACE, scheduling_strategy=_here(or_elsewhere=False))
    return options.remote()
