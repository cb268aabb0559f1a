"""Which engine gets a request: a ledger of estimated remaining work per engine, and the choice over it. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from raycore.engine import EngineLoad
from raycore.ids import EngineId

_FOREIGN_REQUEST_TOKENS = 128
"""What a request of another client is taken to cost while this client has none of its own to compare with."""


class EngineLedger:
    """What one client knows of one engine's work; the session owns it and keeps it exact.

    `tokens`: prompt tokens plus output tokens still expected, of this client's requests there. Raised at dispatch, lowered on outputs,
    ends and deaths.
    `load` and `load_own` are the engine's last report: its totals, and this client's share of them at that moment.
    """

    __slots__ = ("engine", "is_usable", "load", "load_own", "requests", "tokens")

    def __init__(self, engine: EngineId) -> None:
        self.engine = engine
        self.tokens = 0
        self.requests = 0
        self.load = EngineLoad()
        self.load_own = 0
        self.is_usable = False
        """Whether the engine may get new requests now: session open, serving, not suspect."""

    def dispatch(self, cost: int) -> None:
        """A request was sent."""
        self.tokens += cost
        self.requests += 1

    def end(self, cost_left: int) -> None:
        """A request ended; `cost_left` is what of its cost outputs have not lowered."""
        self.tokens -= cost_left
        self.requests -= 1

    def work(self) -> float:
        """Estimated tokens of work, other clients' included."""
        foreign = max(0, self.load.running + self.load.waiting - self.load_own)
        if not foreign:
            return self.tokens
        per_request = self.tokens / self.requests if self.requests else _FOREIGN_REQUEST_TOKENS
        return self.tokens + foreign * per_request


class Router(Protocol):
    """Chooses among ledgers; at least one is given."""

    def choose(self, ledgers: Sequence[EngineLedger]) -> EngineLedger:
        """The engine for the next request."""
        ...


class LeastWork:
    """The engine with the least estimated work; ties go round."""

    def __init__(self) -> None:
        self._turn = 0

    def choose(self, ledgers: Sequence[EngineLedger]) -> EngineLedger:
        """A scan that starts one further each time, so that no engine is favoured among equals."""
        count = len(ledgers)
        if count == 1:
            return ledgers[0]
        start = self._turn % count
        self._turn += 1
        best = ledgers[start]
        least = best.work()
        for step in range(1, count):
            ledger = ledgers[(start + step) % count]
            work = ledger.work()
            if work < least:
                best, least = ledger, work
        return best
