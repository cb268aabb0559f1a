"""The client's requests from admission to their end: the journal, where each one goes, and what becomes of it when an engine is lost."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterable, Sequence
from typing import NoReturn

from raycore.client.admission import Ask, Door
from raycore.client.fan_out import RequestFamilies
from raycore.client.fleet import EngineFleet
from raycore.client.in_flight import InFlight
from raycore.client.journal import RequestOutput, RequestRecord
from raycore.client.meter import ClientMeter
from raycore.client.session import EngineSession
from raycore.config import Limits
from raycore.engine import FinishReason
from raycore.errors import (
    ClientClosedError,
    ConfigurationError,
    DuplicateRequestError,
    ErrorRecord,
    FrameError,
    InvalidRequestError,
    OverloadedError,
    RankLeftError,
    RaycoreError,
    RequestFailedError,
)
from raycore.routing.decisions import Decision, DecisionLog
from raycore.routing.ledger import EngineLedger
from raycore.routing.router import Router
from raycore.tokenizer import Tokenizer

_MAX_DEATHS = 3
"""A request that was on so many dying engines is suspected of killing them and fails alone."""
_FULL_S = 1.0
"""An engine that had no room is asked again after so long at the latest: what waits there may be aborted at any time."""
_NAMED_BY_CALLER = "data_parallel_rank"
"""What decisions are explained by that were the caller's."""
DEATH, LEFT, SESSION_LOST = "death", "left", "session"
"""Why a request is sent again, as the metrics name it."""
_MAX_LOSSES = 8
"""A request under which so many sessions ended, without a token between them, fails alone."""


