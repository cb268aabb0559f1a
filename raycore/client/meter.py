"""What a client measures of its requests and calls: counted where it happens, put into bins once a second, and given to a sink.

A token must cost nothing here, so tokens are counted by drain (everything that was ready in one turn of the loop): the time since the
session's last drain over the drain's steps is the gap of each token in it that is not its request's first.
"""

from __future__ import annotations

import time
from array import array
from collections import Counter
from collections.abc import Callable, Sequence
from typing import final

import numpy as np

from raycore.client.journal import RequestRecord
from raycore.engine import FinishReason
from raycore.metrics import (
    GAP_S,
    INTER_TOKEN,
    LATENCY_S,
    REPLAYED,
    REQUESTS,
    TOKENS,
    TTFT,
    UTILITY_CALL,
    UTILITY_CALLS,
    Metric,
    MetricsSink,
)

FLUSH_S = 1.0
"""How often a client hands its figures on; Ray exports them every ten seconds."""
OBSERVATIONS_A_FLUSH = 256
"""Of one histogram, over all ranks; above it bins are thinned out alike. Each costs some 2 us here, and more in Ray's agent, which takes
the bins apart again one by one."""
_TIMED = 16
"""First tokens of one drain that are timed, evenly picked; each stands for as many as there are to it."""
_KEPT = 4096
"""Values that wait for a flush before they are put into bins early."""
_OUTCOMES = tuple(reason.name.lower() for reason in FinishReason)


@final
class Bins:
    """Counts of values between boundaries. `take` gives whole observations; fractions that thinning leaves are carried over."""

    def __init__(self, boundaries: Sequence[float]) -> None:
        self._edges = np.array(boundaries)
        lower = np.concatenate(([0.0], self._edges))
        upper = np.concatenate((self._edges, [2 * self._edges[-1]]))
        self._values = ((lower + upper) / 2).tolist()
        self._counts = np.zeros(len(self._values))
        self._due = np.zeros(len(self._values))

    @property
    def total(self) -> int:
        """Values since the last `take`."""
        return round(self._counts.sum())

    def add(self, values: array[float], weights: array[float] | None = None) -> None:
        """Count values (type code "d"), each `weights` times; one on a boundary belongs below it."""
        if values:
            found = np.searchsorted(self._edges, np.frombuffer(values), side="left")
            self._counts += np.bincount(found, None if weights is None else np.frombuffer(weights), minlength=len(self._values))

    def take(self, share: float) -> list[tuple[float, int]]:
        """The middle of each bin, and how often to observe it for `share` of what was counted."""
        self._due += self._counts * share
        whole = np.floor(self._due + 1e-9)
        self._due -= whole
        self._counts[:] = 0
        return [(value, int(count)) for value, count in zip(self._values, whole.tolist(), strict=True) if count]


@final
class RankMeter:
    """What came of one rank, over all sessions with it."""

    __slots__ = ("ends", "gap_s", "gap_tokens", "gaps", "prompt_tokens", "tokens", "wait_s", "wait_weights", "waits")

    def __init__(self) -> None:
        self.waits = Bins(LATENCY_S)
        self.gaps = Bins(GAP_S)
        self.wait_s = array("d")
        self.wait_weights = array("d")
        """How many first tokens each stands for."""
        self.gap_s = array("d")
        self.gap_tokens = array("d")
        self.tokens = 0
        self.prompt_tokens = 0
        self.ends = [0] * len(_OUTCOMES)
        """By finish reason."""

    def sort(self) -> None:
        """Put into bins what waits for it."""
        self.waits.add(self.wait_s, self.wait_weights)
        self.gaps.add(self.gap_s, self.gap_tokens)
        for column in (self.wait_s, self.wait_weights, self.gap_s, self.gap_tokens):
            del column[:]


