"""The Router Protocol: one request and the engines that may get it in, one of them out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, final

from raycore.routing.ledger import EngineLedger, Estimate
from raycore.routing.query import Query

Candidate = tuple[Estimate, float, int]
"""An engine that was looked at: what was known of it, the score (the lowest wins), prompt tokens that it is taken to have cached."""


class Router(Protocol):
    """Chooses among ledgers. Pure: what is random or tells the time is handed in."""

    def choose(self, query: Query, ledgers: Sequence[EngineLedger]) -> EngineLedger:
        """The engine for this request; at least one ledger is given, and one of them must be returned."""
        ...

    def reasons(self) -> Sequence[Candidate]:
        """What the last choice was made by; empty for a policy that does not look. The list is not changed afterwards."""
        ...


class Randomness(Protocol):
    """What a policy takes of `random.Random`."""

    def random(self) -> float:
        """Uniform in [0, 1)."""
        ...


@final
class Ring:
    """Draws candidates so that each engine comes up once a round, in an order that no other client shares."""

    __slots__ = ("_at", "_order", "_random", "_source")

    def __init__(self, random: Randomness) -> None:
        self._random = random
        self._source: Sequence[EngineLedger] | None = None
        self._order: list[EngineLedger] = []
        self._at = 0

    def draw(self, ledgers: Sequence[EngineLedger], count: int) -> list[EngineLedger]:
        """So many of them, `count` being at most all; one step of a shuffle each, so that a large fleet costs no more."""
        if ledgers is not self._source:
            self._source, self._order, self._at = ledgers, list(ledgers), 0
        order, at, size = self._order, self._at, len(self._order)
        if at + count > size:
            at = 0
        random = self._random.random
        for place in range(at, at + count):
            other = place + int(random() * (size - place))
            order[place], order[other] = order[other], order[place]
        self._at = at + count
        return order[at : at + count]
