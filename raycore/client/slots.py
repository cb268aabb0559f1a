"""The slots of one session: which request each one is, and the taking in of a step's columns.

This is the hottest code of a client. A step's tokens go from the frame's bytes to each request's list; steps that arrive together with an
unchanged batch are turned from rows into columns at once, and each request is woken once however many steps there were.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable

import numpy as np

from raycore.client.journal import RequestRecord
from raycore.client.logprobs import rows_of
from raycore.client.meter import DrainMeter
from raycore.engine import FinishReason
from raycore.ids import Slot
from raycore.messages import StepColumns
from raycore.routing.book import LedgerBook
from raycore.routing.ledger import EngineLedger

_FIRST_SLOTS = 512
_REASONS = tuple(FinishReason)
"""By value: looking a member up by calling the enum costs more than the rest of an ending."""


class SlotTable:
    """Owns the session's records and its ledger; a slot is free again after its terminal record."""

    def __init__(
        self,
        ledger: EngineLedger,
        book: LedgerBook,
        size_limit: int,
        on_finished: Callable[[RequestRecord], None],
        meter: DrainMeter | None = None,
    ) -> None:
        self.ledger = ledger
        self._book = book
        self._meter = meter
        self.stamp_ns = 0
        """The engine host's monotonic clock at the end of the last step that was taken in."""
        self._size_limit = size_limit
        self._on_finished = on_finished
        self._records: list[RequestRecord | None] = []
        self._sinks: list[Callable[[int], None]] = []
        self._free: list[int] = []
        self._slots: list[int] = []
        self._steps: list[bytes] = []
        """Token columns of steps with the batch `_slots` that have not been distributed yet."""
        self._news: set[int] = set()
        self._awaiting: deque[RequestRecord] = deque()
        """Requests that had no token since they were added, oldest first: engines begin them in this order, priorities aside."""

    @property
    def room(self) -> int:
        """How many more requests there may be."""
        return len(self._free) + self._size_limit - len(self._records)

    def live(self) -> list[RequestRecord]:
        """Every request that has no terminal record yet."""
        return [record for record in self._records if record is not None]

    def add(self, record: RequestRecord) -> Slot:
        """Give a request a slot and count its work."""
        if not self._free:
            self._grow()
        slot = self._free.pop()
        self._records[slot] = record
        self._sinks[slot] = record.tokens.append
        record.slot = slot
        record.tokens_at_add = len(record.tokens)
        if self._meter is not None and not record.admitted_s:
            record.admitted_s = self._meter.clock()
        self._awaiting.append(record)
        if len(self._awaiting) > 2 * len(self._records):  # one that starves would keep all that came after it
            self._awaiting = deque(each for each in self._awaiting if each.prefill and not each.is_finished)
        self.ledger.dispatch(record.prefill)
        return Slot(slot)

    def free(self, slot: int) -> RequestRecord | None:
        """Take a request off its slot; the engine has nothing of it any more."""
        record = self._records[slot] if 0 <= slot < len(self._records) else None
        if record is not None:
            self._records[slot] = None
            self._sinks[slot] = _no_sink
            self._free.append(slot)
            self.ledger.end(record.prefill)
            record.session = None
        return record

    def clear(self) -> list[RequestRecord]:
        """The session is over: everything that has no terminal record."""
        left = self.live()
        self._records, self._sinks, self._free, self._slots, self._steps = [], [], [], [], []
        self._news.clear()
        self._awaiting.clear()
        for record in left:
            record.session = None
        return left

    def take(self, columns: StepColumns) -> str | None:
        """Take in one step; the reason why the session cannot go on, if the step does not fit what came before."""
        self.stamp_ns = columns.stamp_ns
        if columns.slots or columns.counts or columns.finished or columns.details or columns.offsets or columns.logprobs:
            problem = self._take_change(columns)
            if problem:
                return problem
        meter = self._meter
        if meter is not None and columns.tokens:  # before any request of this step ends
            if not meter.steps:
                meter.first_ns = columns.stamp_ns
            meter.steps += 1
            meter.token_bytes += len(columns.tokens)
        if columns.counts:
            self._take_ragged(columns)
        elif columns.tokens:
            self._steps.append(columns.tokens)
            if columns.logprobs:
                self._distribute()
        if columns.finished:
            self._distribute()
            self._take_finished(columns)
        return None

    def _take_change(self, columns: StepColumns) -> str | None:
        """What a step has beside tokens of the batch before it; why the session cannot go on, if it cannot."""
        self._distribute()
        if columns.slots:
            self._slots = memoryview(columns.slots).cast("I").tolist()
        problem = self._take_details(columns) if columns.details or columns.offsets else None
        if columns.logprobs and not problem:
            self._take_logprobs(columns)
        return problem

    def settle(self) -> None:
        """Everything that was ready has been taken: wake each request that has news, once."""
        if len(self._steps) == 1 and not self._news:
            self._settle_one_step()
        else:
            self._settle_steps()
        if self._awaiting:
            self._count_begun()
        meter = self._meter
        if meter is not None and (meter.steps or meter.ended):
            meter.settle(self.stamp_ns)

    def _count_begun(self) -> None:
        """Prompts that gave their first token are work done. One that was passed over is found out with those before it, or at its end."""
        awaiting, records, meter = self._awaiting, self._records, self._meter
        while awaiting:
            record = awaiting[0]
            if record.slot < len(records) and records[record.slot] is record and record.prefill:
                if len(record.tokens) == record.tokens_at_add:
                    return
                self.ledger.begin(record.prefill)
                record.prefill = 0
                if meter is not None:
                    meter.begun.append(record)
            awaiting.popleft()

    def _settle_steps(self) -> None:
        self._distribute()
        news, self._news = self._news, set()
        records = self._records
        for slot in news:
            record = records[slot]
            if record is None:
                continue
            waiter = record.waiter
            if waiter is None:
                record.wake()
            else:  # what `wake` does, without the call: this is once a token where tokens come one by one
                record.waiter = None
                try:
                    waiter.set_result(None)
                except asyncio.InvalidStateError:
                    continue  # its reader was cancelled

    def _settle_one_step(self) -> None:
        """`_distribute` and `settle` in one pass: steps that come one by one are where a client's time goes token by token."""
        records, slots = self._records, self._slots
        for slot, token in zip(slots, memoryview(self._steps.pop()).cast("I").tolist(), strict=True):
            record = records[slot]
            if record is None:
                continue  # stale
            record.tokens.append(token)
            waiter = record.waiter
            if waiter is None:
                record.wake()
                continue
            record.waiter = None
            try:
                waiter.set_result(None)
            except asyncio.InvalidStateError:
                continue  # its reader was cancelled

    def _distribute(self) -> None:
        """Give each request its tokens of the steps that were kept."""
        steps = self._steps
        if not steps:
            return
        slots = self._slots
        if len(steps) == 1:
            sinks = self._sinks
            for slot, token in zip(slots, memoryview(steps[0]).cast("I").tolist(), strict=True):
                sinks[slot](token)
        else:
            records = self._records
            rows = np.frombuffer(b"".join(steps), np.uint32).reshape(len(steps), len(slots))
            for slot, tokens in zip(slots, rows.T.tolist(), strict=True):
                record = records[slot]
                if record is not None:
                    record.tokens.extend(tokens)
        self._news.update(slots)
        steps.clear()

    def _take_ragged(self, columns: StepColumns) -> None:
        counts = memoryview(columns.counts).cast("I").tolist()
        tokens = memoryview(columns.tokens).cast("I").tolist()
        at = 0
        for slot, count in zip(self._slots, counts, strict=True):
            record = self._records[slot]
            if record is not None:
                record.tokens.extend(tokens[at : at + count])
            at += count
        self._news.update(self._slots)

    def _take_finished(self, columns: StepColumns) -> None:
        records, sinks, free, ledger, news = self._records, self._sinks, self._free, self.ledger, self._news
        on_finished, finished, stamp_ns = self._on_finished, self._book.finished, columns.stamp_ns
        meter = self._meter
        if meter is not None:
            meter.end(columns.reasons)
        for slot, reason in zip(memoryview(columns.finished).cast("I").tolist(), columns.reasons, strict=True):
            record = records[slot]
            if record is None:
                continue
            records[slot] = None
            sinks[slot] = _no_sink
            free.append(slot)
            news.discard(slot)
            if record.prefill:
                if meter is not None:
                    if len(record.tokens) > record.tokens_at_add:
                        meter.begun.append(record)
                    else:
                        meter.ended -= 1  # it had never begun
                ledger.end(record.prefill)
                record.prefill = 0
            else:
                ledger.end(0)
            finished(len(record.tokens))
            record.stamp_ns = stamp_ns
            record.finish_reason = _REASONS[reason]
            on_finished(record)
            record.session = None
            record.wake()

    def _take_details(self, columns: StepColumns) -> str | None:
        for slot, detail in columns.details:
            record = self._records[slot] if slot < len(self._records) else None
            if record is not None:
                record.detail = detail
        for slot, offset in columns.offsets:
            record = self._records[slot] if slot < len(self._records) else None
            if record is not None and offset != len(record.tokens):
                return f"output of {record.request_id} begins at {offset}, {len(record.tokens)} was due"
        return None

    def _take_logprobs(self, columns: StepColumns) -> None:
        """Keep them; `take` adds the tokens right after, so that however the session ends each delivered token has its entry."""
        records = self._records
        for part in columns.logprobs:
            for slot, row in rows_of(part):
                record = records[slot] if slot < len(records) else None
                if record is not None and record.logprobs is not None:
                    record.logprobs.take(part, row)

    def _grow(self) -> None:
        size = len(self._records)
        more = min(max(size, _FIRST_SLOTS), self._size_limit - size)
        self._records.extend([None] * more)
        self._sinks.extend([_no_sink] * more)
        self._free.extend(range(size + more - 1, size - 1, -1))


def _no_sink(_token: int) -> None:
    """A token for a slot that is not in use: stale, dropped."""
