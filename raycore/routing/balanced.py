"""The default policy: the engine that will have got through its work first, and two choices where other clients choose as well."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import final

from raycore.errors import ConfigurationError
from raycore.routing.ledger import EngineLedger
from raycore.routing.query import Query
from raycore.routing.router import Candidate, Randomness, Ring

_SCAN = 32
"""Up to so many engines are all looked at."""
_SAMPLE = 16
"""Of larger fleets, so many: the best of sixteen is next to the best of all, and a decision costs the same for any number."""
_CHOICES = 2
"""Candidates where other clients choose at the same time: all taking the minimum of the same reports would herd."""
STEP_TOKENS = 8192
"""What engines commonly compute in one step, at most."""
_STEPS_AHEAD = 2
"""The step that runs and the next: what they take in is over by the time that a client could have helped."""
_IN_STEP_WEIGHT = 0.1
"""In lockstep, what an engine has taken in ends with the step that runs, on all engines at once; only a long queue is left of it."""


@final
class WorkBalanced:
    """Least (work + the request's own prefill) x pace.

    With other clients about, of two engines, and what this client sent since the last report counts for every client: they send likewise.
    In lockstep reports come to all clients at once, and whoever follows them follows the others: with other clients about, what was sent
    since counts, which spreads every step's prompts, and of what was reported only what the next steps leave over.
    """

    def __init__(self, random: Randomness, *, clients: int | None = None, step_tokens: int = STEP_TOKENS) -> None:
        """`clients`: how many route to the same engines; None: learned. `step_tokens`: how much prompt a step of lockstep takes in."""
        if step_tokens < 1:
            msg = f"step_tokens must be at least 1, not {step_tokens}"
            raise ConfigurationError(msg)
        self._soon_over = _STEPS_AHEAD * step_tokens
        self._ring = Ring(random)
        self._turn = int(random.random() * 1024)
        self._crowd = Crowd(random, clients)
        self._rows: Sequence[Candidate] = ()
        self._of: Sequence[EngineLedger] | None = None
        self._rotations: list[list[EngineLedger]] = []
        """The fleet begun at each of its engines, made once for a fleet."""

    @property
    def clients(self) -> float:
        """How many clients there seem to be, by their share of the requests."""
        return self._crowd.others + 1.0

    def choose(self, query: Query, ledgers: Sequence[EngineLedger]) -> EngineLedger:
        """A scan that starts one further each time, so that no engine is favoured among equals."""
        count = len(ledgers)
        if count == 1:
            self._rows = ()
            return ledgers[0]
        self._turn = turn = self._turn + 1
        if not turn % LOOK_EVERY:
            self._crowd.look(ledgers)
        others, is_lockstep = self._crowd.others, ledgers[0].steps_together
        candidates: Sequence[EngineLedger]
        if others and count > _CHOICES and not is_lockstep:
            candidates = self._ring.draw(ledgers, _CHOICES)
        elif count > _SCAN:
            candidates = self._ring.draw(ledgers, _SAMPLE)
        else:
            if ledgers is not self._of:
                self._of = ledgers
                self._rotations = [[*ledgers[start:], *ledgers[:start]] for start in range(count)]
            candidates = self._rotations[turn % count]
        own, soon_over = query.prefill, self._soon_over
        best = candidates[0]
        least = math.inf
        rows: list[Candidate] = []
        self._rows = rows
        for ledger in candidates:
            estimate = ledger.known or ledger.estimate()
            if is_lockstep:
                unacked = estimate[5]
                reported = estimate[2] - unacked
                if others:
                    score = (1.0 + others) * unacked + (reported - soon_over if reported > soon_over else 0)
                else:
                    score = estimate[0] - (1.0 - _IN_STEP_WEIGHT) * reported
            else:
                score = (estimate[0] + own + others * estimate[5]) * estimate[1]
            rows.append((estimate, score, 0))
            if score < least:
                best, least = ledger, score
        return best

    def reasons(self) -> Sequence[Candidate]:
        """What the last choice was made by; empty where there was nothing to choose."""
        return self._rows


LOOK_EVERY = 32
"""Decisions between two looks at how many clients there are."""
_ALONE_SHARE = 0.7
"""Having this share of all requests a client is the only one that matters."""
_MOST_OTHERS = 63.0


@final
class Crowd:
    """How many other clients route to the same engines: told, or seen in what engines report beyond this client's own."""

    __slots__ = ("_is_told", "_ring", "others")

    def __init__(self, random: Randomness, clients: int | None) -> None:
        if clients is not None and clients < 1:
            msg = f"clients must be at least 1, not {clients}"
            raise ConfigurationError(msg)
        self.others = 0.0 if clients is None else clients - 1.0
        self._is_told = clients is not None
        self._ring = Ring(random)

    def look(self, ledgers: Sequence[EngineLedger]) -> None:
        """Compare this client's requests with all; in a large fleet on some engines."""
        if self._is_told:
            return
        own = total = 0
        for ledger in ledgers if len(ledgers) <= _SCAN else self._ring.draw(ledgers, _SAMPLE):
            own += ledger.requests
            total += ledger.live
        self.others = 0.0 if own >= _ALONE_SHARE * total else min(total / max(own, 1) - 1.0, _MOST_OTHERS)
