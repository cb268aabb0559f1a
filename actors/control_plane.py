"""What a client process has of the control plane: death watches, suspicions, memberships, the pool's end; all by Ray calls."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable
from typing import Any

import ray
import ray.exceptions

from actors.naming import NAMESPACE, Role, controller_name, coordinator_name, engine_name, named_actors, standby_name
from actors.pool_end import end_pool
from actors.remote import death_cause, remote_call
from raycore.client.control import LOOP_ENDED, PoolAccess, ScalingReport
from raycore.config import Timeouts
from raycore.errors import PoolNotFoundError, RaycoreError
from raycore.ids import EngineId
from raycore.membership import Endpoints, Membership

logger = logging.getLogger(__name__)

_ASK_S = 2.0
"""Asking one actor for the membership; the next one is asked after that."""
_RECONNECT_S = 0.2


class RayControlPlane:
    """Implements `raycore.client.control.ControlPlane` for one pool; used on one event loop."""

    def __init__(self, pool: str, timeouts: Timeouts, *, keep_alive: object = None) -> None:
        self._pool = pool
        self._timeouts = timeouts
        self._keep_alive = keep_alive
        """Whose collection would end the pool: a client in use prevents that."""
        self._watches: dict[EngineId, asyncio.Task[None]] = {}

    def watch(self, engine: EngineId, on_death: Callable[[EngineId, str], None]) -> None:
        """Call `on_death` once when the engine's process ends for any reason."""
        if engine not in self._watches:
            self._watches[engine] = asyncio.get_running_loop().create_task(self._watch(engine, on_death))

    def forget(self, engine: EngineId) -> None:
        """Stop watching."""
        task = self._watches.pop(engine, None)
        if task is not None:
            task.cancel()

    async def report_suspect(self, engine: EngineId, cause: str) -> None:
        """Tell the controller; without one, Ray's word on the process is all there is."""
        try:
            controller = await find_actor(controller_name(self._pool))
            await remote_call(controller.report_suspect.remote(engine, cause), limit_s=_ASK_S, what="report_suspect")
        except RaycoreError as error:
            logger.info("pool %s: nobody took the report that %s is suspect: %s", self._pool, engine, error)

    async def refresh(self) -> Membership | None:
        """The membership by the controller's word, or by the newest of the engines' when it is down."""
        try:
            return (await pool_access(self._pool)).membership
        except RaycoreError as error:
            logger.info("pool %s: no membership to be had: %s", self._pool, error)
            return None

    async def scale(self, target: int) -> ScalingReport:
        """Ask the controller; the operation goes on when the caller stops waiting."""
        return await self._ask_to_scale("scale", target)

    async def begin_scaling(self, target: int) -> str:
        """Begin to scale; the operation's id."""
        return await self._ask("begin_scaling", target)

    async def status(self) -> dict[str, Any]:
        """What the controller knows of the pool: members, loads, operations."""
        return await self._ask("status")

    async def _ask(self, method: str, *arguments: Any) -> Any:
        controller = await find_actor(controller_name(self._pool))
        what = f"pool {self._pool!r}: {method}"
        return await remote_call(getattr(controller, method).remote(*arguments), limit_s=self._timeouts.control_s, what=what)

    async def remove_ranks(self, ranks: tuple[int, ...]) -> ScalingReport:
        """Likewise."""
        return await self._ask_to_scale("remove_ranks", ranks)

    async def _ask_to_scale(self, method: str, argument: Any) -> ScalingReport:
        controller = await find_actor(controller_name(self._pool))
        timeouts = self._timeouts
        # every phase has a limit of its own; this one is for a controller that does not answer at all
        limit_s = timeouts.reserve_s + timeouts.engine_start_s + timeouts.drain_s + 4 * timeouts.control_s + 8 * timeouts.stop_s
        return await remote_call(getattr(controller, method).remote(argument), limit_s=limit_s, what=method)

    async def coordinator(self) -> Endpoints | None:
        """Where the coordinator publishes now."""
        try:
            actor = await find_actor(coordinator_name(self._pool))
            return await remote_call(actor.endpoints.remote(), limit_s=_ASK_S, what="the coordinator's endpoints")
        except RaycoreError:
            return None

    async def shutdown_pool(self, drain_s: float) -> None:
        """End the pool; returns when nothing of it is left."""
        await end_pool(self._pool, drain_s, self._timeouts)

    async def close(self) -> None:
        """Release watches; the pool goes on."""
        tasks = list(self._watches.values())
        self._watches.clear()
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _watch(self, engine: EngineId, on_death: Callable[[EngineId, str], None]) -> None:
        cause = await self._until_dead(engine)
        if self._watches.pop(engine, None) is not None:
            on_death(engine, cause)

    async def _until_dead(self, engine: EngineId) -> str:
        while True:
            try:
                actor = await find_engine(self._pool, engine)
                await actor.wait_closed.remote()
            except PoolNotFoundError:
                return "its process is gone"
            except (ray.exceptions.ActorUnavailableError, ray.exceptions.TaskCancelledError):
                # The connection broke, or Ray cancelled this call with the task in which it was made (`ray.cancel` is recursive, and an
                # async actor may have connected in one of its calls): neither says anything of the process.
                await asyncio.sleep(_RECONNECT_S)
            except ray.exceptions.RayError as error:
                return death_cause(error)
            else:
                return LOOP_ENDED


async def find_engine(pool: str, engine: EngineId) -> Any:
    """The handle of an engine core's actor; one that was a standby has another name. PoolNotFoundError when there is none."""
    try:
        return await find_actor(engine_name(pool, engine))
    except PoolNotFoundError:
        return await find_actor(standby_name(pool, engine.incarnation))


async def find_actor(name: str) -> Any:
    """The handle of a named actor; PoolNotFoundError when there is none."""
    try:
        return await asyncio.to_thread(ray.get_actor, name, NAMESPACE)
    except ValueError as error:
        message = f"there is no {name} in this Ray cluster"
        raise PoolNotFoundError(message) from error


async def pool_access(pool: str) -> PoolAccess:
    """What a client needs to reach the pool, from its controller, or from its engines when that does not answer."""
    with contextlib.suppress(RaycoreError):
        controller = await find_actor(controller_name(pool))
        return await remote_call(controller.access.remote(), limit_s=_ASK_S, what="the controller's access")
    names = [name for name in await asyncio.to_thread(named_actors, pool) if name.role in {Role.ENGINE, Role.STANDBY}]
    answers = await asyncio.gather(*(_engine_access(str(name)) for name in names), return_exceptions=True)
    found = [answer for answer in answers if isinstance(answer, PoolAccess) and answer.membership.members]
    if not found:
        message = f"there is no pool {pool!r} in this Ray cluster, or nothing of it answers"
        raise PoolNotFoundError(message)
    return max(found, key=lambda access: (access.membership.term, access.membership.epoch))


async def _engine_access(name: str) -> PoolAccess:
    engine = await find_actor(name)
    return await remote_call(engine.access.remote(), limit_s=_ASK_S, what=f"{name}: access")
