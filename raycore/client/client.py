"""The engine-core client: sessions with every member, a router, a journal and a table of calls, on one event loop."""

from __future__ import annotations

import asyncio
import logging
import os
import secrets
from collections.abc import Iterable, Sequence
from types import TracebackType
from typing import Any

import msgspec

from raycore.client.admission import Door, Prompt
from raycore.client.calls import CallTable, remote_error
from raycore.client.control import ControlPlane, PoolAccess
from raycore.client.journal import RequestOutput, RequestRecord
from raycore.client.links import Links
from raycore.client.operations import AsyncOperations, arguments_of
from raycore.client.session import EngineSession
from raycore.client.stream import RequestStream
from raycore.config import HealthConfig, Limits, Timeouts
from raycore.engine import EngineInfo, EngineLoad, FinishReason
from raycore.errors import (
    AdmissionError,
    ClientClosedError,
    DeadlineError,
    DisagreementError,
    DuplicateRequestError,
    EngineDeadError,
    ErrorRecord,
    FrameError,
    InvalidRequestError,
    NoEngineError,
    NotSupportedError,
    RaycoreError,
    RequestFailedError,
    SessionLostError,
    UnknownRankError,
)
from raycore.health import Verdict
from raycore.ids import EngineId, Rank, RequestId, SessionId
from raycore.membership import Member, Membership, MemberState
from raycore.messages import CallResult
from raycore.operations import FanOut, Operation
from raycore.routing import EngineLedger, LeastWork, Router
from raycore.sampling import SamplingParams
from raycore.tokenizer import Tokenizer

_log = logging.getLogger(__name__)

_TICK_S = 0.25
_MAX_DEATHS = 3
"""A request that was on so many dying engines is suspected of killing them and fails alone."""
_MAX_LOSSES = 8
"""A request under which so many sessions ended fails alone."""
_FENCE_BY_CONTROLLER_S = 10.0
"""A suspect that nobody fenced for so long is dead to this client."""
_DEATHS_KEPT = 16


