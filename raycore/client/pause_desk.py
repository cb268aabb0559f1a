"""Pause and resume over all ranks: carries out `pause_plan.py` over the sessions, and mends a rank that missed a decision."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Awaitable, Callable, Coroutine, Iterable
from typing import Any

from raycore.client import pause_plan as plans
from raycore.client.fleet import EngineFleet
from raycore.client.pause_plan import Ending, Order, Phase, PlanStep
from raycore.client.session import EngineSession
from raycore.errors import (
    CallTimeoutError,
    ClientClosedError,
    DisagreementError,
    EngineDeadError,
    PauseInProgressError,
    RaycoreError,
    RemoteCallError,
)
from raycore.ids import EngineId
from raycore.operations import PauseArguments, PausePhaseArguments, PauseReport

_REPEAT_S = 0.05
"""Before a decision is sent again to a rank that did not take it."""
_RETRY_S = 0.01
"""Before a pause is tried again that met another client's, which takes a few milliseconds unless it waits for requests."""
_MEND_AFTER_S = 1.0
"""Ranks whose stamps differ for so long have missed a decision; a client that is deciding needs milliseconds."""


PhaseSender = Callable[[str, EngineSession, PausePhaseArguments, float | None], Awaitable[PauseReport]]
"""Sends one phase of this method to one rank, with a deadline (None: that of any call); errors as of any call."""

_NO_LIMIT_S = 1e8
_MENDED = "pause_scheduler"


