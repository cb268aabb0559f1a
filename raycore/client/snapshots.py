"""The client's ear for the coordinator: the load of engines with which it has no traffic. Nothing waits for it."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Protocol, final

from raycore.board import PUBLISH_INTERVAL_S, QUIET_INTERVAL_S
from raycore.membership import Endpoints
from raycore.messages import Snapshot

_FIND_AGAIN_S = 5.0
_SILENT_S = 3 * QUIET_INTERVAL_S
"""A coordinator that says nothing for so long is dead, and its successor publishes elsewhere."""


class SnapshotSource(Protocol):
    """A subscription to one coordinator's snapshots."""

    def drain(self) -> list[Snapshot]:
        """Every snapshot that has come."""
        ...

    def close(self) -> None:
        """Unsubscribe."""
        ...


@final
class SnapshotWatch:
    """Finds the coordinator, hears it, and looks for it again when it falls silent."""

    def __init__(
        self,
        find: Callable[[], Awaitable[Endpoints | None]],
        connect: Callable[[Endpoints], SnapshotSource | None],
        on_snapshot: Callable[[Snapshot], None],
    ) -> None:
        self._find = find
        self._connect = connect
        self._on_snapshot = on_snapshot

    async def run(self) -> None:
        """Until cancelled."""
        while True:
            endpoints = await self._find()
            source = None if endpoints is None else self._connect(endpoints)
            if source is None:
                await asyncio.sleep(_FIND_AGAIN_S)
                continue
            try:
                await self._hear(source)
            finally:
                source.close()

    async def _hear(self, source: SnapshotSource) -> None:
        clock = asyncio.get_running_loop().time
        heard_s = clock()
        while clock() - heard_s < _SILENT_S:
            await asyncio.sleep(PUBLISH_INTERVAL_S)
            snapshots = source.drain()
            if snapshots:
                heard_s = clock()
                self._on_snapshot(snapshots[-1])
