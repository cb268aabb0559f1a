"""Nodes that Ray is about to take away (spot instances, scale-down): their ranks move to other nodes while they still serve."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Iterable, Sequence
from typing import Protocol

import ray.exceptions

from actors.fleet import EngineRecord
from actors.nodes import draining_nodes
from raycore.ids import EngineId

logger = logging.getLogger(__name__)

_POLL_S = 1.0
"""A cloud says so half a minute or more before."""
_AGAIN_S = 15.0
"""Ranks that could not be moved are tried again after so long: there may be room by then."""


class Standbys(Protocol):
    """What is warm on nodes."""

    def leave(self, node_ids: set[str]) -> None:
        """Have none on these nodes."""
        ...


class NodeWatch:
    """Asks Ray; `evacuate` is given members on nodes that it drains."""

    def __init__(
        self,
        pool: str,
        members: Callable[[], Iterable[EngineRecord]],
        standbys: Standbys,
        evacuate: Callable[[Sequence[EngineId]], Awaitable[None]],
    ) -> None:
        self._pool = pool
        self._members = members
        self._standbys = standbys
        self._evacuate = evacuate
        self._not_before_s: dict[EngineId, float] = {}

    async def run(self) -> None:
        """Until cancelled."""
        while True:
            await asyncio.sleep(_POLL_S)
            try:
                draining = await asyncio.to_thread(draining_nodes)
            except (ray.exceptions.RayError, RuntimeError, OSError) as error:
                logger.info("pool %s: Ray does not say which nodes it drains: %s", self._pool, error)
                continue
            if draining:
                await self._on_draining(draining)

    async def _on_draining(self, draining: set[str]) -> None:
        self._standbys.leave(draining)
        now_s = asyncio.get_running_loop().time()
        due = [
            record.engine
            for record in self._members()
            if record.node_id in draining and now_s >= self._not_before_s.get(record.engine, now_s)
        ]
        if due:
            logger.warning("pool %s: Ray drains the nodes of %s", self._pool, ", ".join(map(str, due)))
            self._not_before_s = dict.fromkeys(due, now_s + _AGAIN_S)
            await self._evacuate(due)
