"""`launch` and `connect`: pools as context managers, for code with an event loop and without."""

from __future__ import annotations

import asyncio
import logging
import weakref
from collections.abc import Coroutine, Sequence
from types import TracebackType
from typing import Any, TypeVar

import msgspec

from actors.autoscaling import Autoscaling
from actors.blocking import run_blocking
from actors.clients import client_statuses
from actors.control_plane import RayControlPlane, find_actor, pool_access
from actors.copy_view import CopyView
from actors.driver import PoolDriver
from actors.local_ray import ensure_ray, release_ray
from actors.metrics import metrics_of
from actors.naming import controller_name
from actors.remote import remote_call
from raycore import tensors
from raycore.client.blocking import BlockingClient
from raycore.client.client import EngineCoreClient
from raycore.client.control import PoolAccess, ScalingReport
from raycore.client.links import SocketLinks
from raycore.client.scope import Routing
from raycore.config import PoolConfig, Timeouts, parse_config
from raycore.errors import PoolError, RaycoreError
from raycore.routing.selection import make_router
from raycore.tokenizer import Tokenizer, load_tokenizer
from raycore.transport import endpoints

logger = logging.getLogger(__name__)

Answer = TypeVar("Answer")


class Launch:
    """A pool that starts when its block is entered: `async with` gives an EngineCoreClient, `with` a BlockingClient.

    Leaving the block, also by an error, a cancellation or Ctrl-C, ends a scoped pool and leaves a detached one.
    """

    def __init__(self, config: PoolConfig, routing: Routing) -> None:
        self._config = config
        self._routing = routing
        self._driver = PoolDriver(config)
        self._client: EngineCoreClient | None = None
        self._blocking: BlockingClient | None = None
        # Collected or forgotten until the interpreter exits, the pool ends all the same.
        self._finalizer = weakref.finalize(self, self._driver.abandon)

    async def __aenter__(self) -> EngineCoreClient:
        access = await self._driver.open()
        try:
            self._client = await self._make_client(access)
        except BaseException:
            await asyncio.shield(self._driver.close())
            raise
        return self._client

    async def __aexit__(self, _kind: type[BaseException] | None, _error: BaseException | None, _trace: TracebackType | None) -> None:
        await asyncio.shield(self._leave())

    def __enter__(self) -> BlockingClient:
        self._driver.acquire_ray()
        access = run_blocking(self._driver.open())
        try:
            self._blocking = BlockingClient(lambda: self._make_client(access))
        except BaseException:
            run_blocking(self._driver.close())
            raise
        return self._blocking

    def __exit__(self, _kind: type[BaseException] | None, _error: BaseException | None, _trace: TracebackType | None) -> None:
        try:
            if self._blocking is not None:
                self._blocking.close()
        finally:
            run_blocking(self._driver.close())

    async def _make_client(self, access: PoolAccess) -> EngineCoreClient:
        return await _start_client(access, self._routing, keep_alive=self)

    async def _leave(self) -> None:
        try:
            if self._client is not None:
                await self._client.aclose()
        finally:
            await self._driver.close()


class Connection:
    """A client of a pool that runs; used like `Launch`. Leaving the block leaves the pool as it is."""

    def __init__(self, pool: str, timeouts: Timeouts | None, client: str | None, routing: Routing) -> None:
        self._pool = pool
        self._routing = routing
        self._timeouts = timeouts
        self._name = client
        self._client: EngineCoreClient | None = None
        self._blocking: BlockingClient | None = None

    async def __aenter__(self) -> EngineCoreClient:
        ensure_ray()
        try:
            self._client = await self._connect()
        except BaseException:
            release_ray()
            raise
        return self._client

    async def __aexit__(self, _kind: type[BaseException] | None, _error: BaseException | None, _trace: TracebackType | None) -> None:
        try:
            if self._client is not None:
                await asyncio.shield(self._client.aclose())
        finally:
            release_ray()

    def __enter__(self) -> BlockingClient:
        ensure_ray()
        try:
            self._blocking = BlockingClient(self._connect)
        except BaseException:
            release_ray()
            raise
        return self._blocking

    def __exit__(self, _kind: type[BaseException] | None, _error: BaseException | None, _trace: TracebackType | None) -> None:
        try:
            if self._blocking is not None:
                self._blocking.close()
        finally:
            release_ray()

    async def _connect(self) -> EngineCoreClient:
        endpoints.sweep(self._pool)
        tensors.sweep(self._pool)
        access = await pool_access(self._pool)
        if self._timeouts is not None:
            access = msgspec.structs.replace(access, timeouts=self._timeouts)
        return await _start_client(access, self._routing, keep_alive=None, name=self._name)