class EngineCoreClient:
    """Routes requests to the pool's engines, streams their outputs and resolves utility calls. Use it on one event loop."""

    def __init__(
        self,
        access: PoolAccess,
        control: ControlPlane,
        links: Links,
        *,
        timeouts: Timeouts | None = None,
        limits: Limits | None = None,
        health: HealthConfig | None = None,
        tokenizer: Tokenizer | None = None,
        router: Router | None = None,
        name: str | None = None,
        in_process: bool = False,
    ) -> None:
        self.pool = access.membership.pool
        self.name = name or f"client-{os.getpid()}-{secrets.token_hex(3)}"
        self.membership = access.membership
        self.operations = AsyncOperations(self)
        self.tokenizer = tokenizer
        self._access = access
        self._control = control
        self._links = links
        self._timeouts = timeouts or Timeouts()
        self._limits = limits or Limits()
        self._health = health or HealthConfig()
        self._router: Router = router or LeastWork()
        self._in_process = in_process
        self._sessions: dict[EngineId, EngineSession] = {}
        self._session_of: dict[EngineLedger, EngineSession] = {}
        self._usable: list[EngineLedger] = []
        self._requests: dict[str, RequestRecord] = {}
        self._parked: list[RequestRecord] = []
        self._outbox: dict[str, RequestRecord] = {}
        self._outbox_waiter: asyncio.Future[None] | None = None
        self._suspects: dict[EngineId, tuple[float, str]] = {}
        self._dead: dict[EngineId, str] = {}
        self._attach_due: dict[EngineSession, tuple[float, asyncio.Future[None]]] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._ticker: asyncio.Task[None] | None = None
        self._info: EngineInfo | None = None
        self._door: Door | None = None
        self._is_closed = False
        self._is_started = False

    # -- life -----------------------------------------------------------------------------------------------------------

    async def start(self) -> None:
        """Open a session with every member. DeadlineError or EngineDeadError when one does not answer in time."""
        self._loop = asyncio.get_running_loop()
        self._calls = CallTable(self._loop)
        self._is_started = True
        self._links.start(self._health, self._on_verdict)
        try:
            opened = [self._open_session(member) for member in self.membership.members]
            if not opened:
                msg = f"pool {self.pool!r} has no members"
                raise NoEngineError(msg)
            self._ticker = self._loop.create_task(self._tick(), name="raycore-client-tick")
            await asyncio.gather(*(self._attach_due[session][1] for session in opened))
        except BaseException:
            await self.aclose()
            raise

    async def __aenter__(self) -> EngineCoreClient:
        await self.start()
        return self

    async def __aexit__(self, _kind: type[BaseException] | None, _error: BaseException | None, _trace: TracebackType | None) -> None:
        await self.aclose()

    async def aclose(self) -> None:
        """Leave the pool: running requests are aborted, waiting calls fail with ClientClosedError, nothing of this client is left."""
        if self._is_closed:
            return
        self._is_closed = True
        if self._ticker is not None:
            self._ticker.cancel()
        for task in self._tasks:
            task.cancel()
        pending = [*self._tasks, *([self._ticker] if self._ticker else [])]
        await asyncio.gather(*pending, return_exceptions=True)
        closed = ClientClosedError("the client was closed")
        for record in list(self._requests.values()):
            self._fail(record, closed)
        for _, future in self._attach_due.values():
            future.cancel()
        self._attach_due.clear()
        for session in list(self._sessions.values()):
            self._control.forget(session.engine)
            session.close(farewell=True)
            session.release_records()
        self._sessions.clear()
        self._session_of.clear()
        self._usable.clear()
        if self._is_started:
            self._calls.close()
        if self._outbox_waiter is not None and not self._outbox_waiter.done():
            self._outbox_waiter.set_result(None)
        await self._links.close()
        await self._control.close()

    async def shutdown(self, timeout_s: float | None = None) -> None:
        """End the pool: let running requests finish for `timeout_s` seconds (default: `Timeouts.drain_s`; 0 aborts), then take everything down."""
        drain_s = self._timeouts.drain_s if timeout_s is None else timeout_s
        until_s = self._loop.time() + drain_s
        while self._requests and self._loop.time() < until_s:
            await self._wait_for_end(until_s)
        await self._control.shutdown_pool(max(0.0, until_s - self._loop.time()))
        await self.aclose()

    async def _wait_for_end(self, until_s: float) -> None:
        """Wait until some request may have ended, or the time is over."""
        await asyncio.sleep(min(0.02, max(0.0, until_s - self._loop.time())))

    # -- facts ----------------------------------------------------------------------------------------------------------

    @property
    def info(self) -> EngineInfo:
        """What the engines say of themselves; the strictest of each limit."""
        if self._info is None:
            self._check_open()
            msg = "no engine has answered yet"
            raise NoEngineError(msg)
        return self._info

    def ranks(self) -> tuple[int, ...]:
        """The ranks that serve, in order."""
        return tuple(sorted(engine.rank for engine, session in self._sessions.items() if not session.is_closed))

    def loads(self) -> dict[int, EngineLoad]:
        """Each rank's last reported load."""
        return {engine.rank: session.ledger.load for engine, session in self._sessions.items()}

    def in_flight(self) -> int:
        """Requests of this client that have not ended."""
        return len(self._requests)

    def chat_prompt(self, messages: Sequence[dict[str, str]]) -> list[int]:
        """Token ids of a conversation under the model's chat template."""
        if self.tokenizer is None:
            msg = "this client has no tokenizer for the pool's model"
            raise NotSupportedError(msg)
        return self.tokenizer.apply_chat_template(list(messages))

    # -- requests -------------------------------------------------------------------------------------------------------

    def generate(
        self,
        prompt: Prompt,
        sampling: SamplingParams | None = None,
        *,
        request_id: str | None = None,
        data_parallel_rank: int | None = None,
        priority: int = 0,
        tensors: dict[str, Any] | None = None,
    ) -> RequestStream:
        """Send a request now and stream its outputs. Raises at once for a request that cannot be served."""
        record = self._admit(prompt, sampling, request_id, data_parallel_rank, priority, tensors)
        return RequestStream(record, self._abort_record, self._loop)

    async def add_request(
        self,
        prompt: Prompt,
        sampling: SamplingParams | None = None,
        *,
        request_id: str | None = None,
        data_parallel_rank: int | None = None,
        priority: int = 0,
        tensors: dict[str, Any] | None = None,
    ) -> RequestId:
        """Send a request whose outputs come through `outputs()`."""
        record = self._admit(prompt, sampling, request_id, data_parallel_rank, priority, tensors)
        record.mailbox = self._on_mail
        if record.is_finished:
            self._on_mail(record)
        return record.request_id

    async def outputs(self) -> list[RequestOutput]:
        """Everything new of all requests made with `add_request`, at least one output; a failed request's last output has `error` set."""
        while not self._outbox:
            self._check_open()
            if self._outbox_waiter is None or self._outbox_waiter.done():
                self._outbox_waiter = self._loop.create_future()
            await asyncio.shield(self._outbox_waiter)
        ready, self._outbox = self._outbox, {}
        return [record.take() for record in ready.values()]

    async def abort_requests(self, request_ids: Iterable[str]) -> None:
        """End requests early; ids that are not in flight are ignored. Each ends with finish reason "abort"."""
        self._check_open()
        by_session: dict[EngineSession, list[RequestRecord]] = {}
        for request_id in request_ids:
            record = self._requests.get(request_id)
            if record is None or record.abort_wanted:
                continue
            record.abort_wanted = True
            if record.session is None:
                self._end(record, FinishReason.ABORT)
            else:
                by_session.setdefault(record.session, []).append(record)
        for session, records in by_session.items():
            session.abort(records)

    def _admit(
        self,
        prompt: Prompt,
        sampling: SamplingParams | None,
        request_id: str | None,
        rank: int | None,
        priority: int,
        tensors: dict[str, Any] | None,
    ) -> RequestRecord:
        self._check_open()
        if request_id is not None and request_id in self._requests:
            msg = f"request {request_id!r} is in flight"
            raise DuplicateRequestError(msg, request_id=request_id)
        door = self._door
        if door is None:
            raise NoEngineError(self._why_no_engine())
        record = door.admit(prompt, sampling, request_id, rank, priority, tensors)
        session = self._choose(record)
        self._requests[record.request_id] = record
        session.submit(record)
        return record

    def _choose(self, record: RequestRecord) -> EngineSession:
        if record.pinned_rank is not None:
            return self._pinned(record)
        usable = self._usable
        if not usable:
            raise NoEngineError(self._why_no_engine())
        session = self._session_of[self._router.choose(usable)]
        if session.is_full:
            msg = f"{self._limits.session_requests} requests are in flight on each engine"
            raise AdmissionError(msg, request_id=record.request_id)
        return session

    def _pinned(self, record: RequestRecord) -> EngineSession:
        for engine, session in self._sessions.items():
            if engine.rank == record.pinned_rank and not session.is_closed and engine not in self._suspects:
                return session
        msg = f"rank {record.pinned_rank!r} does not serve; ranks are {list(self.ranks())}"
        raise UnknownRankError(msg, request_id=record.request_id)

    def _why_no_engine(self) -> str:
        causes = "; ".join(f"{engine}: {cause}" for engine, cause in list(self._dead.items())[-4:])
        return f"no engine of pool {self.pool!r} can take work" + (f" ({causes})" if causes else "")

    def _abort_record(self, record: RequestRecord) -> None:
        if record.is_finished or record.abort_wanted or self._is_closed:
            return
        record.abort_wanted = True
        if record.session is None:
            self._end(record, FinishReason.ABORT)
        else:
            record.session.abort([record])

    def _on_mail(self, record: RequestRecord) -> None:
        self._outbox[record.request_id] = record
        waiter = self._outbox_waiter
        if waiter is not None and not waiter.done():
            waiter.set_result(None)

    def _end(self, record: RequestRecord, reason: FinishReason) -> None:
        record.finish_reason = reason
        self._requests.pop(record.request_id, None)
        record.wake()

    def _fail(self, record: RequestRecord, error: RaycoreError) -> None:
        record.error = error
        self._requests.pop(record.request_id, None)
        record.wake()

    def _readmit(self, records: list[RequestRecord]) -> None:
        """Send requests again with what their callers have already; the streams go on unbroken."""
        for record in records:
            if record.is_finished:
                continue
            if record.abort_wanted:
                self._end(record, FinishReason.ABORT)
                continue
            if len(record.tokens) >= record.sampling.max_tokens:
                self._end(record, FinishReason.LENGTH)
                continue
            record.was_replayed = bool(record.tokens) or record.was_replayed
            try:
                session = self._choose(record)
            except RaycoreError as error:
                self._fail(record, error)
                continue
            session.submit(record)

    # -- utility calls --------------------------------------------------------------------------------------------------

    async def call(self, method: str, *, rank: int, timeout_s: float | None = None, **arguments: Any) -> Any:
        """Call an operation on one rank. Errors are typed and name method and rank."""
        operation, struct = self._prepare(method, arguments)
        return await self._call_one(operation, struct, self._session_of_rank(rank), timeout_s)

    async def call_all(self, method: str, *, timeout_s: float | None = None, **arguments: Any) -> dict[int, Any]:
        """Call an operation on every serving rank; each rank's result, or its error as the value."""
        operation, struct = self._prepare(method, arguments)
        sessions = sorted((s for s in self._sessions.values() if not s.is_closed), key=lambda s: s.engine.rank)
        if not sessions:
            raise NoEngineError(self._why_no_engine())
        answers = await asyncio.gather(*(self._call_one(operation, struct, s, timeout_s) for s in sessions), return_exceptions=True)
        for answer in answers:
            if isinstance(answer, BaseException) and not isinstance(answer, Exception):
                raise answer
        return {session.engine.rank: answer for session, answer in zip(sessions, answers, strict=True)}

    async def call_agree(self, method: str, *, timeout_s: float | None = None, **arguments: Any) -> Any:
        """Call an operation on every serving rank; their one result. The first error is raised, unequal results raise DisagreementError."""
        results = await self.call_all(method, timeout_s=timeout_s, **arguments)
        _raise_first(results)
        first, *others = results.values()
        if any(other != first for other in others):
            msg = f"ranks answered {method} differently: {results}"
            raise DisagreementError(msg, method=method, results=results)
        return first

    async def call_any(self, method: str, *, timeout_s: float | None = None, **arguments: Any) -> Any:
        """Call an operation on one serving rank, whichever."""
        ranks = self.ranks()
        if not ranks:
            raise NoEngineError(self._why_no_engine())
        return await self.call(method, rank=ranks[0], timeout_s=timeout_s, **arguments)

    async def call_operation(self, method: str, rank: int | None, timeout_s: float | None, arguments: dict[str, Any]) -> Any:
        """Call with the fan-out that the operation declares, or on one rank."""
        if rank is not None:
            return await self.call(method, rank=rank, timeout_s=timeout_s, **arguments)
        operation, _ = self._prepare(method, arguments)
        match operation.fan_out:
            case FanOut.AGREE:
                return await self.call_agree(method, timeout_s=timeout_s, **arguments)
            case FanOut.ANY:
                return await self.call_any(method, timeout_s=timeout_s, **arguments)
            case FanOut.ALL | FanOut.EVERY_TRUE:
                results = await self.call_all(method, timeout_s=timeout_s, **arguments)
                _raise_first(results)
                return all(results.values()) if operation.fan_out is FanOut.EVERY_TRUE else list(results.values())

    def _prepare(self, method: str, arguments: dict[str, Any]) -> tuple[Operation, msgspec.Struct]:
        self._check_open()
        operation, struct = arguments_of(method, arguments)
        if self._in_process and operation.refused_in_process is not None:
            reason = operation.refused_in_process(struct)
            if reason:
                raise NotSupportedError(reason, method=method)
        return operation, struct

    async def _call_one(self, operation: Operation, arguments: msgspec.Struct, session: EngineSession, timeout_s: float | None) -> Any:
        limit_s = timeout_s if timeout_s is not None else operation.timeout_s or self._timeouts.call_s
        call_id, future = self._calls.open(operation, session, limit_s)
        try:
            session.call(call_id, operation.name, arguments)
            return await future
        except BaseException:
            if self._calls.forget(call_id) is not None:
                session.cancel_call(call_id)
            raise

    def _session_of_rank(self, rank: int) -> EngineSession:
        for engine, session in self._sessions.items():
            if engine.rank == rank and not session.is_closed:
                return session
        msg = f"rank {rank!r} does not serve; ranks are {list(self.ranks())}"
        raise UnknownRankError(msg)

    # -- news from sessions ---------------------------------------------------------------------------------------------

    def on_attached(self, session: EngineSession) -> None:
        """The session is open."""
        due = self._attach_due.pop(session, None)
        if due is not None and not due[1].done():
            due[1].set_result(None)
        self._renew_info()
        self._renew_usable()

    def on_attach_refused(self, session: EngineSession, reason: str) -> None:
        """The engine does not want this client: it is not the one we were told of."""
        self._engine_is_gone(session.engine, f"refused the session: {reason}")

    def on_lost(self, session: EngineSession, reason: str) -> None:
        """Attach anew and send what runs again."""
        if session.is_closed or self._is_closed:
            return
        _log.warning("%s: session with %s lost (%s); attaching anew", self.name, session.engine, reason)
        session.close()
        lost = session.release_records()
        self._calls.fail_session(session, lambda op: SessionLostError(f"{op.name} on {session.engine}: session lost ({reason})"))
        due = self._attach_due.pop(session, None)
        fresh = self._open_session(session.member, replaces=session.id, attached=due[1] if due else None)
        for record in lost:
            record.losses += 1
            if record.losses > _MAX_LOSSES:
                message = f"{record.losses} sessions ended under request {record.request_id!r}: {reason}"
                self._fail(record, RequestFailedError(message, request_id=record.request_id, rank=session.engine.rank))
            elif record.abort_wanted:
                self._end(record, FinishReason.ABORT)
            else:
                record.was_replayed = bool(record.tokens) or record.was_replayed
                fresh.submit(record)

    def on_engine_failed(self, session: EngineSession, error: ErrorRecord) -> None:
        """The engine's loop is over."""
        cause = error.message if error.type == "EngineStopped" else f"{error.type}: {error.message}"
        self._engine_is_gone(session.engine, cause)

    def on_finished(self, record: RequestRecord) -> None:
        """A request ended on its engine."""
        self._requests.pop(record.request_id, None)
        if record.finish_reason is FinishReason.ERROR:
            detail = record.detail
            kind, text = (detail.error_type, detail.error_message) if detail else ("", "the engine gave no reason")
            message = f"request {record.request_id!r} failed on rank {record.served_rank}: {text}"
            record.error = RequestFailedError(message, request_id=record.request_id, remote_type=kind, rank=record.served_rank)

    def on_refused(self, record: RequestRecord, error: ErrorRecord) -> None:
        """The engine refused a request at admission."""
        if error.type in (InvalidRequestError.__name__, FrameError.__name__):
            self._fail(record, InvalidRequestError(error.message, request_id=record.request_id))
        else:
            message = f"request {record.request_id!r} failed on rank {record.served_rank}: {error.message}"
            failed = RequestFailedError(message, request_id=record.request_id, remote_type=error.type, rank=record.served_rank)
            self._fail(record, failed)

    def on_not_member(self, session: EngineSession, records: list[RequestRecord]) -> None:
        """The engine leaves: route again, elsewhere."""
        session.ledger.is_usable = False
        self._renew_usable()
        self._readmit(records)

    def on_call_result(self, session: EngineSession, result: CallResult) -> None:
        """A utility call was answered."""
        call = self._calls.take(result.call_id)
        if call is None:
            return
        if result.error is not None:
            call.future.set_exception(remote_error(result.error, call.operation.name, session.engine))
            return
        try:
            call.future.set_result(session.decoder.decode_part(result.result, call.operation.result))
        except FrameError as error:
            call.future.set_exception(error)

    def on_membership(self, membership: Membership) -> None:
        """Someone told of a membership: keep it if it is newer."""
        if self._is_closed or not membership.supersedes(self.membership):
            return
        self.membership = membership
        causes = {departure.engine: departure.cause for departure in membership.departed}
        for engine in [engine for engine in self._sessions if not membership.has(engine)]:
            self._engine_is_gone(engine, causes.get(engine, "left the pool"))
        for member in membership.members:
            session = self._sessions.get(member.engine)
            if session is None and member.engine not in self._dead:
                self._open_session(member)
            elif session is not None and member.state is MemberState.LEAVING:
                session.ledger.is_usable = False
        self._renew_usable()

    # -- engines ----------------------------------------------------------------------------------------------------------

    def _open_session(
        self, member: Member, replaces: SessionId | None = None, attached: asyncio.Future[None] | None = None
    ) -> EngineSession:
        session = EngineSession(
            member,
            self._links.channel,
            self,
            pool=self.pool,
            client=self.name,
            pid=os.getpid(),
            limits=self._limits,
            files=self._links.files(member),
            replaces=replaces,
        )
        is_new = member.engine not in self._sessions
        old = self._sessions.get(member.engine)
        if old is not None:
            self._session_of.pop(old.ledger, None)
        self._sessions[member.engine] = session
        self._session_of[session.ledger] = session
        self._attach_due[session] = (self._loop.time() + self._timeouts.attach_s, attached or self._loop.create_future())
        if is_new:
            self._links.watch(member)
            self._control.watch(member.engine, self._on_death)
        session.open()
        self._renew_usable()
        return session

    def _on_death(self, engine: EngineId, cause: str) -> None:
        self._engine_is_gone(engine, cause)

    def _engine_is_gone(self, engine: EngineId, cause: str) -> None:
        """The incarnation is dead to this client: everything that waits for it learns so now."""
        session = self._sessions.pop(engine, None)
        if session is None or self._is_closed:
            return
        _log.warning("%s: %s is gone: %s", self.name, engine, cause)
        self._dead[engine] = cause
        while len(self._dead) > _DEATHS_KEPT:
            self._dead.pop(next(iter(self._dead)))
        self._suspects.pop(engine, None)
        self._session_of.pop(session.ledger, None)
        session.close()
        self._links.forget(engine)
        self._control.forget(engine)
        self._renew_usable()
        error = EngineDeadError(f"{engine} is dead: {cause}", rank=engine.rank, cause=cause)
        due = self._attach_due.pop(session, None)
        if due is not None and not due[1].done():
            due[1].set_exception(error)
            due[1].exception()  # whoever waits raises it; if nobody does, it is no surprise
        self._calls.fail_session(session, lambda _op: EngineDeadError(str(error), rank=engine.rank, cause=cause))
        self._settle(session.release_records(), engine, cause)

    def _settle(self, records: list[RequestRecord], engine: EngineId, cause: str) -> None:
        """Replay a dead engine's requests, or fail them with the cause."""
        again: list[RequestRecord] = []
        for record in records:
            record.deaths += 1
            can_move = self._access.on_engine_death == "replay" and record.pinned_rank is None and self._usable
            if can_move and record.deaths < _MAX_DEATHS:
                again.append(record)
            else:
                error = EngineDeadError(f"request {record.request_id!r}: {engine} is dead: {cause}", rank=engine.rank, cause=cause)
                self._fail(record, error)
        self._readmit(again)

    def _on_verdict(self, engine: EngineId, verdict: Verdict, why: str) -> None:
        """The engine's beats changed what we think of it."""
        session = self._sessions.get(engine)
        if session is None:
            return
        if verdict is Verdict.ALIVE:
            self._suspects.pop(engine, None)
        else:
            self._suspects[engine] = (self._loop.time(), why)
            self._spawn(self._control.report_suspect(engine, why))
        self._renew_usable()

    def _renew_usable(self) -> None:
        """Who may get new requests: attached and healthy ones; else any that may still answer."""
        open_ = [s for e, s in self._sessions.items() if not s.is_closed and e not in self._suspects]
        attached = [s.ledger for s in open_ if s.ledger.is_usable]
        self._usable = attached or [s.ledger for s in open_ if not s.is_attached]

    def _renew_info(self) -> None:
        infos = [session.member.info for session in self._sessions.values()]
        strictest = min(infos, key=lambda info: info.max_model_len)
        vocabulary = min(info.vocab_size for info in infos)
        self._info = msgspec.structs.replace(strictest, vocab_size=vocabulary)
        if self._door is None:
            self._door = Door(self._info, self.tokenizer, self.name)

    # -- time ---------------------------------------------------------------------------------------------------------------

    async def _tick(self) -> None:
        while True:
            await asyncio.sleep(_TICK_S)
            now_s = self._loop.time()
            for session in list(self._sessions.values()):
                session.renew(now_s)
            for session, (due_s, future) in list(self._attach_due.items()):
                if now_s > due_s:
                    self._attach_due.pop(session, None)
                    message = f"{session.engine} did not open a session within {self._timeouts.attach_s:g} s"
                    if not future.done():
                        future.set_exception(DeadlineError(message))
                        future.exception()
                    self._engine_is_gone(session.engine, message)
            for engine, (since_s, why) in list(self._suspects.items()):
                if now_s - since_s > _FENCE_BY_CONTROLLER_S:
                    self._engine_is_gone(engine, why)

    def _spawn(self, work: Any) -> None:
        task: asyncio.Task[None] = self._loop.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def _check_open(self) -> None:
        if self._is_closed:
            msg = "the client is closed"
            raise ClientClosedError(msg)
        if not self._is_started:
            msg = "the client has not started"
            raise ClientClosedError(msg)

    def check_invariants(self) -> None:
        """Raise AssertionError when journal, sessions and ledgers disagree; for tests."""
        on_engines = [r for s in self._sessions.values() for r in s.records if r is not None]
        assert {r.request_id for r in on_engines} == set(self._requests), "journal and sessions disagree"  # noqa: S101
        for session in self._sessions.values():
            mine = [r for r in session.records if r is not None]
            assert session.ledger.requests == len(mine), "the ledger miscounts requests"  # noqa: S101
            assert session.ledger.tokens == sum(r.cost - len(r.tokens) for r in mine), "the ledger miscounts tokens"  # noqa: S101


def _raise_first(results: dict[int, Any]) -> None:
    for result in results.values():
        if isinstance(result, Exception):
            raise result