@final
class DrainMeter:
    """The drains of one session; the slot table fills in what it has at hand anyway."""

    __slots__ = ("_gap_s", "_rank", "_running", "_settled_s", "begun", "clock", "ended", "first_ns", "steps", "token_bytes")

    def __init__(self, rank: RankMeter, clock: Callable[[], float]) -> None:
        self._rank = rank
        self.clock = clock
        self._running = 0
        """Requests that had a token and have not ended."""
        self._settled_s = clock()
        self._gap_s = 0.0
        self.begun: list[RequestRecord] = []
        """Had their first token of this session in this drain, or were found to have had it."""
        self.ended = 0
        """Of those that had a token."""
        self.steps = 0
        self.token_bytes = 0
        self.first_ns = 0
        """The engine's clock at the drain's first step."""

    def end(self, reasons: bytes) -> None:
        """Requests ended on their engine, for these reasons."""
        ends = self._rank.ends
        if len(reasons) == 1:
            ends[reasons[0]] += 1
        else:
            for reason in range(len(ends)):
                ends[reason] += reasons.count(reason)
        self.ended += len(reasons)

    def settle(self, last_ns: int) -> None:
        """The drain is over."""
        now_s, steps, begun, rank = self.clock(), self.steps, self.begun, self._rank
        tokens = self.token_bytes >> 2
        rank.tokens += tokens
        if tokens > len(begun):
            # Before the first step of a session that had nothing running there was no token: then only the steps' own distances count.
            if not self._running and steps > 1:
                gap_s = (last_ns - self.first_ns) / 1e9 / (steps - 1)
            else:
                gap_s = (now_s - self._settled_s) / steps
            self._gap_s = gap_s
            rank.gap_s.append(gap_s)
            rank.gap_tokens.append(tokens - len(begun))
            if len(rank.gap_s) > _KEPT:
                rank.sort()
        running = self._running - self.ended
        if begun:
            running += len(begun)
            if len(begun) == 1:  # what `_take_begun` does, without its lists: this is once a request where they come one by one
                record = begun.pop()
                if record.tokens_at_add or len(record.tokens) > steps:
                    self._take_begun([record], now_s)
                else:
                    rank.wait_s.append(now_s - record.admitted_s)
                    rank.wait_weights.append(1.0)
                    rank.prompt_tokens += record.prompt_tokens
            else:
                self._take_begun(begun, now_s)
                begun.clear()
            if len(rank.wait_s) > _KEPT:
                rank.sort()
        self._running = running
        self._settled_s = now_s
        self.steps = self.token_bytes = self.ended = 0

    def _take_begun(self, begun: list[RequestRecord], now_s: float) -> None:
        rank, steps = self._rank, self.steps
        rank.prompt_tokens += sum([record.prompt_tokens for record in begun if not record.tokens_at_add])
        timed = begun if len(begun) <= _TIMED else begun[:: len(begun) // _TIMED]
        waits = [now_s - record.admitted_s for record in timed if not record.tokens_at_add and len(record.tokens) <= steps]
        if len(waits) < len(timed):
            # Who was sent again had its first token long ago; who overtook others was found only now, and has had a token a step since.
            late = (record for record in timed if not record.tokens_at_add and len(record.tokens) > steps)
            waits += [now_s - record.admitted_s - (len(record.tokens) - 1) * self._gap_s for record in late]
        rank.wait_s.extend(waits)
        rank.wait_weights.extend([len(begun) / len(timed)] * len(waits))


@final
class ClientMeter:
    """Owns the figures of one client between two flushes; used on its event loop."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self.clock = clock
        self._ranks: dict[int, RankMeter] = {}
        self._replayed: Counter[tuple[str, int]] = Counter()
        self._failed: Counter[tuple[str, int]] = Counter()
        self._calls: Counter[tuple[str, str]] = Counter()
        self._call_s: dict[str, array[float]] = {}
        self._call_bins: dict[str, Bins] = {}

    def of_rank(self, rank: int) -> RankMeter:
        """The rank's figures, whichever incarnation holds it."""
        if rank not in self._ranks:
            self._ranks[rank] = RankMeter()
        return self._ranks[rank]

    def session(self, rank: int) -> DrainMeter:
        """For a new session with a rank."""
        return DrainMeter(self.of_rank(rank), self.clock)

    def replayed(self, cause: str, rank: int) -> None:
        """A request that `rank` had is sent again."""
        self._replayed[cause, rank] += 1

    def ended(self, outcome: str, rank: int) -> None:
        """A request ended without its engine."""
        self._failed[outcome, rank] += 1

    def called(self, method: str, outcome: str, seconds: float) -> None:
        """A utility call on a rank ended."""
        self._calls[method, outcome] += 1
        times = self._call_s.get(method)
        if times is None:
            times = self._call_s[method] = array("d")
        times.append(seconds)
        if len(times) > _KEPT:
            self._sort_calls(method)

    def flush(self, sink: MetricsSink) -> None:
        """Hand everything on and begin anew."""
        for rank, meter in self._ranks.items():
            meter.sort()
            tags = {"dp_rank": str(rank)}
            ends, meter.ends[:] = list(meter.ends), [0] * len(_OUTCOMES)
            for outcome, count in zip(_OUTCOMES, ends, strict=True):
                _add(sink, REQUESTS, count, {**tags, "outcome": outcome})
            _add(sink, TOKENS, meter.tokens, {**tags, "kind": "answer"})
            _add(sink, TOKENS, meter.prompt_tokens, {**tags, "kind": "prompt"})
            meter.tokens = meter.prompt_tokens = 0
        ranks = [({"dp_rank": str(rank)}, meter) for rank, meter in self._ranks.items()]
        _observe(sink, TTFT, [(tags, meter.waits) for tags, meter in ranks])
        _observe(sink, INTER_TOKEN, [(tags, meter.gaps) for tags, meter in ranks])
        for (outcome, rank), count in self._failed.items():
            _add(sink, REQUESTS, count, {"outcome": outcome, "dp_rank": str(rank)})
        for (cause, rank), count in self._replayed.items():
            _add(sink, REPLAYED, count, {"cause": cause, "dp_rank": str(rank)})
        for (method, outcome), count in self._calls.items():
            _add(sink, UTILITY_CALLS, count, {"method": method, "outcome": outcome})
        for method in self._call_s:
            self._sort_calls(method)
        _observe(sink, UTILITY_CALL, [({"method": method}, bins) for method, bins in self._call_bins.items()])
        self._failed.clear()
        self._replayed.clear()
        self._calls.clear()

    def _sort_calls(self, method: str) -> None:
        self._call_bins.setdefault(method, Bins(LATENCY_S)).add(self._call_s[method])
        self._call_s[method] = array("d")


def _add(sink: MetricsSink, metric: Metric, count: int, tags: dict[str, str]) -> None:
    if count:
        sink.record(metric, count, tags)


def _observe(sink: MetricsSink, metric: Metric, series: Sequence[tuple[dict[str, str], Bins]]) -> None:
    total = sum(bins.total for _, bins in series)
    share = min(1.0, OBSERVATIONS_A_FLUSH / total) if total else 0.0
    for tags, bins in series:
        for value, count in bins.take(share) if bins.total else ():
            for _ in range(count):
                sink.record(metric, value, tags)
