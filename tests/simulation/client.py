"""A client that keeps a journal: what was delivered, where each request is; it counts every token."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from raycore.ids import EngineId
from raycore.membership import Membership

if TYPE_CHECKING:
    from tests.simulation.world import World

_AGAIN_S = 0.05


class _Request:
    def __init__(self, total: int) -> None:
        self.total, self.delivered, self.admission = total, 0, 0
        self.engine: EngineId | None = None


class SimClient:
    """Requests move when their engine is no member any more; a token that is not the next one is a violation."""

    def __init__(self, world: World) -> None:
        self._world = world
        self._membership = Membership("sim")
        self.open: dict[int, _Request] = {}
        self.last_token_s = 0.0
        self.longest_gap_s = 0.0
        self._count = 0

    def ask(self, total: int, membership: Membership) -> None:
        self._hear(membership)
        self._count += 1
        self.open[self._count] = _Request(total)
        self._admit(self._count)

    def take(self, kind: str, engine: EngineId, number: int, admission: int, what: Any) -> None:
        if kind == "membership":
            self._hear(what)
            return
        request = self.open.get(number)
        if request is None or request.admission != admission or request.engine != engine:
            return  # of an admission that is over
        if kind == "refused":
            self._hear(what)
            if self.open.get(number) is request and request.admission == admission:
                self._later(number)
            return
        self._world.check(what == request.delivered, f"request {number}: token {what} came, {request.delivered} was due")
        request.delivered += 1
        if request.delivered == request.total:
            del self.open[number]

    def _hear(self, membership: Membership) -> None:
        if not membership.supersedes(self._membership):
            return
        self._membership = membership
        for number, request in list(self.open.items()):
            if request.engine is not None and not membership.has(request.engine):
                left = self._world.engines[request.engine]
                if left.is_alive:
                    left.abort(number, request.admission)
                self._admit(number)

    def _admit(self, number: int) -> None:
        request = self.open[number]
        request.admission += 1
        serving = [member.engine for member in self._membership.members if self._membership.serves(member.engine)]
        if not serving:
            request.engine = None
            self._later(number)
            return
        request.engine = self._world.random.choice(serving)
        self._world.spawn(self._send(number, request.admission, request.engine))

    async def _send(self, number: int, admission: int, engine: EngineId) -> None:
        await self._world.hop(f"request {number} to {engine}", engine)
        request, found = self.open.get(number), self._world.engines[engine]
        if request is not None and request.admission == admission and found.is_alive:
            found.add(number, admission, request.total, request.delivered)

    def _later(self, number: int) -> None:
        admission = self.open[number].admission

        def again() -> None:
            request = self.open.get(number)
            if request is not None and request.admission == admission:
                self._admit(number)

        self._world.loop.call_later(_AGAIN_S, again)