class RequestDesk:
    """Admits, routes, aborts, replays and ends requests; every record is in `_records` until it is over."""

    def __init__(
        self,
        fleet: EngineFleet,
        router: Router,
        tokenizer: Tokenizer | None,
        *,
        router_name: str,
        client: str,
        replays_deaths: bool,
        limits: Limits,
        clock: Callable[[], float] = time.monotonic,
        meter: ClientMeter | None = None,
    ) -> None:
        self._fleet = fleet
        self._router = router
        self._router_name = router_name
        self._decisions = DecisionLog()
        self._tokenizer = tokenizer
        self._client = client
        self._replays_deaths = replays_deaths
        self._door: Door | None = None
        self._records: dict[str, RequestRecord] = {}
        self._families = RequestFamilies()
        self._in_flight = InFlight(limits.client_requests, limits.client_tokens)
        self._clock = clock
        self._meter = meter
        self._mail: dict[str, RequestRecord] = {}
        self._reader: asyncio.Future[None] | None = None
        self._enders: list[asyncio.Future[None]] = []
        self._closed: ClientClosedError | None = None

    def __len__(self) -> int:
        return len(self._records)

    # -- from callers -----------------------------------------------------------------------------------------------------

    def admit(self, ask: Ask) -> Sequence[RequestRecord]:
        """Check a request, choose its engine and send it, once for each of its answers.

        Raises before anything is sent. All answers go to one engine, so that its prefix cache computes the prompt once.
        """
        if ask.request_id is not None:
            self._check_new(ask.request_id)
        door = self._door
        if door is None:
            if self._fleet.info is None:
                raise self._fleet.no_engine()
            door = self._door = Door(self._fleet.info, self._tokenizer, self._client)
        records = door.admit(ask)
        answers, in_flight, clock = len(records), self._in_flight, self._clock
        if answers > 1:
            for record in records:
                self._check_new(record.request_id)
        in_flight.check(records[0], answers, clock)
        session = self._choose(records[0], answers)
        try:
            for record in records:
                if ask.is_mailed:
                    record.mailbox = self._on_mail
                session.submit(record)
                self._records[record.request_id] = record
                in_flight.begin(record, clock)
        except TypeError as error:  # answers share their tensors, so it is the first that cannot be sent
            msg = f"a tensor of request {records[0].request_id!r} {error}"
            raise InvalidRequestError(msg, request_id=records[0].request_id) from error
        if answers > 1:
            self._families.add(records)
        return records

    def abort(self, record: RequestRecord) -> None:
        """End one request early."""
        self._abort_all([record])

    def abort_ids(self, request_ids: Iterable[str]) -> None:
        """End requests early, one message per engine; ids that are not in flight are ignored. A request's id ends all its answers."""
        wanted: dict[str, RequestRecord] = {}
        for request_id in request_ids:
            record = self._records.get(request_id)
            for found in self._families.of(request_id) if record is None else (record,):
                wanted[found.request_id] = found
        self._abort_all(list(wanted.values()))

    def explain(self, request_id: str) -> Decision | None:
        """Why a request went where it went last; None when that is too long ago."""
        return self._decisions.explain(request_id)

    async def wait_for_mail(self) -> None:
        """Until a mailed request has something new. ClientClosedError when the client ends and nothing is left to read."""
        while not self._mail:
            if self._closed is not None:
                raise self._closed
            if self._reader is None or self._reader.done():
                self._reader = asyncio.get_running_loop().create_future()
            await asyncio.shield(self._reader)

    def take_mail(self) -> list[RequestOutput]:
        """Everything new of all mailed requests; also from another thread than the loop's, which cannot split a step of this."""
        outputs: list[RequestOutput] = []
        for _ in range(len(self._mail)):
            _, record = self._mail.popitem()
            if record.has_news():
                outputs.append(record.take())
        outputs.reverse()  # popitem begins at the newest
        return outputs

    async def wait_until_idle(self, timeout_s: float) -> bool:
        """Wait until no request is in flight; whether it came so far in time."""
        if not self._records:
            return True
        ender: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._enders.append(ender)
        try:
            async with asyncio.timeout(timeout_s):
                await ender
        except TimeoutError:
            return not self._records
        return True

    def close(self, error: ClientClosedError) -> None:
        """Every request fails with `error`."""
        self._closed = error
        for record in list(self._records.values()):
            self._fail(record, error)
        if self._reader is not None and not self._reader.done():
            self._reader.set_result(None)

    # -- from engines -----------------------------------------------------------------------------------------------------

    def on_finished(self, record: RequestRecord) -> None:
        """A request ended on its engine."""
        self._drop(record)
        if record.finish_reason is FinishReason.ERROR:
            detail = record.detail
            kind, text = (detail.error_type, detail.error_message) if detail else ("", "the engine gave no reason")
            record.error = _failed(record, text, kind)

    def on_refused(self, session: EngineSession, record: RequestRecord, error: ErrorRecord) -> None:
        """The engine refused a request at admission; one that it had no room for goes to another that may have."""
        if error.type == OverloadedError.__name__:
            self._on_no_room(session, record, error)
            return
        if error.type in (InvalidRequestError.__name__, FrameError.__name__):
            self._fail(record, InvalidRequestError(error.message, request_id=record.request_id))
        else:
            self._fail(record, _failed(record, error.message, error.type))

    def _on_no_room(self, session: EngineSession, record: RequestRecord, error: ErrorRecord) -> None:
        hint_s = _FULL_S if error.retry_after_s is None else error.retry_after_s
        session.ledger.full_until_s = self._clock() + min(hint_s, _FULL_S)
        record.refusals += 1
        if record.abort_wanted:
            self._end(record, FinishReason.ABORT)
            return
        try:
            if record.pinned_rank is not None or record.refusals >= len(self._fleet.usable):
                self._refuse_for_load(record, f"{session.engine}: {error.message}", hint_s)
            self._choose(record).submit(record)
        except RaycoreError as refusal:
            self._fail(record, refusal)

    @staticmethod
    def _refuse_for_load(record: RequestRecord, text: str, hint_s: float) -> NoReturn:
        raise OverloadedError(f"request {record.request_id!r}: {text}", request_id=record.request_id, retry_after_s=hint_s)

    def on_not_member(self, records: list[RequestRecord]) -> None:
        """An engine takes nothing new: route these again, elsewhere."""
        self._readmit(records)

    def on_session_lost(self, fresh: EngineSession, records: list[RequestRecord], reason: str) -> None:
        """Send the requests of a lost session again, to the same engine."""
        for record in records:
            record.losses = record.losses + 1 if len(record.tokens) == record.tokens_at_loss else 1
            record.tokens_at_loss = len(record.tokens)
            if record.losses > _MAX_LOSSES:
                self._fail(record, _failed(record, f"{record.losses} sessions ended under it: {reason}", "SessionLostError"))
            elif not self._end_if_over(record):
                record.was_admitted = True
                record.prefill = record.prompt_tokens + len(record.tokens)
                fresh.submit(record)
                self._count_replay(SESSION_LOST, record)

    def on_engine_gone(self, session: EngineSession, records: list[RequestRecord], cause: str) -> None:
        """Replay a dead engine's requests elsewhere, or fail them with the cause."""
        engine = session.engine
        again: list[RequestRecord] = []
        for record in records:
            record.deaths += 1
            can_move = self._replays_deaths and record.pinned_rank is None and bool(self._fleet.usable)
            if can_move and record.deaths < _MAX_DEATHS:
                again.append(record)
            else:
                self._fail(record, self._fleet.death_of(engine, cause, f"request {record.request_id!r}: "))
        self._readmit(again, DEATH)

    def on_engine_left(self, session: EngineSession, records: list[RequestRecord]) -> None:
        """Move the requests of an engine that left by the pool's choice; that is no death, and pinned ones end with RankLeftError."""
        engine = session.engine
        for record in records:
            if record.pinned_rank is not None and not self._end_if_over(record):
                message = f"request {record.request_id!r} was pinned to rank {engine.rank}, which left the pool"
                self._fail(record, RankLeftError(message, rank=engine.rank, cause="left the pool"))
        self._readmit([record for record in records if record.pinned_rank is None], LEFT)

    # -- within -----------------------------------------------------------------------------------------------------------

    def _check_new(self, request_id: str) -> None:
        if request_id in self._records or request_id in self._families:
            msg = f"request {request_id!r} is in flight"
            raise DuplicateRequestError(msg, request_id=request_id)

    def _choose(self, record: RequestRecord, answers: int = 1) -> EngineSession:
        """Where a request goes; there is room for `answers` like it."""
        fleet = self._fleet
        record.prefill = record.prompt_tokens + len(record.tokens)
        if record.pinned_rank is not None:
            session = fleet.healthy_of_rank(record.pinned_rank)
            self._decisions.add(record.request_id, session.engine, _NAMED_BY_CALLER, ())
        elif fleet.usable:
            session = self._route(record, fleet.usable)
        else:
            raise fleet.no_engine()
        full_until_s = session.ledger.full_until_s
        if session.room < answers or (full_until_s and not record.was_admitted and full_until_s > self._clock()):
            return self._choose_with_room(record, session, answers, self._clock())
        return session

    def _route(self, record: RequestRecord, ledgers: Sequence[EngineLedger]) -> EngineSession:
        router = self._router
        chosen = router.choose(record, ledgers)
        try:
            session = self._fleet.of_ledger(chosen)
        except (KeyError, TypeError) as error:
            msg = f"router {self._router_name!r} chose {chosen!r}, which is none of the {len(ledgers)} ledgers that it was given"
            raise ConfigurationError(msg) from error
        self._decisions.add(record.request_id, session.engine, self._router_name, router.reasons())
        return session

    def _choose_with_room(self, record: RequestRecord, first: EngineSession, answers: int, now_s: float) -> EngineSession:
        """Another engine than the one that was chosen first, which has no room."""
        fleet = self._fleet
        if record.pinned_rank is None:
            with_slots = [ledger for ledger in fleet.usable if fleet.of_ledger(ledger).room >= answers]
            free = [ledger for ledger in with_slots if ledger.full_until_s <= now_s or record.was_admitted]
            if free:
                record.prefill = record.prompt_tokens + len(record.tokens)
                return self._route(record, free)
            if with_slots:
                until_s = min(ledger.full_until_s for ledger in with_slots)
                self._refuse_for_load(record, "as much waits at every engine as may", until_s - now_s)
        if first.room < answers:
            self._refuse_for_load(record, f"{first.engine} has as many requests of this client as a session may have", _FULL_S)
        self._refuse_for_load(record, f"as much waits at {first.engine} as may", first.ledger.full_until_s - now_s)

    def _readmit(self, records: list[RequestRecord], cause: str = "") -> None:
        """Send requests again with what their callers have already; the streams go on unbroken. `cause`: why that is a replay."""
        for record in records:
            if self._end_if_over(record):
                continue
            record.was_admitted = True
            try:
                session = self._choose(record)
            except RaycoreError as error:
                self._fail(record, error)
                continue
            if cause:
                self._count_replay(cause, record)
            session.submit(record)

    def _end_if_over(self, record: RequestRecord) -> bool:
        """Whether a request that lost its engine needs none any more."""
        if record.is_finished:
            return True
        if record.abort_wanted:
            self._end(record, FinishReason.ABORT)
            return True
        if len(record.tokens) >= record.sampling.max_tokens:
            self._end(record, FinishReason.LENGTH)
            return True
        record.was_replayed = record.was_replayed or bool(record.tokens)
        return False

    def _abort_all(self, records: list[RequestRecord]) -> None:
        by_session: dict[EngineSession, list[RequestRecord]] = {}
        for record in records:
            if record.is_finished or record.abort_wanted:
                continue
            record.abort_wanted = True
            if record.session is None:
                self._end(record, FinishReason.ABORT)
            else:
                by_session.setdefault(record.session, []).append(record)
        for session, group in by_session.items():
            session.abort(group)

    def _on_mail(self, record: RequestRecord) -> None:
        self._mail[record.request_id] = record
        if self._reader is not None and not self._reader.done():
            self._reader.set_result(None)

    def _count_replay(self, cause: str, record: RequestRecord) -> None:
        if self._meter is not None:
            self._meter.replayed(cause, record.served_rank)

    def _end(self, record: RequestRecord, reason: FinishReason) -> None:
        if self._meter is not None:
            self._meter.ended(reason.name.lower(), record.served_rank)
        record.finish_reason = reason
        self._drop(record)
        record.wake()

    def _fail(self, record: RequestRecord, error: RaycoreError) -> None:
        if self._meter is not None:
            self._meter.ended("error", record.served_rank)
        record.error = error
        self._drop(record)
        record.wake()

    def _drop(self, record: RequestRecord) -> None:
        if self._records.pop(record.request_id, None) is not None:
            self._in_flight.end(record)
        if self._families:
            self._families.drop(record)
        if self._enders and not self._records:
            enders, self._enders = self._enders, []
            for ender in enders:
                if not ender.done():
                    ender.set_result(None)

    def check_invariants(self, on_engines: list[RequestRecord]) -> None:
        """Raise AssertionError when the journal and the sessions disagree; for tests."""
        assert {r.request_id for r in on_engines} == set(self._records), "journal and sessions disagree"  # noqa: S101
        self._in_flight.check_invariants(self._records.values())


def _failed(record: RequestRecord, text: str, kind: str) -> RequestFailedError:
    message = f"request {record.request_id!r} failed on rank {record.served_rank}: {text}"
    return RequestFailedError(message, request_id=record.request_id, remote_type=kind, rank=record.served_rank)
