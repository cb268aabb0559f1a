"""The simulation: a trace in, engines that step, routers that know what messages have told them, and what became of each request out."""

from __future__ import annotations

import heapq
import itertools
import random
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from bench.simulation.engine import SimEngine, SimRequest, StepModel
from raycore.engine import EngineLoad
from raycore.ids import EngineId, Incarnation, Rank, RequestId
from raycore.routing.book import LedgerBook
from raycore.routing.ledger import EngineLedger
from raycore.routing.query import RouteQuery
from raycore.routing.router import Router
from raycore.routing.work import PaceMeter, step_units

LINK_S = 5e-4
"""One way between a client and an engine."""
QUIET_REPORT_S = 0.1
"""How often a router hears of engines with which it has no traffic."""
_TICK = -1


@dataclass(frozen=True)
class Setup:
    """One simulation but for its trace and policy."""

    engines: int = 8
    model: StepModel = field(default_factory=StepModel)
    routers: int = 1
    report_s: float = 0.0
    """Least time between two reports of an engine to a router; 0: every frame carries one, as in a pool."""
    slowness: tuple[float, ...] = ()
    """What each engine's steps are multiplied by; 1 where none is given."""
    is_lockstep: bool = False
    """All engines' steps take as long as the slowest, with dummy steps where there is no work."""
    reports_pace: bool = True
    seed: int = 0


@dataclass
class Outcome:
    """What a simulation gives beside the requests themselves."""

    requests: list[SimRequest]
    engines: list[SimEngine]
    steps: list[tuple[int, float, float, int, int]] = field(default_factory=list)
    """(engine, begin in seconds, length in seconds, sequences that had a token before, all tokens computed)."""
    end_s: float = 0.0


@dataclass(slots=True)
class _Frame:
    due_s: float
    engine: int
    firsts: Sequence[SimRequest] = ()
    ends: Sequence[SimRequest] = ()
    load: EngineLoad | None = None
    ack: int = -1
    unit_ns: int = 0


class SimRouter:
    """One client: its ledgers, its policy, and the frames that are on their way to it."""

    def __init__(self, index: int, setup: Setup, make: Callable[[random.Random, Callable[[], float]], Router]) -> None:
        self.now_s = 0.0
        self.book = LedgerBook()
        ids = (EngineId(Rank(rank), Incarnation("sim")) for rank in range(setup.engines))
        self.ledgers = [EngineLedger(each, self.book, kv_capacity=setup.model.kv_tokens, steps_together=setup.is_lockstep) for each in ids]
        self.usable: Sequence[EngineLedger] = self.ledgers
        """Those that may get new requests."""
        self.router = make(random.Random(setup.seed * 1000 + index), lambda: self.now_s)
        self.frames: deque[_Frame] = deque()
        self.sent = [0] * setup.engines
        self.on_engine = [0] * setup.engines
        """Requests with a first token and no end, as the engine counts them."""
        self.reported_s = [-1e9] * setup.engines

    def send(self, request: SimRequest, now_s: float) -> int:
        """Take in what has come, then choose; the engine's index."""
        self.hear_until(now_s)
        query = RouteQuery(RequestId(str(request.index)), request.prompt_tokens, blocks=request.blocks)
        ledger = self.router.choose(query, self.usable)
        engine = int(ledger.engine.rank)
        request.engine, request.prefill = engine, query.prefill
        ledger.dispatch(request.prefill)
        ledger.sent(self.sent[engine])
        self.sent[engine] += 1
        return engine

    def hear_until(self, now_s: float) -> None:
        """Take in the frames that have come by then."""
        self.now_s = now_s
        frames = self.frames
        while frames and frames[0].due_s <= now_s:
            self._take(frames.popleft())

    def _take(self, frame: _Frame) -> None:
        ledger = self.ledgers[frame.engine]
        for request in frame.firsts:
            ledger.begin(request.prefill)
            request.prefill = 0
        for request in frame.ends:
            ledger.end(request.prefill)
            self.book.finished(request.output_tokens)
        if frame.load is not None:
            ledger.report(frame.load, frame.ack, frame.unit_ns)


