"""The client's view of the pool's engines: one session per member, who may get work, who is suspect, who is gone and why."""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import Coroutine
from typing import Any, Protocol

import msgspec

from raycore.client.control import LOOP_ENDED, ControlPlane
from raycore.client.journal import RequestRecord
from raycore.client.links import Links
from raycore.client.meter import ClientMeter
from raycore.client.scope import BalancingScope
from raycore.client.session import EngineSession, RequestSink
from raycore.client.snapshots import SnapshotWatch
from raycore.config import HealthConfig, Limits, Timeouts
from raycore.engine import EngineInfo
from raycore.errors import DeadlineError, EngineDeadError, ErrorRecord, ExpertsLostError, NoEngineError, UnknownRankError
from raycore.health import Verdict
from raycore.ids import EngineId, Rank, SessionId
from raycore.membership import Member, Membership
from raycore.messages import Snapshot
from raycore.routing.book import LedgerBook
from raycore.routing.ledger import EngineLedger

_log = logging.getLogger(__name__)

_TICK_S = 0.25
_DEATHS_KEPT = 16
_CAUSE_WAIT_S = 0.25
"""Ray names the cause of a death some 10 ms after it (70 ms on a GPU machine)."""
_ASK_AGAIN_S = 1.0
_BACKOFF_S = 0.1
"""Sessions with one engine that are lost within a second of each other are opened anew only after a growing wait."""


class FleetListener(Protocol):
    """Who settles what an engine or a session leaves behind."""

    def on_session_lost(self, old: EngineSession, fresh: EngineSession, records: list[RequestRecord], reason: str) -> None:
        """The engine lives, its session is a new one; these requests have no session."""
        ...

    def on_engine_gone(self, session: EngineSession, records: list[RequestRecord], cause: str) -> None:
        """The incarnation is dead to this client; these requests have no session."""
        ...

    def on_engine_left(self, session: EngineSession, records: list[RequestRecord]) -> None:
        """The engine left by the pool's choice; these requests have no session."""
        ...


