"""Ranks that serve, as a joiner's `WeightPeer`s, in threads of this process; the groups between them are real Gloo ones."""

from __future__ import annotations

import concurrent.futures
import threading
from collections.abc import Callable, Sequence
from typing import Any

from raycore.config import Timeouts
from raycore.core.weight_giving import WeightGiving
from raycore.core.weight_taking import WeightTaking
from raycore.engine import Engine
from raycore.groups import ProcessGroup
from raycore.ids import EngineId, Incarnation, Rank
from raycore.load_progress import WeightMeter
from raycore.pool_state import PoolState
from raycore.weight_copies import LentWeights, Spans, WeightOffer, WeightRequest, WeightTerms

HOST = "here"
LIMITS = Timeouts(group_s=20.0, collective_s=20.0, control_s=20.0)
JOINER = EngineId(Rank(9), Incarnation("j"))

Wrap = Callable[[ProcessGroup], Any]
"""What a fault makes of a sender's group."""


class Peer:
    """One engine that gives. `wrap`: of its group in the first round."""

    def __init__(self, rank: int, engine: Engine, wrap: Wrap | None = None, limits: Timeouts = LIMITS) -> None:
        self.engine = EngineId(Rank(rank), Incarnation("p"))
        self.host = HOST
        self.state = PoolState()
        self.sent: list[int | BaseException] = []
        """What became of each round."""
        self._engine = engine
        self._wrap = wrap
        self._giving = WeightGiving(self.engine, engine, self, node_ip="127.0.0.1", device="cpu", timeouts=limits)

    def ask(self, question: Callable[[], LentWeights | None]) -> concurrent.futures.Future[Any]:
        def answer() -> LentWeights | None:
            lent = question()
            wrap, self._wrap = (self._wrap, None) if self._asked_to_give else (None, self._wrap)
            return lent if wrap is None or lent is None else _Faulty(lent, wrap)

        return done(answer)

    def pool_state(self) -> concurrent.futures.Future[PoolState]:
        return done(lambda: self.state)

    _asked_to_give = False

    def offer(self) -> concurrent.futures.Future[WeightOffer | None]:
        return done(self._giving.offer)

    def terms(self) -> concurrent.futures.Future[WeightTerms | None]:
        return done(self._giving.terms)

    def give(self, request: WeightRequest) -> concurrent.futures.Future[int]:
        self._asked_to_give = True
        future: concurrent.futures.Future[int] = concurrent.futures.Future()

        def work() -> None:
            try:
                sent = self._giving.give(request)
            except BaseException as error:  # noqa: BLE001 -- the joiner's to judge
                self.sent.append(error)
                future.set_exception(error)
            else:
                self.sent.append(sent)
                future.set_result(sent)

        threading.Thread(target=work, daemon=True).start()
        return future


class _Faulty:
    def __init__(self, lent: LentWeights, wrap: Wrap) -> None:
        self.manifest, self.task, self.files = lent.manifest, lent.task, lent.files
        self._lent, self._wrap = lent, wrap

    def give(self, group: ProcessGroup, shares: Sequence[Spans], portion_bytes: int) -> int:
        return self._lent.give(self._wrap(group), shares, portion_bytes)


def done(function: Callable[[], Any]) -> concurrent.futures.Future[Any]:
    future: concurrent.futures.Future[Any] = concurrent.futures.Future()
    try:
        future.set_result(function())
    except Exception as error:  # noqa: BLE001 -- carried to whoever waits
        future.set_exception(error)
    return future


class DyingGroup:
    """The connections of a process that is killed after so many exchanges."""

    def __init__(self, group: ProcessGroup, exchanges: int) -> None:
        self._group, self._left = group, exchanges
        self.rank, self.size = group.rank, group.size

    def all_to_all(self, *exchange: Any) -> None:
        if not self._left:
            self._group.close()
            raise RuntimeError("killed")
        self._left -= 1
        self._group.all_to_all(*exchange)


class FlippingGroup(DyingGroup):
    """One bit of what is sent in exchange `exchanges` is another one on the way."""

    def all_to_all(self, received: Any, sent: Any, *rows: Any) -> None:
        if not self._left:
            sent[len(sent) // 2] ^= 1
        self._left -= 1
        self._group.all_to_all(received, sent, *rows)


class FrozenGroup(DyingGroup):
    """A process that stops after so many exchanges and never goes on."""

    def all_to_all(self, *exchange: Any) -> None:
        if not self._left:
            threading.Event().wait()
        self._left -= 1
        self._group.all_to_all(*exchange)


def taking_from(*peers: Peer, meter: WeightMeter | None = None, portion_bytes: int = 4096, limits: Timeouts = LIMITS) -> WeightTaking:
    return WeightTaking(
        JOINER,
        peers,
        meter or WeightMeter(),
        node_ip="127.0.0.1",
        host=HOST,
        device="cpu",
        timeouts=limits,
        portion_bytes=portion_bytes,
    )
