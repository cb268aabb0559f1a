"""The client's requests from admission to their end: the journal, where each one goes, and what becomes of it when an engine is lost."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from typing import Any

from raycore.client.admission import Door, Prompt
from raycore.client.fleet import EngineFleet
from raycore.client.journal import RequestOutput, RequestRecord
from raycore.client.session import EngineSession
from raycore.engine import FinishReason
from raycore.errors import (
    AdmissionError,
    ClientClosedError,
    DuplicateRequestError,
    EngineDeadError,
    ErrorRecord,
    FrameError,
    InvalidRequestError,
    RaycoreError,
    RequestFailedError,
)
from raycore.routing import Router
from raycore.sampling import SamplingParams
from raycore.tokenizer import Tokenizer

_MAX_DEATHS = 3
"""A request that was on so many dying engines is suspected of killing them and fails alone."""
_MAX_LOSSES = 8
"""A request under which so many sessions ended, without a token between them, fails alone."""


class RequestDesk:
    """Admits, routes, aborts, replays and ends requests; every record is in `_records` until it is over."""

    def __init__(self, fleet: EngineFleet, router: Router, tokenizer: Tokenizer | None, *, client: str, replays_deaths: bool) -> None:
        self._fleet = fleet
        self._router = router
        self._tokenizer = tokenizer
        self._client = client
        self._replays_deaths = replays_deaths
        self._door: Door | None = None
        self._records: dict[str, RequestRecord] = {}
        self._mail: dict[str, RequestRecord] = {}
        self._reader: asyncio.Future[None] | None = None
        self._enders: list[asyncio.Future[None]] = []
        self._closed: ClientClosedError | None = None

    def __len__(self) -> int:
        return len(self._records)

    # -- from callers -----------------------------------------------------------------------------------------------------

    def admit(
        self,
        prompt: Prompt,
        sampling: SamplingParams | None,
        request_id: str | None,
        rank: int | None,
        priority: int,
        tensors: dict[str, Any] | None,
        *,
        detokenize: bool | None = None,
        is_mailed: bool = False,
    ) -> RequestRecord:
        """Check a request, choose its engine and send it; `is_mailed`: its outputs come through `outputs`.

        Raises before anything is sent.
        """
        if request_id is not None and request_id in self._records:
            msg = f"request {request_id!r} is in flight"
            raise DuplicateRequestError(msg, request_id=request_id)
        door = self._door
        if door is None:
            if self._fleet.info is None:
                raise self._fleet.no_engine()
            door = self._door = Door(self._fleet.info, self._tokenizer, self._client)
        record = door.admit(prompt, sampling, request_id, rank, priority, tensors, detokenize=detokenize)
        session = self._choose(record)
        if is_mailed:
            record.mailbox = self._on_mail
        try:
            session.submit(record)
        except TypeError as error:
            msg = f"a tensor of request {record.request_id!r} {error}"
            raise InvalidRequestError(msg, request_id=record.request_id) from error
        self._records[record.request_id] = record
        return record

    def abort(self, record: RequestRecord) -> None:
        """End one request early."""
        self._abort_all([record])

    def abort_ids(self, request_ids: Iterable[str]) -> None:
        """End requests early, one message per engine; ids that are not in flight are ignored."""
        self._abort_all([self._records[i] for i in dict.fromkeys(request_ids) if i in self._records])

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
            await asyncio.wait_for(ender, timeout_s)
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

    def on_refused(self, record: RequestRecord, error: ErrorRecord) -> None:
        """The engine refused a request at admission."""
        if error.type in (InvalidRequestError.__name__, FrameError.__name__):
            self._fail(record, InvalidRequestError(error.message, request_id=record.request_id))
        else:
            self._fail(record, _failed(record, error.message, error.type))

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
                fresh.submit(record)

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
                message = f"request {record.request_id!r}: {engine} is dead: {cause}"
                self._fail(record, EngineDeadError(message, rank=engine.rank, cause=cause))
        self._readmit(again)

    # -- within -----------------------------------------------------------------------------------------------------------

    def _choose(self, record: RequestRecord) -> EngineSession:
        fleet = self._fleet
        if record.pinned_rank is not None:
            session = fleet.healthy_of_rank(record.pinned_rank)
        elif fleet.usable:
            session = fleet.of_ledger(self._router.choose(fleet.usable))
        else:
            raise fleet.no_engine()
        if session.is_full and record.pinned_rank is None:
            free = [ledger for ledger in fleet.usable if not fleet.of_ledger(ledger).is_full]
            if free:
                return fleet.of_ledger(self._router.choose(free))
        if session.is_full:
            msg = f"{session.engine} has as many requests of this client as a session may have"
            raise AdmissionError(msg, request_id=record.request_id)
        return session

    def _readmit(self, records: list[RequestRecord]) -> None:
        """Send requests again with what their callers have already; the streams go on unbroken."""
        for record in records:
            if self._end_if_over(record):
                continue
            try:
                session = self._choose(record)
            except RaycoreError as error:
                self._fail(record, error)
                continue
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

    def _end(self, record: RequestRecord, reason: FinishReason) -> None:
        record.finish_reason = reason
        self._drop(record)
        record.wake()

    def _fail(self, record: RequestRecord, error: RaycoreError) -> None:
        record.error = error
        self._drop(record)
        record.wake()

    def _drop(self, record: RequestRecord) -> None:
        self._records.pop(record.request_id, None)
        if self._enders and not self._records:
            enders, self._enders = self._enders, []
            for ender in enders:
                if not ender.done():
                    ender.set_result(None)

    def check_invariants(self, on_engines: list[RequestRecord]) -> None:
        """Raise AssertionError when the journal and the sessions disagree; for tests."""
        assert {r.request_id for r in on_engines} == set(self._records), "journal and sessions disagree"  # noqa: S101


def _failed(record: RequestRecord, text: str, kind: str) -> RequestFailedError:
    message = f"request {record.request_id!r} failed on rank {record.served_rank}: {text}"
    return RequestFailedError(message, request_id=record.request_id, remote_type=kind, rank=record.served_rank)
