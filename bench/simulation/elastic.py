"""A simulated fleet that grows and shrinks while it serves, by the same decisions as a pool's autoscaling loop."""

from __future__ import annotations

import itertools
import math
import random
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from bench.simulation.engine import SimRequest
from bench.simulation.fleet import FleetSimulation, Outcome, Setup
from elastic.policies import Bounds, Observation, Proposal, Resize, ScalingPolicy, add_to_window, decide, observation
from raycore.routing.router import Router
from raycore.traces import TraceRequest

LOOK_S = 1.0


@dataclass(frozen=True)
class ElasticSetup:
    """How the fleet of `Setup.engines` at most changes its size."""

    policy: ScalingPolicy
    bounds: Bounds
    initial: int = 1
    grow_s: float = 20.0
    """From the decision to the first request on a new engine: a process that starts and loads its weights."""


@dataclass
class Sizes:
    """What became of the fleet."""

    resizes: list[Resize] = field(default_factory=list)
    sizes: list[tuple[float, int]] = field(default_factory=list)
    """(second, engines that get new requests), at each look."""
    engine_seconds: float = 0.0
    """Of engines that start, serve or end what they have."""

    def turns_within(self, window_s: float) -> int:
        """The most changes of direction in any window of this length."""
        signs = [(resize.at_s, resize.after > resize.before) for resize in self.resizes]
        times = [at_s for (at_s, up), (_, was_up) in zip(signs[1:], signs, strict=False) if up != was_up]
        return max((sum(begin <= at_s < begin + window_s for at_s in times) for begin in times), default=0)


class Ahead:
    """The oracle: it knows how many requests there will be, and has engines up in time. `known`: requests in the system, by second."""

    window_s = 0.0

    def __init__(self, known: Sequence[float], requests_per_rank: float, ahead_s: float) -> None:
        self._known = known
        self._per_rank = requests_per_rank
        self._ahead = math.ceil(ahead_s) + 1

    def propose(self, window: Sequence[Observation]) -> Proposal:
        """For the most that will be there before another resize could be done."""
        now = int(window[-1].at_s)
        coming = max(self._known[now : now + self._ahead], default=0.0)
        return Proposal(max(1, math.ceil(coming / self._per_rank)), "known", is_urgent=True)


class ElasticFleet(FleetSimulation):
    """Engines beyond those that are up get nothing; one that leaves ends what it has."""

    def __init__(
        self,
        trace: list[SimRequest],
        setup: Setup,
        make: Callable[[random.Random, Callable[[], float]], Router],
        elastic: ElasticSetup,
    ) -> None:
        super().__init__(trace, setup, make)
        self._elastic = elastic
        self.sizes = Sizes()
        self._up = list(range(elastic.initial))
        self._starting: tuple[float, float, list[int]] | None = None
        self._window: deque[Observation] = deque()
        self._looked_s = 0.0
        self._use()

    def _tick(self, now_s: float) -> None:
        if self._starting is not None and now_s >= self._starting[0]:
            _, begun_s, joined = self._starting
            self._starting = None
            self.sizes.resizes.append(Resize(now_s, len(self._up), len(self._up) + len(joined), now_s - begun_s))
            self._up = sorted([*self._up, *joined])
            self._use()
        if now_s - self._looked_s >= LOOK_S:
            self._count(now_s)
            self._look(now_s)
        super()._tick(now_s)

    def _count(self, now_s: float) -> None:
        starting = self._starting[2] if self._starting is not None else ()
        busy = {index for index, engine in enumerate(self._engines) if engine.has_work or self._inbox[index]}
        self.sizes.engine_seconds += (now_s - self._looked_s) * len({*self._up, *starting, *busy})
        self.sizes.sizes.append((now_s, len(self._up)))
        self._looked_s = now_s

    def _look(self, now_s: float) -> None:
        elastic, loads = self._elastic, [self._engines[index].load() for index in self._up]
        seen = observation(loads, at_s=now_s, kv_tokens=self._setup.model.kv_tokens * len(loads))
        add_to_window(self._window, seen, elastic.policy.window_s)
        if self._starting is not None:
            return
        decision = decide(elastic.policy.propose(tuple(self._window)), elastic.bounds, seen, self.sizes.resizes)
        if decision.target > decision.ranks:
            free = [index for index in range(len(self._engines)) if index not in self._up]
            self._starting = (now_s + elastic.grow_s, now_s, free[: decision.target - decision.ranks])
        elif decision.target < decision.ranks:
            self.sizes.resizes.append(Resize(now_s, decision.ranks, decision.target, 0.0))
            self._up = self._up[: decision.target]
            self._use()

    def _use(self) -> None:
        for router in self.routers:
            router.usable = [router.ledgers[index] for index in self._up]


def shaped(trace: Sequence[TraceRequest], rate: Callable[[float], float], seconds: float) -> list[TraceRequest]:
    """A trace's requests and the unevenness of its gaps, at `rate(second)` requests a second; repeated as often as needed."""
    mean_gap_s = (trace[-1].arrival_s - trace[0].arrival_s) / len(trace)
    rows: list[TraceRequest] = []
    at_s = 0.0
    while True:
        for before, row in itertools.pairwise(trace):
            at_s += (row.arrival_s - before.arrival_s) / mean_gap_s / rate(at_s)
            if at_s >= seconds:
                return rows
            rows.append(row._replace(arrival_s=at_s))


def in_system(outcome: Outcome, seconds: float) -> list[float]:
    """Requests that have arrived and not ended, the most in each second."""
    events = sorted([(r.arrival_s, 1) for r in outcome.requests] + [(r.end_s, -1) for r in outcome.requests])
    most = [0.0] * (int(seconds) + 1)
    count = 0
    for at_s, change in events:
        count += change
        second = min(int(at_s), len(most) - 1)
        most[second] = max(most[second], count)
    return most
