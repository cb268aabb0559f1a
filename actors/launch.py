"""`launch` and `connect`: pools as context managers, for code with an event loop and without."""

from __future__ import annotations

import asyncio
import logging
import weakref
from types import TracebackType
from typing import Any

import msgspec

from actors.blocking import run_blocking
from actors.control_plane import RayControlPlane, find_actor, pool_access
from actors.driver import PoolDriver
from actors.local_ray import ensure_ray, release_ray
from actors.naming import controller_name
from actors.remote import remote_call
from raycore import tensors
from raycore.client.blocking import BlockingClient
from raycore.client.client import EngineCoreClient
from raycore.client.control import PoolAccess
from raycore.client.links import SocketLinks
from raycore.config import PoolConfig, Timeouts, parse_config
from raycore.errors import RaycoreError
from raycore.tokenizer import Tokenizer, load_tokenizer
from raycore.transport import endpoints

logger = logging.getLogger(__name__)


class Launch:
    """A pool that starts when its block is entered: `async with` gives an EngineCoreClient, `with` a BlockingClient.

    Leaving the block, also by an error, a cancellation or Ctrl-C, ends a scoped pool and leaves a detached one.
    """

    def __init__(self, config: PoolConfig) -> None:
        self._config = config
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
        return await _start_client(access, keep_alive=self)

    async def _leave(self) -> None:
        try:
            if self._client is not None:
                await self._client.aclose()
        finally:
            await self._driver.close()


class Connection:
    """A client of a pool that runs; used like `Launch`. Leaving the block leaves the pool as it is."""

    def __init__(self, pool: str, timeouts: Timeouts | None) -> None:
        self._pool = pool
        self._timeouts = timeouts
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
        return await _start_client(access, keep_alive=None)


def launch(**config: Any) -> Launch:
    """A pool with the fields of `raycore.config.PoolConfig`; nothing starts before its block is entered."""
    return Launch(parse_config(config))


def connect(pool: str, *, timeouts: Timeouts | None = None) -> Connection:
    """A running pool by its name; PoolNotFoundError when the block is entered and there is none. Limits are the pool's own."""
    return Connection(pool, timeouts)


def pool_status(pool: str) -> dict[str, Any]:
    """What the pool's controller says of its members, loads and departures."""

    async def ask() -> dict[str, Any]:
        controller = await find_actor(controller_name(pool))
        return await remote_call(controller.status.remote(), limit_s=Timeouts().control_s, what=f"pool {pool!r}: status")

    ensure_ray()
    try:
        return run_blocking(ask())
    finally:
        release_ray()


async def _start_client(access: PoolAccess, *, keep_alive: object) -> EngineCoreClient:
    control = RayControlPlane(access.membership.pool, access.timeouts, keep_alive=keep_alive)
    tokenizer = await asyncio.to_thread(_tokenizer_of, access)
    client = EngineCoreClient(access, control, SocketLinks(access, access.limits), tokenizer=tokenizer)
    await client.start()
    return client


def _tokenizer_of(access: PoolAccess) -> Tokenizer | None:
    """The model's tokenizer where this host has it; a client without one takes and gives token ids."""
    try:
        return load_tokenizer(access.model)
    except (RaycoreError, OSError) as error:
        logger.warning("pool %s: no tokenizer here: %s", access.membership.pool, error)
        return None
