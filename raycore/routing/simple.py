"""Policies that know little: in turn, at random, fewest requests, the better of two."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import final

from raycore.routing.ledger import EngineLedger
from raycore.routing.query import Query
from raycore.routing.router import Candidate, Randomness, Ring

_SCAN = 32
_SAMPLE = 16
"""Of fleets that are larger than the first, so many are looked at."""


@final
class RoundRobin:
    """Engines in turn."""

    def __init__(self, random: Randomness) -> None:
        self._turn = int(random.random() * 1024)

    def choose(self, query: Query, ledgers: Sequence[EngineLedger]) -> EngineLedger:
        """The next one."""
        del query
        self._turn += 1
        return ledgers[self._turn % len(ledgers)]

    def reasons(self) -> Sequence[Candidate]:
        """It looks at nothing."""
        return ()


@final
class RandomChoice:
    """Any engine, each as likely."""

    def __init__(self, random: Randomness) -> None:
        self._random = random

    def choose(self, query: Query, ledgers: Sequence[EngineLedger]) -> EngineLedger:
        """One at random."""
        del query
        return ledgers[int(self._random.random() * len(ledgers))]

    def reasons(self) -> Sequence[Candidate]:
        """It looks at nothing."""
        return ()


@final
class LeastRequests:
    """The engine with the fewest requests, all clients' together; of a large fleet the best of a sample."""

    def __init__(self, random: Randomness) -> None:
        self._turn = int(random.random() * 1024)
        self._ring = Ring(random)
        self._rows: Sequence[Candidate] = ()

    def choose(self, query: Query, ledgers: Sequence[EngineLedger]) -> EngineLedger:
        """A scan that starts one further each time."""
        del query
        self._turn += 1
        if len(ledgers) > _SCAN:
            candidates = self._ring.draw(ledgers, _SAMPLE)
        else:
            start = self._turn % len(ledgers)
            candidates = [*ledgers[start:], *ledgers[:start]]
        rows: list[Candidate] = []
        self._rows = rows
        best, least = candidates[0], math.inf
        for ledger in candidates:
            estimate = ledger.known or ledger.estimate()
            live = estimate[3]
            rows.append((estimate, live, 0))
            if live < least:
                best, least = ledger, live
        return best

    def reasons(self) -> Sequence[Candidate]:
        """The score is the number of requests."""
        return self._rows


@final
class TwoChoices:
    """Of two engines drawn at random the one with less work (Mitzenmacher 2001)."""

    def __init__(self, random: Randomness) -> None:
        self._ring = Ring(random)
        self._rows: list[Candidate] = []

    def choose(self, query: Query, ledgers: Sequence[EngineLedger]) -> EngineLedger:
        """Two candidates, or the only one."""
        del query
        candidates = self._ring.draw(ledgers, min(2, len(ledgers)))
        estimates = [ledger.estimate() for ledger in candidates]
        self._rows = [(estimate, estimate[0] * estimate[1], 0) for estimate in estimates]
        return candidates[-1] if self._rows[-1][1] < self._rows[0][1] else candidates[0]

    def reasons(self) -> Sequence[Candidate]:
        """Both."""
        return self._rows
