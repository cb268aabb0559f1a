"""One request's stream: an async iterator that aborts its request when it is left early."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from types import TracebackType

import numpy as np
from numpy.typing import NDArray

from raycore.client.collected import collected
from raycore.client.journal import RequestOutput, RequestRecord
from raycore.engine import FinishReason
from raycore.errors import RaycoreError, RequestFailedError


class RequestStream:
    """Yields a `RequestOutput` for each batch of new tokens; the last one has a `finish_reason`.

    Leaving the loop early, closing it or dropping it aborts the request. Tokens that arrive while the consumer is busy come merged.
    """

    __slots__ = ("_abort", "_is_over", "_loop", "_record")

    def __init__(self, record: RequestRecord, abort: Callable[[RequestRecord], None], loop: asyncio.AbstractEventLoop) -> None:
        self._record = record
        self._abort = abort
        self._loop = loop
        self._is_over = False

    @property
    def request_id(self) -> str:
        """The request's id."""
        return self._record.request_id

    @property
    def rank(self) -> int:
        """The rank that serves it now, or did last."""
        return self._record.served_rank

    @property
    def engine_stamp_ns(self) -> int:
        """When the engine ended the step of the newest tokens, on its host's monotonic clock; for latency measurements on one host."""
        session = self._record.session
        return self._record.stamp_ns if session is None else session.stamp_ns

    def __aiter__(self) -> RequestStream:
        return self

    async def __anext__(self) -> RequestOutput:
        """The next new tokens. Raises the request's typed error when it failed."""
        if self._is_over:
            raise StopAsyncIteration
        record = self._record
        while record.cursor >= len(record.tokens) and record.finish_reason is None and record.error is None:
            if record.waiter is None:  # what `_new_waiter` does, without the call: this is once a token
                record.waiter = self._loop.create_future()
                await record.waiter
            else:
                await self._new_waiter()
        if record.finish_reason is None and record.error is None and record.is_plain:
            return record.take_tokens()  # a token like most others: the shortest way
        output = self.take()
        if output is None:
            raise StopAsyncIteration
        return output

    async def wait(self) -> None:
        """Until `take` has something to give."""
        record = self._record
        while not self._is_over and not record.has_news():
            await self._new_waiter()

    def _new_waiter(self) -> asyncio.Future[None]:
        """What the next news resolves. RaycoreError for a second reader, which would rob the first of its wake-up."""
        record = self._record
        if record.waiter is not None and not record.waiter.done():
            raise RaycoreError(f"request {record.request_id!r} has a reader already")
        waiter = record.waiter = self._loop.create_future()
        return waiter

    def take(self) -> RequestOutput | None:
        """What is new, without waiting; None once the stream is over. Raises the request's typed error when it failed."""
        if self._is_over:
            return None
        record = self._record
        if record.error is not None:
            if record.cursor < len(record.tokens):
                return record.take()  # what was delivered first, then the error
            self._is_over = True
            raise record.error
        output = record.take()
        if output.finish_reason is not None:
            self._is_over = True
        return output

    async def collect(self) -> RequestOutput:
        """Everything at once: all tokens and text from here to the end."""
        return collected([output async for output in self])

    async def collect_all(self) -> list[RequestOutput]:
        """The same, as the only answer of the list that a request with `n` answers gives."""
        return [await self.collect()]

    async def vector(self) -> NDArray[np.float32]:
        """The vector [size] of an "embed" request, once it is there. Raises the request's typed error, RequestFailedError for an abort."""
        await self.collect()
        record = self._record
        if record.finish_reason is not FinishReason.STOP or record.detail is None:
            msg = f"request {record.request_id!r} was aborted before its vector was computed"
            raise RequestFailedError(msg, request_id=record.request_id, rank=record.served_rank)
        return np.frombuffer(record.detail.embedding, dtype="<f4").astype(np.float32)

    async def aclose(self) -> None:
        """Stop reading; aborts the request if it runs."""
        self._leave()

    async def __aenter__(self) -> RequestStream:
        return self

    async def __aexit__(self, _kind: type[BaseException] | None, _error: BaseException | None, _trace: TracebackType | None) -> None:
        self._leave()

    def __del__(self) -> None:
        if self._is_over or self._record.is_finished or self._loop.is_closed():
            return
        # the collector may run in any thread; the abort belongs to the loop's
        self._loop.call_soon_threadsafe(self._abort, self._record)

    def _leave(self) -> None:
        if not self._is_over:
            self._is_over = True
            if not self._record.is_finished:
                self._abort(self._record)
