"""The reference's rules, to compare with: counts that are overwritten now and then, and a guess in between."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import final

from raycore.routing.ledger import EngineLedger
from raycore.routing.query import Query
from raycore.routing.router import Candidate

REPORT_INTERVAL_S = 0.1
"""How often the reference's coordinator publishes."""
_WAITING_WEIGHT = 4
_KV_WEIGHT = 6.0
_KV_FREE_SHARE = 0.5


@final
class ReferenceRule:
    """`waiting * 4 + running`, both overwritten every 100 ms; a chosen engine's `waiting` is raised by the number of clients."""

    def __init__(self, clock: Callable[[], float], *, clients: int = 1, interval_s: float = REPORT_INTERVAL_S) -> None:
        self._counts = _Counts(clock, interval_s)
        self._clients = clients

    def choose(self, query: Query, ledgers: Sequence[EngineLedger]) -> EngineLedger:
        """The lowest score; the first of equals."""
        del query
        counts = self._counts.of(ledgers)
        at = min(range(len(ledgers)), key=lambda i: counts[i][0] * _WAITING_WEIGHT + counts[i][1])
        counts[at][0] += self._clients
        return ledgers[at]

    def reasons(self) -> Sequence[Candidate]:
        """None are kept: this policy is there to compare with."""
        return ()


@final
class ReferenceFloorRule:
    """Its newer form: at least what this client has in flight, a cache more than half full counts, and ties go round."""

    def __init__(self, clock: Callable[[], float], *, clients: int = 1, interval_s: float = REPORT_INTERVAL_S) -> None:
        self._counts = _Counts(clock, interval_s)
        self._clients = clients
        self._turn = 0

    def choose(self, query: Query, ledgers: Sequence[EngineLedger]) -> EngineLedger:
        """The lowest score; the scan starts one further each time."""
        del query
        counts = self._counts.of(ledgers)
        self._turn += 1
        start, size = self._turn % len(ledgers), len(ledgers)

        def score(step: int) -> float:
            at = (start + step) % size
            waiting, running, kv_share = counts[at]
            floor = max(self._clients * ledgers[at].requests, waiting + running)
            return floor + waiting * _KV_WEIGHT * max(0.0, kv_share - _KV_FREE_SHARE)

        at = (start + min(range(size), key=score)) % size
        counts[at][0] += self._clients
        return ledgers[at]

    def reasons(self) -> Sequence[Candidate]:
        """None are kept: this policy is there to compare with."""
        return ()


@final
class _Counts:
    """[waiting, running, share of the cache] of each engine, as published last."""

    def __init__(self, clock: Callable[[], float], interval_s: float) -> None:
        self._clock = clock
        self._interval_s = interval_s
        self._due_s = 0.0
        self._of: Sequence[EngineLedger] | None = None
        self._counts: list[list[float]] = []

    def of(self, ledgers: Sequence[EngineLedger]) -> list[list[float]]:
        now_s = self._clock()
        if now_s >= self._due_s or ledgers is not self._of:
            self._of = ledgers
            self._due_s = now_s + self._interval_s
            self._counts = [
                [each.load.waiting, each.load.running, each.load.kv_tokens_used / each.kv_capacity if each.kv_capacity else 0.0]
                for each in ledgers
            ]
        return self._counts
