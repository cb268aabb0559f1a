"""The coordinator: hears beats, publishes snapshots, wakes ranks that a wave left behind; keeps nothing that it could not hear again."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable
from typing import final

from raycore.board import PUBLISH_INTERVAL_S, Board
from raycore.errors import RaycoreError
from raycore.ids import EngineId
from raycore.membership import Member, Membership
from raycore.messages import Snapshot
from raycore.transport.beats import BeatPublisher, BeatSubscriber
from raycore.transport.coordinator_sockets import CoordinatorSockets
from raycore.transport.endpoints import this_host
from raycore.transport.peers import PeerSender

logger = logging.getLogger(__name__)

_ASK_AGAIN_S = 5.0
"""Who tells of changes of the membership may be dead: it is asked for this often."""
_FIRST_ASK_AGAIN_S = 0.5
_LOOK_S = PUBLISH_INTERVAL_S / 2


@final
class Coordinator:
    """Runs on one event loop; `find` gives the membership from whoever of the pool answers."""

    def __init__(
        self, membership: Membership, sockets: CoordinatorSockets, keys: tuple[str, str], find: Callable[[], Awaitable[Membership]]
    ) -> None:
        self._membership = membership
        self._sockets = sockets
        self._keys = keys
        self._find = find
        self._board = Board()
        self._peers = PeerSender(sockets.context, client_public_key=keys[0], client_secret_key=keys[1])
        self._subscribers: dict[EngineId, BeatSubscriber] = {}
        self._publisher = BeatPublisher(sockets.publishers)
        self._tasks: list[asyncio.Task[None]] = []

    @property
    def membership(self) -> Membership:
        """The newest that it was told."""
        return self._membership

    def start(self) -> None:
        """Begin; the event loop runs."""
        self._loop = asyncio.get_running_loop()
        self._tasks = [self._loop.create_task(self._look()), self._loop.create_task(self._ask())]

    def set_membership(self, membership: Membership) -> None:
        """Hear these members, if this is news."""
        if not membership.supersedes(self._membership):
            return
        self._membership = membership
        for engine in [engine for engine in self._subscribers if not membership.has(engine)]:
            self._forget(engine)
        for member in membership.members:
            if member.engine not in self._subscribers:
                self._hear(member)
        self._board.set_members(member.engine for member in membership.members)
        self._peers.set_peers({member.engine: member.endpoints for member in membership.members if member.info.sync_interval})

    def snapshot(self) -> Snapshot:
        """The board as it is, for whoever asks."""
        return self._board.snapshot(time.monotonic())

    async def close(self) -> None:
        """Release everything."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        for engine in list(self._subscribers):
            self._forget(engine)
        self._peers.close()
        self._sockets.close()

    def _hear(self, member: Member) -> None:
        subscriber = BeatSubscriber(
            member.endpoints,
            use_tcp=member.endpoints.host != this_host(),
            client_public_key=self._keys[0],
            client_secret_key=self._keys[1],
            context=self._sockets.context,
        )
        self._subscribers[member.engine] = subscriber
        self._loop.add_reader(subscriber.fileno(), self._take, subscriber)

    def _forget(self, engine: EngineId) -> None:
        subscriber = self._subscribers.pop(engine)
        self._loop.remove_reader(subscriber.fileno())
        subscriber.close()

    def _take(self, subscriber: BeatSubscriber) -> None:
        """Take in what one engine said, wake whom it leaves behind, and publish what is due: that is looked at however much comes in."""
        now_s = time.monotonic()
        for beat in subscriber.drain():
            for engine, wake in self._board.hear(beat, now_s):
                self._peers.send_to([engine], wake)
        self._publish(now_s)

    def _publish(self, now_s: float) -> None:
        snapshot = self._board.due(now_s)
        if snapshot is not None:
            self._publisher.publish(snapshot)

    async def _look(self) -> None:
        """ZeroMQ's descriptor is edge-triggered, and a quiet board is published too."""
        while True:
            await asyncio.sleep(_LOOK_S)
            for subscriber in list(self._subscribers.values()):
                self._take(subscriber)
            self._publish(time.monotonic())

    async def _ask(self) -> None:
        while True:
            try:
                self.set_membership(await self._find())
            except RaycoreError as error:
                logger.info("coordinator: no membership to be had: %s", error)
            await asyncio.sleep(_ASK_AGAIN_S if self._membership.members else _FIRST_ASK_AGAIN_S)