def launch(**config: Any) -> Launch:
    """A pool with the fields of `raycore.config.PoolConfig`; nothing starts before its block is entered.

    A `router` that is an object routes for the client of this block only.
    """
    router = config.get("router")
    if router is None or isinstance(router, str):
        parsed = parse_config(config)
        make_router(parsed.router, parsed.router_options)  # what is wrong with it is said here and not when the pool has come up
        _check_autoscaling(parsed)
        return Launch(parsed, Routing())
    own = {name: value for name, value in config.items() if name not in ("router", "router_options")}
    make_router(router, config.get("router_options"))
    parsed = parse_config(own)
    _check_autoscaling(parsed)
    return Launch(parsed, Routing(router, config.get("router_options")))


def _check_autoscaling(config: PoolConfig) -> None:
    if config.autoscaling is not None:
        Autoscaling.parse(config.autoscaling)


def connect(pool: str, *, timeouts: Timeouts | None = None, client: str | None = None, routing: Routing | None = None) -> Connection:
    """A running pool by its name; PoolNotFoundError when the block is entered and there is none. Limits are the pool's own.

    `client`: what engines and logs call this client.
    """
    return Connection(pool, timeouts, client, routing or Routing())


def pool_status(pool: str) -> dict[str, Any]:
    """What the pool's controller says of its members, loads and departures, and what its client actors say of themselves."""

    async def ask() -> dict[str, Any]:
        controller = await find_actor(controller_name(pool))
        found = await remote_call(controller.status.remote(), limit_s=Timeouts().control_s, what=f"pool {pool!r}: status")
        return {**found, "clients": await client_statuses(pool)}

    return _once(ask())


def scale_pool(pool: str, data_parallel_size: int) -> ScalingReport:
    """Grow or shrink a running pool; a bar of the weights that are copied where a person watches."""
    control = RayControlPlane(pool, Timeouts())

    async def scale() -> ScalingReport:
        async with CopyView(pool, control.status).shown():
            return await control.scale(data_parallel_size)

    return _once(scale())


def shrink_pool(pool: str, ranks: Sequence[int]) -> ScalingReport:
    """Let chosen ranks of a running pool leave."""
    return _once(RayControlPlane(pool, Timeouts()).remove_ranks(tuple(ranks)))


def set_autoscaling(pool: str, settings: Autoscaling | None) -> None:
    """Have a running pool scale itself; None: no more."""

    async def tell() -> None:
        controller = await find_actor(controller_name(pool))
        await remote_call(controller.autoscale.remote(settings), limit_s=Timeouts().control_s, what=f"pool {pool!r}: autoscale")

    _once(tell())


def cancel_scaling(pool: str) -> str:
    """Undo the running scaling operation; its id. PoolError when there is none that can be undone."""

    async def cancel() -> str:
        controller = await find_actor(controller_name(pool))
        limit_s = Timeouts().control_s
        found = await remote_call(controller.status.remote(), limit_s=limit_s, what=f"pool {pool!r}: status")
        last = next(iter(found["operations"]), None)
        if last is not None and await remote_call(
            controller.cancel_operation.remote(last["operation"]), limit_s=limit_s, what=f"pool {pool!r}: cancel"
        ):
            return last["operation"]
        state = "none was begun" if last is None else f"operation {last['operation']} is in {last['phase']}"
        message = f"pool {pool!r} has no scaling operation that can be undone: {state}"
        raise PoolError(message)

    return _once(cancel())


def _once(question: Coroutine[Any, Any, Answer]) -> Answer:
    """Ask a running pool something, from code without an event loop."""
    ensure_ray()
    try:
        return run_blocking(question)
    finally:
        release_ray()


async def _start_client(access: PoolAccess, routing: Routing, *, keep_alive: object, name: str | None = None) -> EngineCoreClient:
    control = RayControlPlane(access.membership.pool, access.timeouts, keep_alive=keep_alive)
    tokenizer = await asyncio.to_thread(_tokenizer_of, access)
    links = SocketLinks(access, access.limits)
    client = EngineCoreClient(access, control, links, tokenizer=tokenizer, routing=routing, name=name, metrics=metrics_of(access))
    await client.start()
    return client


def _tokenizer_of(access: PoolAccess) -> Tokenizer | None:
    """The model's tokenizer where this host has it; a client without one takes and gives token ids."""
    try:
        return load_tokenizer(access.model)
    except (RaycoreError, OSError) as error:
        logger.warning("pool %s: no tokenizer here: %s", access.membership.pool, error)
        return None
