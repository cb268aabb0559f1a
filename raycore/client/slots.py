"""The slots of one session: which request each one is, and the taking in of a step's columns.

This is the hottest code of a client. A step's tokens go from the frame's bytes to each request's list; steps that arrive together with an
unchanged batch are turned from rows into columns at once, and each request is woken once however many steps there were.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from raycore.client.journal import RequestRecord
from raycore.engine import FinishReason
from raycore.ids import EngineId, Slot
from raycore.messages import StepColumns
from raycore.routing import EngineLedger

_FIRST_SLOTS = 512
_REASONS = tuple(FinishReason)
"""By value: looking a member up by calling the enum costs more than the rest of an ending."""


class SlotTable:
    """Owns the session's records and its ledger; a slot is free again after its terminal record."""

    def __init__(self, engine: EngineId, size_limit: int, on_finished: Callable[[RequestRecord], None]) -> None:
        self.ledger = EngineLedger(engine)
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

    @property
    def is_full(self) -> bool:
        """Whether every slot is in use."""
        return not self._free and len(self._records) >= self._size_limit

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
        record.cost = record.prompt_tokens + record.sampling.max_tokens
        self.ledger.dispatch(record.cost - len(record.tokens))
        return Slot(slot)

    def free(self, slot: int) -> RequestRecord | None:
        """Take a request off its slot; the engine has nothing of it any more."""
        record = self._records[slot] if 0 <= slot < len(self._records) else None
        if record is not None:
            self._records[slot] = None
            self._sinks[slot] = _no_sink
            self._free.append(slot)
            self.ledger.end(record.cost - len(record.tokens))
            record.session = None
        return record

    def clear(self) -> list[RequestRecord]:
        """The session is over: everything that has no terminal record."""
        left = self.live()
        self._records, self._sinks, self._free, self._slots, self._steps = [], [], [], [], []
        self._news.clear()
        for record in left:
            record.session = None
        return left

    def take(self, columns: StepColumns) -> str | None:
        """Take in one step; the reason why the session cannot go on, if the step does not fit what came before."""
        self.stamp_ns = columns.stamp_ns
        if columns.slots or columns.counts or columns.finished or columns.details or columns.offsets:
            self._distribute()
            if columns.slots:
                self._slots = memoryview(columns.slots).cast("I").tolist()
            if columns.details or columns.offsets:
                problem = self._take_details(columns)
                if problem:
                    return problem
        if columns.counts:
            self._take_ragged(columns)
        elif columns.tokens:
            self._steps.append(columns.tokens)
        if columns.finished:
            self._distribute()
            self._take_finished(columns)
        return None

    def settle(self) -> None:
        """Everything that was ready has been taken: wake each request that has news, once."""
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
                if not waiter.done():
                    waiter.set_result(None)

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
        self.ledger.tokens -= len(steps) * len(slots)
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
        self.ledger.tokens -= len(tokens)
        self._news.update(self._slots)

    def _take_finished(self, columns: StepColumns) -> None:
        records, sinks, free, ledger, news = self._records, self._sinks, self._free, self.ledger, self._news
        on_finished, stamp_ns = self._on_finished, columns.stamp_ns
        for slot, reason in zip(memoryview(columns.finished).cast("I").tolist(), columns.reasons, strict=True):
            record = records[slot]
            if record is None:
                continue
            records[slot] = None
            sinks[slot] = _no_sink
            free.append(slot)
            news.discard(slot)
            ledger.end(record.cost - len(record.tokens))
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

    def _grow(self) -> None:
        size = len(self._records)
        more = min(max(size, _FIRST_SLOTS), self._size_limit - size)
        self._records.extend([None] * more)
        self._sinks.extend([_no_sink] * more)
        self._free.extend(range(size + more - 1, size - 1, -1))


def _no_sink(_token: int) -> None:
    """A token for a slot that is not in use: stale, dropped."""
