"""Standbys: engine cores that are warm and no members. Scaling and recovery take them; they are made again in the background."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

import ray.exceptions

from actors.fleet import EngineRecord, Fleet
from actors.remote import death_cause
from raycore.errors import CapacityError, RaycoreError
from raycore.ids import EngineId, Rank

logger = logging.getLogger(__name__)

_RETRY_S = 5.0
"""After a standby could not be made: the cluster was full, or the engine does not start."""


class StandbyKeeper:
    """Keeps `count` of them; all on the controller's event loop."""

    def __init__(
        self,
        pool: str,
        count: int,
        fleet: Fleet,
        planned_nodes: Callable[[int], Awaitable[Sequence[str]]],
        members: Callable[[], Sequence[EngineRecord]],
    ) -> None:
        """`members`: who gives a new standby its weights, where it is to have them."""
        self._members = members
        self._pool = pool
        self._count = count
        self._fleet = fleet
        self._planned_nodes = planned_nodes
        self._ready: list[EngineRecord] = []
        self._watches: dict[str, asyncio.Task[None]] = {}
        self._endings: set[asyncio.Task[None]] = set()
        self._wanted = asyncio.Event()
        self._may_make = asyncio.Event()
        self._may_make.set()
        self._keeping: asyncio.Task[None] | None = None
        self._problem = ""
        self._making: asyncio.Task[EngineRecord] | None = None
        self._is_taking = False
        """The one that is being made is at its weights."""
        self._is_over = False

    def start(self) -> None:
        """Begin to make them."""
        if self._count and self._keeping is None:
            self._wanted.set()
            self._keeping = asyncio.create_task(self._keep())
            self._keeping.add_done_callback(self._ended)

    def take(self, ranks: Sequence[Rank]) -> dict[Rank, EngineRecord]:
        """Standbys for these ranks, as far as there are any; they belong to the caller from now on, who starts them."""
        taken: dict[Rank, EngineRecord] = {}
        for rank in ranks[: len(self._ready)]:
            record = self._ready.pop(0)
            self._watches.pop(record.name).cancel()
            record.engine = EngineId(rank, record.engine.incarnation)
            taken[rank] = record
        self._wanted.set()
        return taken

    def take_back(self, records: Sequence[EngineRecord]) -> None:
        """What was taken and not started is a standby again."""
        for record in records:
            record.engine = EngineId(Rank(0), record.engine.incarnation)
            self._keep_warm(record)

    @property
    def warm(self) -> int:
        """How many there are now."""
        return len(self._ready)

    def leave(self, node_ids: set[str]) -> None:
        """Have none on these nodes, which Ray takes away."""
        for record in [record for record in self._ready if record.node_id in node_ids]:
            self._watches.pop(record.name).cancel()
            self._put_away(record)

    def hold(self) -> None:
        """Make none for now: what is free in the cluster is for an operation, and so are the members where they give to one at a time."""
        self._may_make.clear()
        if self._making is not None and self._is_taking and self._fleet.takes_turns:
            self._making.cancel()

    def release(self) -> None:
        """Go on making them."""
        if not self._is_over:
            self._may_make.set()

    def end(self) -> None:
        """Make none any more: the pool ends, which closes this."""
        self._is_over = True
        self._may_make.clear()

    async def close(self) -> None:
        """Nothing of any standby is left."""
        if self._keeping is not None:
            self._keeping.cancel()
            await asyncio.gather(self._keeping, return_exceptions=True)
        ready, self._ready = self._ready, []
        for watch in self._watches.values():
            watch.cancel()
        await asyncio.gather(*self._watches.values(), return_exceptions=True)
        await asyncio.gather(*self._endings, *(self._fleet.dispose(record) for record in ready))

    def status(self) -> list[dict[str, Any]]:
        """For people: those that are warm; `problem`: why there are not as many as there should be."""
        rows = [{"pid": r.pid, "node_id": r.node_id, "placement_group": r.group_id, "state": "warm", "problem": ""} for r in self._ready]
        missing = self._count - len(rows)
        return rows + [{"pid": 0, "node_id": "", "placement_group": "", "state": "missing", "problem": self._problem}] * missing

    async def _keep(self) -> None:
        while True:
            await self._wanted.wait()
            await self._may_make.wait()
            if len(self._ready) >= self._count:
                self._wanted.clear()
                continue
            try:
                (node_id,) = await self._planned_nodes(1)
                if not self._may_make.is_set():  # what has become free is for the operation that has begun
                    continue
                record = await self._make(node_id)
                if record is None:
                    continue
            except (RaycoreError, ray.exceptions.RayError) as error:
                problem = f"{error}"
                log = logger.info if isinstance(error, CapacityError) or problem == self._problem else logger.error
                log("pool %s has no further standby: %s", self._pool, problem)
                self._problem = problem
                await asyncio.sleep(_RETRY_S)
                continue
            self._problem = ""
            self._keep_warm(record)

    async def _make(self, node_id: str) -> EngineRecord | None:
        """A further one; None where an operation has taken its turn."""
        self._is_taking = False
        making = self._making = asyncio.create_task(self._fleet.start_standby(node_id, self._members, self._may_take))
        try:
            await asyncio.wait([making])
        except asyncio.CancelledError:
            making.cancel()
            await asyncio.wait([making])
            raise
        finally:
            self._making = None
        return None if making.cancelled() else making.result()

    async def _may_take(self) -> None:
        """Before it takes weights of members."""
        await self._may_make.wait()
        self._is_taking = True

    def _ended(self, keeping: asyncio.Task[None]) -> None:
        if not keeping.cancelled() and (error := keeping.exception()) is not None:
            logger.error("pool %s makes no standbys any more", self._pool, exc_info=error)

    def _keep_warm(self, record: EngineRecord) -> None:
        self._ready.append(record)
        self._watches[record.name] = asyncio.create_task(self._watch(record))

    async def _watch(self, record: EngineRecord) -> None:
        """A standby that dies is put away, and another one is made."""
        while True:
            try:
                await record.handle.wait_closed.remote()
                cause = "it ended"
            except ray.exceptions.ActorUnavailableError:
                await asyncio.sleep(_RETRY_S)
                continue
            except ray.exceptions.RayError as error:
                cause = death_cause(error)
            break
        logger.warning("a standby of pool %s is lost: %s", self._pool, cause)
        self._watches.pop(record.name, None)
        self._put_away(record)

    def _put_away(self, record: EngineRecord) -> None:
        with contextlib.suppress(ValueError):
            self._ready.remove(record)
        ending = asyncio.create_task(self._fleet.dispose(record))
        self._endings.add(ending)
        ending.add_done_callback(self._endings.discard)
        self._wanted.set()
