"""A load generator's process: a client of a pool in an actor of its own, on whatever node Ray finds."""

from __future__ import annotations

from typing import Any

import ray

from actors.launch import Connection, connect
from raycore.client.client import EngineCoreClient
from raycore.load import LoadClient, LoadShare, Shot


@ray.remote(num_cpus=0, max_restarts=0, max_task_retries=0)
class LoadActor:
    """Owned by whoever measures, and gone with it."""

    def __init__(self, pool: str, name: str) -> None:
        self._pool = pool
        self._name = name
        self._connection: Connection | None = None
        self._client: EngineCoreClient | None = None

    def __repr__(self) -> str:
        return f"load {self._name} {self._pool}"

    async def open(self, settings: dict[str, Any]) -> None:
        """Join the pool; `settings` as for `connect`."""
        self._connection = connect(self._pool, client=self._name, **settings)
        self._client = await self._connection.__aenter__()

    async def replay(self, shots: list[Shot], begin_at_s: float, drain_limit_s: float) -> LoadShare:
        """Send a share of the trace; what became of it."""
        assert self._client is not None  # noqa: S101 -- `open` comes first
        return await LoadClient(self._client, drain_limit_s=drain_limit_s).replay(shots, begin_at_s)

    async def close(self) -> None:
        """Leave the pool."""
        if self._connection is not None:
            await self._connection.__aexit__(None, None, None)
