"""The engine actor: one `EngineHost` behind Ray calls. It holds no decision of its own."""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import os
import threading
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeVar

import msgspec
import ray

from actors.setup import EngineSetup
from raycore.client.control import PoolAccess
from raycore.errors import EngineStartError
from raycore.ids import EngineId
from raycore.membership import Member, Membership

if TYPE_CHECKING:
    from raycore.core.host import EngineHost

_RAY_SETS = "OMP_NUM_THREADS"
"""Ray gives this to every worker, so that it being set says nothing about the node's wishes."""

Result = TypeVar("Result")


class EngineDescription(msgspec.Struct, frozen=True, kw_only=True):
    """What a controller that was restarted needs of an engine to adopt it."""

    engine: EngineId
    pid: int
    node_id: str
    group_id: str
    member: Member | None
    membership: Membership


# An async actor with concurrency groups: each group has an event loop of its own, so a stuck control call cannot hide
# the health group, and an outstanding watch call costs a coroutine, not a thread (a threaded actor would need one per client).
_OPTIONS: dict[str, Any] = {
    "max_restarts": 0,
    "max_task_retries": 0,
    "concurrency_groups": {"control": 16, "watch": 10_000, "health": 2},
}


@ray.remote(**_OPTIONS)
class EngineActor:
    """One rank of a pool. Created on its ready placement group; ends by `ray.kill` after `stop`."""

    def __init__(self, setup: EngineSetup) -> None:
        self._setup = setup
        self._host: EngineHost | None = None
        self._member: Member | None = None
        self._ended: concurrent.futures.Future[str] = concurrent.futures.Future()
        _set_where_absent(setup.environment)

    def __repr__(self) -> str:
        return f"rank {self._setup.spec.rank} {self._setup.spec.pool}"

    @ray.method(concurrency_group="control")
    async def start(self) -> Member:
        """Load the engine, bind its sockets and begin to step; raises what the engine raises."""
        member: Member = await asyncio.wrap_future(_in_thread("raycore-start", self._start_host))
        self._member = member
        _in_thread("raycore-steps", self._step_until_stopped)
        return member

    @ray.method(concurrency_group="watch")
    async def wait_closed(self) -> str:
        """The sentinel call of the controller and of every client: pending while the engine core steps, failing by Ray with the process.

        Returns "stopped" after `stop`; raises what the engine raised.
        """
        return await asyncio.shield(asyncio.wrap_future(self._ended))

    @ray.method(concurrency_group="control")
    async def membership(self) -> Membership:
        """What this engine holds."""
        return self._held()

    @ray.method(concurrency_group="control")
    async def set_membership(self, membership: Membership) -> Membership:
        """Offer a membership; returns what is held now, which is newer when the offer was stale."""
        if self._host is None:
            message = f"{self._setup.engine} has not started"
            raise EngineStartError(message, rank=self._setup.spec.rank, cause=message)
        return self._host.set_membership(membership)

    @ray.method(concurrency_group="control")
    async def access(self) -> PoolAccess:
        """What a client needs to reach the pool, for when the controller is down."""
        return msgspec.structs.replace(self._setup.access, membership=self._held())

    @ray.method(concurrency_group="control")
    async def describe(self) -> EngineDescription:
        """Facts for a restarted controller."""
        return EngineDescription(
            engine=self._setup.engine,
            pid=os.getpid(),
            node_id=ray.get_runtime_context().get_node_id(),
            group_id=self._setup.group_id,
            member=self._member,
            membership=self._held(),
        )

    @ray.method(concurrency_group="control")
    async def stop(self, drain_s: float) -> None:
        """Refuse new work, let running requests end for up to `drain_s`, abort the rest, end the step loop."""
        host = self._host
        if host is None or self._ended.done():
            return
        await asyncio.wrap_future(_in_thread("raycore-stop", lambda: host.stop(drain_s)))
        with contextlib.suppress(Exception):  # how the steps ended is for the sentinel call to tell
            await asyncio.shield(asyncio.wrap_future(self._ended))

    @ray.method(concurrency_group="health")
    async def ping(self) -> int:
        """This process's pid, answered whatever the control group does."""
        return os.getpid()

    def _held(self) -> Membership:
        return self._setup.access.membership if self._host is None else self._host.membership()

    def _start_host(self) -> Member:
        # Here, not at the top: the engine's libraries must see the forwarded environment.
        from raycore.core.host import EngineHost

        host = EngineHost(self._setup.spec, node_ip=ray.util.get_node_ip_address())
        member = host.start()
        self._host = host
        return member

    def _step_until_stopped(self) -> None:
        if self._host is None:
            return
        try:
            outcome = self._host.run()
        except BaseException as error:  # noqa: BLE001 -- it is what the sentinel call raises
            self._ended.set_exception(error)
        else:
            self._ended.set_result(outcome)
        finally:
            self._host.close()


def _in_thread(name: str, function: Callable[[], Result]) -> concurrent.futures.Future[Result]:
    """Run in a daemon thread: the executor's threads of `asyncio.to_thread` would be joined at exit, and a hung engine never joins."""
    future: concurrent.futures.Future[Result] = concurrent.futures.Future()

    def work() -> None:
        try:
            result = function()
        except BaseException as error:  # noqa: BLE001 -- carried to whoever awaits the future
            future.set_exception(error)
        else:
            future.set_result(result)

    threading.Thread(target=work, name=name, daemon=True).start()
    return future


def _set_where_absent(environment: dict[str, str]) -> None:
    for name, value in environment.items():
        if name == _RAY_SETS or name not in os.environ:
            os.environ[name] = value
