"""What one client knows of one engine's work: its own dispatches exactly, the rest from the engine's reports."""

from __future__ import annotations

import math
from collections import deque
from typing import final

from raycore.engine import EngineLoad
from raycore.ids import EngineId
from raycore.routing.book import LedgerBook
from raycore.routing.work import KV_TOKEN_UNITS, SEQUENCE_UNITS

Estimate = tuple[float, float, int, int, int, int, EngineId]
"""`work` units, relative `pace`, `prefill` tokens waiting, `live` requests, `kv` tokens wanted, `unacked` tokens, the engine."""

PAUSED_UNITS = 1e12
"""A paused engine gets work only when all are paused."""
KV_FULL_SHARE = 0.95
"""Above this share of the cache an engine is about to make requests wait for room."""
KV_OVERFLOW_UNITS = 1.0
"""Each token for which there is no room waits until running requests have let go of as much."""


@final
class EngineLedger:
    """Work is raised at dispatch and lowered by first tokens and ends; a report replaces only what the engine had taken in by then.

    The counts only grow, so that every order of dispatches, outputs and reports gives one truth:

        the engine's total at its last report + what was sent and is not in it - what has been done since.
    """

    __slots__ = (
        "_acked_prefill",
        "_acked_requests",
        "_begun_at_report",
        "_begun_prefill",
        "_book",
        "_ended_at_report",
        "_ended_requests",
        "_full_tokens",
        "_pace",
        "_sent_frames",
        "_sent_prefill",
        "_sent_requests",
        "engine",
        "full_until_s",
        "is_paused",
        "is_usable",
        "known",
        "kv_capacity",
        "load",
        "steps_together",
    )

    def __init__(self, engine: EngineId, book: LedgerBook | None = None, *, kv_capacity: int = 0, steps_together: bool = False) -> None:
        self.engine = engine
        self.kv_capacity = kv_capacity
        """Tokens that the engine's cache holds; 0: unknown, never taken to be full."""
        self.steps_together = steps_together
        """In lockstep with the others: all begin and end their steps at once."""
        self.load = EngineLoad()
        self.is_paused = False
        self.full_until_s = 0.0
        """It refused a request because too much waits there, and need not be asked again before."""
        self.is_usable = False
        """Whether the engine may get new requests now: session open, serving, not suspect."""
        self._book = book or LedgerBook()
        self._pace = 1.0
        self._full_tokens = KV_FULL_SHARE * kv_capacity if kv_capacity else math.inf
        self._sent_requests = 0
        self._sent_prefill = 0
        self._ended_requests = 0
        self._begun_prefill = 0
        self._acked_requests = 0
        self._acked_prefill = 0
        self._ended_at_report = 0
        self._begun_at_report = 0
        self._sent_frames: deque[tuple[int, int, int]] = deque()
        self.known: Estimate | None = None
        """The estimate, while nothing has changed since it was made."""

    # -- this client's own -------------------------------------------------------------------------------------------------

    def dispatch(self, prefill: int) -> None:
        """A request was handed to the session; the engine has `prefill` tokens to compute before its next one."""
        self._sent_requests += 1
        self._sent_prefill += prefill
        self.known = None

    def sent(self, seq: int) -> None:
        """All that was dispatched so far has left in frames up to `seq`."""
        frames = self._sent_frames
        if not frames or frames[-1][1] != self._sent_requests:
            frames.append((seq, self._sent_requests, self._sent_prefill))

    def begin(self, prefill: int) -> None:
        """A request got its first token since dispatch: its `prefill` tokens are done."""
        self._begun_prefill += prefill
        self.known = None

    def end(self, prefill_left: int) -> None:
        """A request is over or gone; `prefill_left`: its share of dispatched prefill that no `begin` has taken off."""
        self._ended_requests += 1
        self._begun_prefill += prefill_left
        self.known = None

    @property
    def requests(self) -> int:
        """This client's requests on the engine."""
        return self._sent_requests - self._ended_requests

    @property
    def prefill(self) -> int:
        """This client's prefill tokens outstanding on the engine."""
        return self._sent_prefill - self._begun_prefill

    # -- reports -----------------------------------------------------------------------------------------------------------

    def report(self, load: EngineLoad, ack: int, unit_ns: int = 0, *, is_paused: bool = False) -> None:
        """The engine's totals when it had taken in frames up to `ack`, and its pace; after the outputs that came with it."""
        frames = self._sent_frames
        while frames and frames[0][0] <= ack:
            _, self._acked_requests, self._acked_prefill = frames.popleft()
        self.load = load
        self._ended_at_report = self._ended_requests
        self._begun_at_report = self._begun_prefill
        self.is_paused = is_paused
        if unit_ns:
            self._pace = self._book.relative_pace(unit_ns)
        self.known = None

    def snapshot(self, load: EngineLoad) -> None:
        """Totals from elsewhere, of an engine with which this client has no traffic; ignored where it has, since it knows better."""
        if self._sent_requests == self._ended_requests:
            self.load = load
            self._sent_frames.clear()  # what was sent is over, so no total has to be corrected for it
            self._acked_requests = self._ended_at_report = self._sent_requests
            self._acked_prefill = self._begun_at_report = self._sent_prefill
            self.known = None

    @property
    def unacked_prefill(self) -> int:
        """Tokens dispatched that no report includes yet."""
        return self._sent_prefill - self._acked_prefill

    @property
    def waiting_prefill(self) -> int:
        """Prompt tokens that the engine has still to compute, all clients' together."""
        waiting = self.load.prefill_tokens_waiting + self.unacked_prefill - self._begun_prefill + self._begun_at_report
        return max(waiting, 0)

    @property
    def live(self) -> int:
        """Requests on the engine, all clients' together; never fewer than this client's own."""
        load = self.load
        total = load.running + load.waiting + self._sent_requests - self._acked_requests - self._ended_requests + self._ended_at_report
        return max(total, self.requests)

    # -- what it comes to --------------------------------------------------------------------------------------------------

    def estimate(self) -> Estimate:
        """The engine's work now."""
        if self.known is not None:
            return self.known
        load = self.load  # written out, without `live`, `waiting_prefill` and `max`: this is the larger part of what a decision costs
        unacked = self._sent_prefill - self._acked_prefill
        prefill = load.prefill_tokens_waiting + unacked - self._begun_prefill + self._begun_at_report
        if prefill < 0:  # noqa: PLR1730
            prefill = 0
        own = self._sent_requests - self._ended_requests
        live = load.running + load.waiting + own - self._acked_requests + self._ended_at_report
        if live < own:  # noqa: PLR1730
            live = own
        held = load.kv_tokens_used
        work = prefill + self._book.horizon_steps * (SEQUENCE_UNITS * live + KV_TOKEN_UNITS * held)
        wanted = held + prefill
        if wanted > self._full_tokens:
            work += KV_OVERFLOW_UNITS * (wanted - self._full_tokens)
        if self.is_paused:
            work += PAUSED_UNITS
        estimate = self.known = (work, self._pace, prefill, live, wanted, unacked, self.engine)
        return estimate
