"""A request with several answers (`n` above 1): which of them are in flight, and their outputs as one stream."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from types import TracebackType

from raycore.client.collected import collected
from raycore.client.journal import RequestOutput, RequestRecord
from raycore.errors import RaycoreError


class RequestFamilies:
    """Parent ids and their answers in flight. Empty where nobody asks for more than one answer."""

    def __init__(self) -> None:
        self._children: dict[str, dict[str, RequestRecord]] = {}

    def __contains__(self, parent_id: str) -> bool:
        return parent_id in self._children

    def __bool__(self) -> bool:
        return bool(self._children)

    def add(self, records: Sequence[RequestRecord]) -> None:
        """The answers of one request."""
        for record in records:
            if record.parent_id is not None:
                self._children.setdefault(record.parent_id, {})[record.request_id] = record

    def of(self, parent_id: str) -> list[RequestRecord]:
        """Those of its answers that are in flight."""
        return list(self._children.get(parent_id, {}).values())

    def drop(self, record: RequestRecord) -> None:
        """An answer is over."""
        if record.parent_id is not None and record.parent_id in self._children:
            left = self._children[record.parent_id]
            left.pop(record.request_id, None)
            if not left:
                del self._children[record.parent_id]


class _News:
    """Wakes the reader of a stream.

    The answers hold this and not their stream: the stream would hold itself through them, and one that was dropped would abort nothing
    until the collector came by.
    """

    __slots__ = ("waiter",)

    def __init__(self) -> None:
        self.waiter: asyncio.Future[None] | None = None

    def ring(self, _record: RequestRecord) -> None:
        """An answer has something new."""
        waiter, self.waiter = self.waiter, None
        if waiter is not None and not waiter.done():
            waiter.set_result(None)


class FanOutStream:
    """The outputs of all answers of one request, as they come; `RequestOutput.index` says whose each is.

    It ends when all have ended. Leaving it early, closing it or dropping it aborts those that run; so does the error of one, which is
    raised after what was delivered of that answer.
    """

    __slots__ = ("_abort", "_is_over", "_loop", "_news", "_next", "_records", "_unread")

    def __init__(self, records: Sequence[RequestRecord], abort: Callable[[RequestRecord], None], loop: asyncio.AbstractEventLoop) -> None:
        self._records = records
        self._abort = abort
        self._loop = loop
        self._is_over = False
        self._next = 0
        self._unread = set(range(len(records)))
        """Answers whose end was not taken yet."""
        self._news = _News()
        for record in records:
            record.mailbox = self._news.ring

    @property
    def request_id(self) -> str:
        """The request's id."""
        return self._records[0].parent_id or self._records[0].request_id

    @property
    def rank(self) -> int:
        """The rank that serves the first answer now, or did last; all begin on the same."""
        return self._records[0].served_rank

    @property
    def engine_stamp_ns(self) -> int:
        """When the engine ended the step of the newest tokens, on its host's monotonic clock."""
        return max(record.stamp_ns if record.session is None else record.session.stamp_ns for record in self._records)

    def __aiter__(self) -> FanOutStream:
        return self

    async def __anext__(self) -> RequestOutput:
        """The next new tokens of some answer."""
        while True:
            output = self.take()
            if output is not None:
                return output
            if self._is_over:
                raise StopAsyncIteration
            await self.wait()

    async def wait(self) -> None:
        """Until `take` has something to give."""
        while not self._is_over and not any(self._records[index].has_news() for index in self._unread):
            waiter = self._news.waiter
            if waiter is not None and not waiter.done():
                raise RaycoreError(f"request {self.request_id!r} has a reader already")
            waiter = self._news.waiter = self._loop.create_future()
            await waiter

    def take(self) -> RequestOutput | None:
        """What is new of one answer, in turn; None where nothing is, or the stream is over."""
        count = len(self._records)
        for step in range(count):
            index = (self._next + step) % count
            record = self._records[index]
            if self._is_over or index not in self._unread or not record.has_news():
                continue
            self._next = index + 1
            return self._take(index, record)
        return None

    def _take(self, index: int, record: RequestRecord) -> RequestOutput:
        if record.error is not None:
            if record.cursor < len(record.tokens):
                return record.take()
            self._leave()
            raise record.error
        output = record.take()
        if output.finish_reason is not None:
            self._unread.discard(index)
            self._is_over = not self._unread
        return output

    async def collect(self) -> RequestOutput:
        """There is more than one answer: RaycoreError; `collect_all` has them."""
        raise RaycoreError(f"request {self.request_id!r} has {len(self._records)} answers: use collect_all()")

    async def collect_all(self) -> list[RequestOutput]:
        """Every answer as a whole, by index."""
        parts: list[list[RequestOutput]] = [[] for _ in self._records]
        async for output in self:
            parts[output.index].append(output)
        return [collected(part) for part in parts]

    async def aclose(self) -> None:
        """Stop reading; aborts the answers that run."""
        self._leave()

    async def __aenter__(self) -> FanOutStream:
        return self

    async def __aexit__(self, _kind: type[BaseException] | None, _error: BaseException | None, _trace: TracebackType | None) -> None:
        self._leave()

    def __del__(self) -> None:
        if self._is_over or self._loop.is_closed():
            return
        for record in self._records:
            if not record.is_finished:
                # the collector may run in any thread; the abort belongs to the loop's
                self._loop.call_soon_threadsafe(self._abort, record)

    def _leave(self) -> None:
        if not self._is_over:
            self._is_over = True
            for record in self._records:
                if not record.is_finished:
                    self._abort(record)