class PauseDesk:
    """Owns the plans of this client and the tasks that carry them out."""

    def __init__(self, fleet: EngineFleet, send: PhaseSender) -> None:
        self._fleet = fleet
        self._send = send
        self._runs: set[_Run] = set()
        self._mending: asyncio.Task[None] | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        self._is_closed = False

    async def set_paused(self, method: str, wanted: PauseArguments | None, limit_s: float) -> None:
        """Pause all ranks as `wanted`, or resume them (None).

        Raises CallTimeoutError, PauseInProgressError or the error of a rank after every rank is what it was; EngineDeadError when no rank
        is left. A rank that dies meanwhile is left out.
        """
        until_s = asyncio.get_running_loop().time() + limit_s
        held: _Run | None = None
        while True:
            sessions = self._fleet.sessions()
            if not sessions:
                raise self._fleet.no_engine()
            run = _Run(method, wanted, self._fleet, self._send, self._spawn, self._runs.discard)
            self._runs.add(run)
            match await run.ending([session.engine for session in sessions], until_s):
                case Ending.DONE:
                    await self._tell_joiners(run)
                    if run.error is not None:
                        raise run.error
                    return
                case Ending.BUSY if asyncio.get_running_loop().time() + _RETRY_S < until_s:
                    held = run
                    await asyncio.sleep(_RETRY_S)
                case Ending.BUSY | Ending.DRAINING:
                    raise run.held_by_other()
                case Ending.DEAD:
                    raise run.death or self._fleet.no_engine()
                case Ending.FAILED if held is not None and run.error is None:
                    raise held.held_by_other()  # the last try was cut short; the tries before it say why there is no result
                case Ending.FAILED:
                    msg = f"{method} did not complete on every rank before its deadline; all are what they were"
                    raise run.error or CallTimeoutError(msg, method=method)

    async def _tell_joiners(self, run: _Run) -> None:
        """Ranks that join meanwhile take no part in the plan, and get its decision before it is complete."""
        told = set(run.engines)
        while fresh := [s for s in (*self._fleet.sessions(), *self._fleet.joiners()) if s.engine not in told]:
            told.update(session.engine for session in fresh)
            commit = run.decision()
            await asyncio.gather(*(self._send(run.method, session, commit, None) for session in fresh), return_exceptions=True)

    async def is_paused(self, method: str, timeout_s: float | None) -> bool:
        """Whether the ranks are paused, or some of them while a decision is on its way.

        DisagreementError when single ranks were paused by name.
        """
        sessions = self._fleet.sessions()
        if not sessions:
            raise self._fleet.no_engine()
        asked = (self._send(method, session, PausePhaseArguments(phase="read"), timeout_s) for session in sessions)
        reports = await asyncio.gather(*asked)
        answers = {report.is_paused for report in reports}
        is_settled = len({report.stamp for report in reports}) == 1 and not any(report.is_held for report in reports)
        if len(answers) > 1 and is_settled:
            results: dict[int, Any] = {session.engine.rank: report.is_paused for session, report in zip(sessions, reports, strict=True)}
            msg = f"some ranks were paused alone: {results}"
            raise DisagreementError(msg, method=method, results=results)
        return any(answers)

    def on_stamp(self) -> None:
        """A rank carried out a decision: see whether all have."""
        if self._mending is None and not self._is_closed and self._behind():
            self._mending = self._spawn(self._mend())

    def close(self) -> None:
        """The client ends; what was only prepared is undone by the engines with its sessions."""
        self._is_closed = True
        for task in self._tasks:
            task.cancel()
        for run in list(self._runs):
            run.fail(ClientClosedError("the client was closed while a pause or resume was in progress"))

    async def wait_closed(self) -> None:
        """Until no task is left."""
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def _behind(self) -> list[EngineSession]:
        attached = [session for session in (*self._fleet.sessions(), *self._fleet.joiners()) if session.is_attached]
        highest = max((session.pause_stamp for session in attached), default=0)
        return [session for session in attached if session.pause_stamp < highest]

    async def _mend(self) -> None:
        """Tell the decision to ranks that missed it: its client died while it sent it, or a rank has joined since."""
        try:
            while self._behind():
                await asyncio.sleep(_MEND_AFTER_S)
                behind = [] if self._runs else self._behind()
                highest = max((session.pause_stamp for session in self._fleet.sessions()), default=0)
                commit = PausePhaseArguments(phase="commit", operation="mend", mode="keep", stamp=highest)
                await asyncio.gather(*(self._send(_MENDED, session, commit, None) for session in behind), return_exceptions=True)
        finally:
            self._mending = None

    def _spawn(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        task: asyncio.Task[None] = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task


class _Run:
    """One plan. Its caller may leave before it is over: what was decided is then taken back in the background."""

    def __init__(
        self,
        method: str,
        wanted: PauseArguments | None,
        fleet: EngineFleet,
        send: PhaseSender,
        spawn: Callable[[Coroutine[Any, Any, None]], asyncio.Task[None]],
        on_over: Callable[[_Run], object],
    ) -> None:
        self.error: RaycoreError | None = None
        self.death: EngineDeadError | None = None
        """Of a rank that is left out; it is the caller's error only when no rank is left."""
        self.other = "another client"
        self.is_other_draining = False
        self.method = method
        self._wanted = wanted
        self._is_waiting = wanted is not None and wanted.mode == "wait"
        self._fleet = fleet
        self._send = send
        self._spawn = spawn
        self._on_over = on_over
        self._operation = secrets.token_hex(8)
        self._loop = asyncio.get_running_loop()
        self._ended: asyncio.Future[Ending] = self._loop.create_future()
        self._preparing: set[asyncio.Task[None]] = set()
        self._engine_of: dict[int, EngineId] = {}

    async def ending(self, engines: list[EngineId], until_s: float) -> Ending:
        """Carry the plan out; how it ended for the caller."""
        self._engine_of = {engine.rank: engine for engine in engines}
        timer = self._loop.call_at(until_s, self._expire)
        self._take(plans.begin(tuple(self._engine_of), is_pause=self._wanted is not None, is_waiting=self._is_waiting))
        try:
            return await asyncio.shield(self._ended)
        except asyncio.CancelledError:
            self._expire()
            raise
        finally:
            timer.cancel()

    @property
    def engines(self) -> Iterable[EngineId]:
        """Who takes part."""
        return self._engine_of.values()

    def decision(self) -> PausePhaseArguments:
        """What a rank is told that did not take part."""
        wanted = self._wanted
        mode = "keep" if wanted is None else wanted.mode
        return PausePhaseArguments(phase="commit", operation=self._operation, mode=mode, stamp=self._plan.stamp)

    def held_by_other(self) -> PauseInProgressError:
        """What its caller is told when another client's pause or resume was in its way."""
        what = "a pause that waits for running requests" if self.is_other_draining else "a pause or resume"
        return PauseInProgressError(f"{self.method}: {what}, of {self.other}, is in progress; nothing was changed", method=self.method)

    def fail(self, error: ClientClosedError) -> None:
        """The client ended."""
        if not self._ended.done():
            self._ended.set_exception(error)
            self._ended.exception()  # whoever waits raises it; a caller that left needs it no more

    def _expire(self) -> None:
        self._take(plans.on_expired(self._plan))

    def _take(self, step: PlanStep) -> None:
        self._plan = step.plan
        for order in step.orders:
            if order.phase == "undo":
                for task in self._preparing:
                    task.cancel()
            task = self._spawn(self._carry_out(order))
            if order.phase in ("prepare", "drain"):
                self._preparing.add(task)
        if step.ending is not None and not self._ended.done():
            self._ended.set_result(step.ending)
        if self._plan.phase is Phase.ENDED:
            self._on_over(self)

    async def _carry_out(self, order: Order) -> None:
        if order.is_repeat:
            await asyncio.sleep(_REPEAT_S)
        session = self._fleet.of_engine(self._engine_of[order.rank])
        try:
            if session is None:
                self._take(plans.on_gone(self._plan, order.rank))
                return
            report = await self._send(self.method, session, self._arguments(order), self._limit_s(order))
        except EngineDeadError as error:
            self.death = error
            self._take(plans.on_gone(self._plan, order.rank))
        except ClientClosedError as error:
            self.fail(error)
        except RaycoreError as error:
            self._on_error(order, error)
        else:
            if order.phase != "undo":
                if not report.is_granted:
                    self.other, self.is_other_draining = report.client, report.is_draining
                self._take(plans.on_report(self._plan, order.rank, report))

    def _arguments(self, order: Order) -> PausePhaseArguments:
        wanted = self._wanted
        mode = None if wanted is None else wanted.mode
        if order.phase != "commit":
            return PausePhaseArguments(phase=order.phase, operation=self._operation, mode=mode)
        if self._plan.phase is Phase.RESTORING or wanted is None:
            return PausePhaseArguments(phase="commit", operation=self._operation, mode="keep", stamp=order.stamp)
        return PausePhaseArguments(phase="commit", operation=self._operation, mode=mode, stamp=order.stamp, clear_cache=wanted.clear_cache)

    @staticmethod
    def _limit_s(order: Order) -> float | None:
        # these may wait as long as their caller does, who ends them
        return _NO_LIMIT_S if order.phase in ("prepare", "drain") else None

    def _on_error(self, order: Order, error: RaycoreError) -> None:
        if order.phase == "undo":
            return  # the session that held it has ended, and the hold with it
        if isinstance(error, RemoteCallError) and order.phase == "commit":
            # it was carried out, and only the cache could not be cleared
            self.error = error
            self._take(plans.on_report(self._plan, order.rank, PauseReport(is_granted=True, is_paused=True, stamp=order.stamp)))
            return
        if self._plan.phase in (Phase.LOCKING, Phase.PREPARING, Phase.DRAINING):
            self.error = error
        self._take(plans.on_failed(self._plan, order.rank))