class EngineFleet:
    """Opens, renews and ends sessions as members, beats and deaths demand."""

    def __init__(
        self,
        membership: Membership,
        control: ControlPlane,
        links: Links,
        *,
        client: str,
        timeouts: Timeouts,
        limits: Limits,
        health: HealthConfig,
        scope: BalancingScope,
        meter: ClientMeter | None = None,
    ) -> None:
        self.membership = membership
        self.usable: list[EngineLedger] = []
        """Engines that may get new requests now; replaced as a whole."""
        self.info: EngineInfo | None = None
        """What the engines say of themselves; the strictest of each limit."""
        self._control = control
        self._links = links
        self._client = client
        self._timeouts = timeouts
        self._limits = limits
        self._health = health
        self._sessions: dict[EngineId, EngineSession] = {}
        self._session_of: dict[EngineLedger, EngineSession] = {}
        self._suspects: dict[EngineId, tuple[float, str]] = {}
        self._dead: dict[EngineId, str] = {}
        self._attach_due: dict[EngineSession, tuple[float, asyncio.Future[None]]] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._asked_at_s = 0.0
        self._is_closed = False
        self._book = LedgerBook()
        self._scope = scope
        self._meter = meter

    async def start(self, listener: FleetListener, sink: RequestSink) -> None:
        """Open a session with every member. DeadlineError or EngineDeadError when one does not answer in time."""
        self._loop = asyncio.get_running_loop()
        self._listener = listener
        self._sink = sink
        self._links.start(self._health, self._on_verdict)
        opened = [self._open_session(member) for member in self.membership.members if self._scope.reaches(member)]
        for member in self.membership.joining:
            if self._scope.reaches(member):
                self._open_session(member)
        if not opened:
            ranks = [member.engine.rank for member in self.membership.members]
            msg = f"pool {self.membership.pool!r} has {f'ranks {ranks}, not {self._scope}' if ranks else 'no members'}"
            raise NoEngineError(msg)
        self._spawn(self._tick())
        self._spawn(SnapshotWatch(self._control.coordinator, self._links.snapshots, self.on_snapshot).run())
        await asyncio.gather(*(self._attach_due[session][1] for session in opened))

    async def close(self) -> None:
        """Take leave of every engine; nothing of this fleet is left."""
        self._is_closed = True
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        for _, future in self._attach_due.values():
            future.cancel()
        self._attach_due.clear()
        for session in self._sessions.values():
            self._control.forget(session.engine)
            session.close(farewell=True)
            session.release_records()
        self._sessions.clear()
        self._session_of.clear()
        self.usable = []
        await self._links.close()
        await self._control.close()

    async def wait_attached(self) -> None:
        """Until every session that is being opened is open, or its engine is given up."""
        await asyncio.gather(*(future for _, future in list(self._attach_due.values())), return_exceptions=True)

    # -- questions --------------------------------------------------------------------------------------------------------

    def sessions(self) -> list[EngineSession]:
        """One per serving rank, by rank."""
        return sorted((s for s in self._sessions.values() if self._serves(s)), key=lambda s: s.engine.rank)

    def joiners(self) -> list[EngineSession]:
        """One for each engine core that is about to become a member: it is told what all ranks are told, and gets no requests."""
        return [s for e, s in self._sessions.items() if not s.is_closed and self.membership.is_joining(e)]

    def _serves(self, session: EngineSession) -> bool:
        return not session.is_closed and not self.membership.is_joining(session.engine)

    def of_ledger(self, ledger: EngineLedger) -> EngineSession:
        """The session whose ledger this is."""
        return self._session_of[ledger]

    def of_engine(self, engine: EngineId) -> EngineSession | None:
        """The session with this very incarnation; None when it is gone."""
        session = self._sessions.get(engine)
        return None if session is None or session.is_closed else session

    def of_rank(self, rank: int) -> EngineSession:
        """The session with a rank. UnknownRankError when it does not serve."""
        for engine, session in self._sessions.items():
            if engine.rank == rank and not isinstance(rank, bool) and self._serves(session):
                return session
        msg = f"rank {rank!r} does not serve; ranks are {[s.engine.rank for s in self.sessions()]}"
        raise UnknownRankError(msg)

    def healthy_of_rank(self, rank: Rank) -> EngineSession:
        """Likewise, and not suspect."""
        session = self.of_rank(rank)
        if session.engine in self._suspects:
            msg = f"rank {rank} is suspect: {self._suspects[session.engine][1]}"
            raise UnknownRankError(msg)
        if session.is_attached and not session.ledger.is_usable:
            msg = f"rank {rank} is leaving and takes nothing new"
            raise UnknownRankError(msg)
        return session

    def death_of(self, engine: EngineId, cause: str, what: str) -> EngineDeadError:
        """The error for what waited for an engine that is gone: its own death, or that of the rank whose loss ended the pool."""
        lost = self.membership.lost_with(engine)
        if lost is None:
            return EngineDeadError(f"{what}{engine} is dead: {cause}", rank=engine.rank, cause=cause)
        message = f"{what}rank {lost} is dead, whose experts the others need, and the pool ended with it: {cause}"
        return ExpertsLostError(message, rank=lost, cause=cause)

    def no_engine(self) -> NoEngineError:
        """The error for work that nobody can take, with what is known of the dead."""
        causes = "; ".join(f"{engine}: {cause}" for engine, cause in list(self._dead.items())[-4:])
        within = "" if self._scope.mode == "internal" else f" as {self._scope}"
        return NoEngineError(f"no engine of pool {self.membership.pool!r} can take work{within}" + (f" ({causes})" if causes else ""))

    # -- news from sessions -----------------------------------------------------------------------------------------------

    def on_attached(self, session: EngineSession) -> None:
        """The session is open."""
        due = self._attach_due.pop(session, None)
        if due is not None and not due[1].done():
            due[1].set_result(None)
        session.ledger.is_usable = self.membership.serves(session.engine)
        infos = [each.member.info for each in self._sessions.values()]
        strictest = min(infos, key=lambda info: info.max_model_len)
        self.info = msgspec.structs.replace(strictest, vocab_size=min(info.vocab_size for info in infos))
        self.renew_usable()

    def on_attach_refused(self, session: EngineSession, reason: str) -> None:
        """The engine does not want this client: it is not the one that we were told of."""
        self._gone(session.engine, f"refused the session: {reason}")

    def on_lost(self, session: EngineSession, reason: str) -> None:
        """Attach anew; what ran goes on there."""
        if session.is_closed or self._is_closed:
            return
        _log.warning("%s: session with %s lost (%s); attaching anew", self._client, session.engine, reason)
        session.close()
        records = session.release_records()
        due = self._attach_due.pop(session, None)
        fresh = self._open_session(session.member, replaces=session, attached=due[1] if due else None)
        self._listener.on_session_lost(session, fresh, records, reason)

    def on_peer_gone(self, session: EngineSession, reason: str) -> None:
        """The process has ended: the control plane knows why in a moment; if it does not say, this is the cause."""
        if session.is_closed or self._is_closed:
            return
        self._suspects[session.engine] = (self._loop.time(), reason)
        self.renew_usable()
        self._loop.call_later(_CAUSE_WAIT_S, self._gone, session.engine, f"its process has ended: {reason}")

    def on_engine_failed(self, session: EngineSession, error: ErrorRecord) -> None:
        """The engine's loop is over."""
        cause = error.message if error.type == "EngineStopped" else f"{error.type}: {error.message}"
        self._gone(session.engine, cause)

    def on_leaving(self, session: EngineSession) -> None:
        """The engine takes nothing new."""
        session.ledger.is_usable = False
        self.renew_usable()

    def on_engine_told(self, session: EngineSession) -> None:
        """The engine has taken a newer membership: one that refused requests because it heard of it later than this client takes them."""
        if session.is_attached and not session.is_closed:
            session.ledger.is_usable = self.membership.serves(session.engine)
            self.renew_usable()

    def on_membership(self, membership: Membership) -> None:
        """Someone told of a membership: keep it if it is newer."""
        if self._is_closed or not membership.supersedes(self.membership):
            return
        self.membership = membership
        causes = {departure.engine: departure.cause for departure in membership.departed}
        gone = [engine for engine in self._sessions if not (membership.has(engine) or membership.is_joining(engine))]
        for engine in gone:
            self._sessions[engine].ledger.is_usable = False
        for member in (*membership.members, *membership.joining):
            session = self._sessions.get(member.engine)
            if session is None and member.engine not in self._dead and self._scope.reaches(member):
                self._open_session(member)
            elif session is not None and session.is_attached:
                session.ledger.is_usable = membership.serves(member.engine)
        self.renew_usable()
        for engine in gone:  # last: what they had goes to the others, who may all be new
            self._gone(engine, causes.get(engine, "left the pool"))

    def on_snapshot(self, snapshot: Snapshot) -> None:
        """The coordinator told of loads: they count where this client has no traffic, and so no newer word of the engine itself."""
        for told in snapshot.loads:
            session = self._sessions.get(told.engine)
            if session is not None:
                session.ledger.snapshot(told.load)

    # -- life and death of engines ----------------------------------------------------------------------------------------

    def _open_session(
        self, member: Member, replaces: EngineSession | None = None, attached: asyncio.Future[None] | None = None
    ) -> EngineSession:
        quick_losses = 0 if replaces is None else replaces.quick_losses_with(self._loop.time())
        session = EngineSession(
            member,
            self._links.channel,
            self,
            self._sink,
            pool=self.membership.pool,
            client=self._client,
            pid=os.getpid(),
            limits=self._limits,
            files=self._links.files(member),
            replaces=None if replaces is None else SessionId(replaces.id),
            quick_losses=quick_losses,
            book=self._book,
            meter=None if self._meter is None else self._meter.session(member.engine.rank),
        )
        if replaces is None:
            self._links.watch(member)
            self._control.watch(member.engine, self._on_process_ended)
        else:
            self._session_of.pop(replaces.ledger, None)
        self._sessions[member.engine] = session
        self._session_of[session.ledger] = session
        self._attach_due[session] = (self._loop.time() + self._timeouts.attach_s, attached or self._loop.create_future())
        if quick_losses:
            self._loop.call_later(_BACKOFF_S * quick_losses, session.open)
        else:
            session.open()
        self.renew_usable()
        return session

    def _on_process_ended(self, engine: EngineId, cause: str) -> None:
        """The control plane says that it is over."""
        if cause == LOOP_ENDED and engine in self._sessions and not self._has_left(engine):
            self._spawn(self._on_orderly_end(engine))
        else:
            self._gone(engine, cause)

    async def _on_orderly_end(self, engine: EngineId) -> None:
        """A process that ended in order may have left the pool, which a client that was frozen, or is slow, has yet to read."""
        membership = await self._control.refresh()
        if membership is not None:
            self.on_membership(membership)
        self._gone(engine, LOOP_ENDED)

    def _gone(self, engine: EngineId, cause: str) -> None:
        """The incarnation is dead to this client: everything that waits for it learns so now."""
        session = self._sessions.pop(engine, None)
        if session is None or self._is_closed:
            return
        has_left = self._has_left(engine)
        _log.log(logging.INFO if has_left else logging.WARNING, "%s: %s is gone: %s", self._client, engine, cause)
        self._dead[engine] = cause
        while len(self._dead) > _DEATHS_KEPT:
            self._dead.pop(next(iter(self._dead)))
        self._suspects.pop(engine, None)
        self._session_of.pop(session.ledger, None)
        session.close()
        self._links.forget(engine)
        self._control.forget(engine)
        self.renew_usable()
        self._fail_attach(session, self.death_of(engine, cause, ""))
        if has_left:
            self._listener.on_engine_left(session, session.release_records())
        else:
            self._listener.on_engine_gone(session, session.release_records(), cause)

    def _has_left(self, engine: EngineId) -> bool:
        """Whether an engine that is gone went because the pool decided so: it was leaving, or it is missing without a cause."""
        membership = self.membership
        if membership.has(engine):
            return not membership.serves(engine)
        return all(departure.engine != engine for departure in membership.departed)

    def _fail_attach(self, session: EngineSession, error: Exception) -> None:
        due = self._attach_due.pop(session, None)
        if due is not None and not due[1].done():
            due[1].set_exception(error)
            due[1].exception()  # whoever waits raises it; if nobody does, it is no surprise

    def _on_verdict(self, engine: EngineId, verdict: Verdict, why: str) -> None:
        """The engine's beats changed what we think of it."""
        if engine not in self._sessions:
            return
        if verdict is Verdict.ALIVE:
            self._suspects.pop(engine, None)
        else:
            self._suspects[engine] = (self._loop.time(), why)
            self._spawn(self._control.report_suspect(engine, why))
        self.renew_usable()

    def renew_usable(self) -> None:
        """Who may get new requests: attached and healthy engines; when there are none, those that may still answer."""
        healthy = [s for e, s in self._sessions.items() if not s.is_closed and e not in self._suspects]
        attached = [s.ledger for s in healthy if s.ledger.is_usable]
        self.usable = attached or [s.ledger for s in healthy if not s.is_attached and self._serves(s)]

    async def _look_for_members(self, now_s: float) -> None:
        """Where all engines are gone nobody tells of those that replace them: ask, once a second."""
        if now_s - self._asked_at_s > _ASK_AGAIN_S:
            self._asked_at_s = now_s
            membership = await self._control.refresh()
            if membership is not None:
                self.on_membership(membership)

    async def _tick(self) -> None:
        while True:
            await asyncio.sleep(_TICK_S)
            now_s = self._loop.time()
            for session in list(self._sessions.values()):
                session.renew(now_s)
            if not self._sessions:
                await self._look_for_members(now_s)
            for session, (due_s, _) in list(self._attach_due.items()):
                if now_s > due_s:
                    message = f"{session.engine} did not open a session within {self._timeouts.attach_s:g} s"
                    self._fail_attach(session, DeadlineError(message))
                    self._gone(session.engine, message)
            for engine, (since_s, why) in list(self._suspects.items()):
                if now_s - since_s > self._health.fence_wait_s:
                    self._gone(engine, why)

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        task: asyncio.Task[None] = self._loop.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def check_invariants(self) -> list[RequestRecord]:
        """Raise AssertionError when a ledger and its session disagree; returns every request that is on an engine. For tests."""
        everything: list[RequestRecord] = []
        for session in self._sessions.values():
            mine = session.live()
            assert session.ledger.requests == len(mine), "the ledger miscounts requests"  # noqa: S101
            assert session.ledger.prefill == sum(r.prefill for r in mine), "the ledger miscounts prefill tokens"  # noqa: S101
            everything.extend(mine)
        return everything