class FleetSimulation:
    """One event per step and one per arrival."""

    def __init__(self, trace: list[SimRequest], setup: Setup, make: Callable[[random.Random, Callable[[], float]], Router]) -> None:
        self._trace = trace
        self._setup = setup
        count = setup.engines
        slowness = [*setup.slowness, *([1.0] * (count - len(setup.slowness)))]
        self._engines = [SimEngine(setup.model, slowness[i]) for i in range(count)]
        self._meters = [PaceMeter() for _ in range(count)]
        self.routers = [SimRouter(i, setup, make) for i in range(setup.routers)]
        self._inbox: list[deque[tuple[float, int, SimRequest]]] = [deque() for _ in range(count)]
        self._acks = [[-1] * setup.routers for _ in range(count)]
        self._loads = [EngineLoad()] * count
        self._is_stepping = [False] * count
        self._until_s = [0.0] * count
        self._events: list[tuple[float, int, int]] = []
        self._order = itertools.count()
        self._outcome = Outcome(trace, self._engines)
        self._left = len(trace)

    def run(self) -> Outcome:
        """Until every request has ended."""
        choice = random.Random(self._setup.seed)
        self._push(0.0, _TICK)
        arrivals = iter(self._trace)
        request = next(arrivals, None)
        while self._left:
            if request is None or (self._events and self._events[0][0] <= request.arrival_s):
                now_s, _, engine = heapq.heappop(self._events)
                if engine == _TICK:
                    self._tick(now_s)
                elif self._setup.is_lockstep:
                    self._turn_all(now_s)
                else:
                    self._turn(engine, now_s)
            else:
                self._arrive(request, choice.randrange(self._setup.routers) if self._setup.routers > 1 else 0)
                request = next(arrivals, None)
        return self._outcome

    def _push(self, at_s: float, engine: int) -> None:
        heapq.heappush(self._events, (at_s, next(self._order), engine))

    def _arrive(self, request: SimRequest, router: int) -> None:
        now_s = request.arrival_s
        request.router = router
        sender = self.routers[router]
        engine = sender.send(request, now_s)
        self._inbox[engine].append((now_s + LINK_S, sender.sent[engine] - 1, request))
        whose = 0 if self._setup.is_lockstep else engine
        if not self._is_stepping[whose]:
            self._push(now_s + LINK_S, whose)

    def _turn(self, engine: int, now_s: float) -> None:
        """The end of a step, or an idle engine's waking."""
        if self._is_stepping[engine]:
            if now_s < self._until_s[engine]:
                return  # a second waking of an idle engine
            self._finish(engine, now_s)
        self._take_in(engine, now_s)
        if self._engines[engine].has_work:
            seconds = self._engines[engine].begin_step()
            self._begin(engine, now_s, seconds)
            self._push(now_s + seconds, engine)
        elif self._inbox[engine]:
            self._push(self._inbox[engine][0][0], engine)

    def _turn_all(self, now_s: float) -> None:
        """The same for engines in lockstep: the first stands for all."""
        engines = range(self._setup.engines)
        if self._is_stepping[0]:
            if now_s < self._until_s[0]:
                return
            for engine in engines:
                self._finish(engine, now_s)
        for engine in engines:
            self._take_in(engine, now_s)
        if any(self._engines[engine].has_work for engine in engines):
            seconds = max(self._engines[engine].begin_step() for engine in engines)
            for engine in engines:
                self._begin(engine, now_s, seconds)
            self._push(now_s + seconds, 0)
        else:
            due = [inbox[0][0] for inbox in self._inbox if inbox]
            if due:
                self._push(min(due), 0)

    def _take_in(self, engine: int, now_s: float) -> None:
        inbox, acks = self._inbox[engine], self._acks[engine]
        if not inbox or inbox[0][0] > now_s:
            return
        each = self._engines[engine]
        while inbox and inbox[0][0] <= now_s:
            _, seq, request = inbox.popleft()
            each.add(request)
            acks[request.router] = seq
        self._loads[engine] = each.load()

    def _begin(self, engine: int, now_s: float, seconds: float) -> None:
        each = self._engines[engine]
        self._is_stepping[engine] = True
        self._until_s[engine] = now_s + seconds
        running = len(each.batch)
        self._outcome.steps.append((engine, now_s, seconds, running - len(each.joiners), running + each.prefilled))
        if not self._setup.is_lockstep:
            self._meters[engine].observe(seconds, step_units(running, each.kv_used + running, each.prefilled))

    def _finish(self, engine: int, now_s: float) -> None:
        """Give a step's outputs to the routers, each with a report that includes what came while it ran."""
        each = self._engines[engine]
        result = each.end_step()
        self._is_stepping[engine] = False
        self._take_in(engine, now_s)
        load = self._loads[engine] = each.load()
        news: dict[int, tuple[list[SimRequest], list[SimRequest]]] = {}
        for request in result.firsts:
            request.first_token_s = now_s + LINK_S
            self.routers[request.router].on_engine[engine] += 1
            news.setdefault(request.router, ([], []))[0].append(request)
        for request in result.ends:
            request.end_s = now_s + LINK_S
            news.setdefault(request.router, ([], []))[1].append(request)
        unit_ns = self._meters[engine].unit_ns if self._setup.reports_pace else 0
        for index, router in enumerate(self.routers):
            if not router.on_engine[engine]:
                continue  # a frame goes only to those who get something in it
            firsts, ends = news.get(index, ((), ()))
            is_due = now_s - router.reported_s[engine] >= self._setup.report_s
            if is_due:
                router.reported_s[engine] = now_s
            if is_due or firsts or ends:
                report = load if is_due else None
                router.frames.append(_Frame(now_s + LINK_S, engine, firsts, ends, report, self._acks[engine][index], unit_ns))
        for request in result.ends:
            self.routers[request.router].on_engine[engine] -= 1
        self._left -= len(result.ends)
        if not self._left:
            self._outcome.end_s = now_s

    def _tick(self, now_s: float) -> None:
        """Engines report to those whom they have told nothing for a while, too."""
        interval_s = self._setup.report_s or QUIET_REPORT_S
        for index, router in enumerate(self.routers):
            for engine in range(self._setup.engines):
                if now_s - router.reported_s[engine] >= interval_s:
                    router.reported_s[engine] = now_s
                    unit_ns = self._meters[engine].unit_ns if self._setup.reports_pace else 0
                    router.frames.append(
                        _Frame(now_s + LINK_S, engine, load=self._loads[engine], ack=self._acks[engine][index], unit_ns=unit_ns)
                    )
        self._push(now_s + interval_s, _TICK)
