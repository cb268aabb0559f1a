"""One consumer of many requests: everything new of all of them in one piece, merged while the consumer is busy."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from typing import Any

from raycore.client.client import EngineCoreClient
from raycore.client.journal import RequestOutput
from raycore.client.stream import RequestStream
from raycore.errors import ClientClosedError, RaycoreError
from raycore.ids import RequestId
from raycore.sampling import SamplingParams


class BatchReader:
    """Requests of one consumer among several of one client. What is not read stays in the client's journal, so a slow consumer gets more
    tokens in one output and costs no more memory. Closing it aborts what runs. Use it on the client's event loop.
    """

    def __init__(self, client: EngineCoreClient) -> None:
        self._client = client
        self._streams: dict[str, Any] = {}
        """Until their last output is taken; held, since a dropped stream aborts its request."""
        self._watches: dict[str, asyncio.Task[None]] = {}
        self._news: dict[str, None] = {}
        self._waiter: asyncio.Future[None] | None = None
        self._is_closed = False

    def __len__(self) -> int:
        return len(self._streams)

    def add(self, prompt: Any, sampling: SamplingParams | None = None, **options: Any) -> RequestId:
        """Send a request, with the options of `generate`; its id. Raises at once for one that cannot be served."""
        if self._is_closed:
            msg = "this reader is closed"
            raise ClientClosedError(msg)
        stream = self._client.generate(prompt, sampling, **options)
        request_id = RequestId(stream.request_id)
        self._streams[request_id] = stream
        self._watch(request_id, stream)
        return request_id

    async def outputs(self, limit_s: float | None = None) -> list[RequestOutput]:
        """Everything new, at least one output; empty when nothing came within `limit_s` seconds, or when nothing is left to come.

        A failed request's last output has `error` set.
        """
        loop = asyncio.get_running_loop()
        until_s = None if limit_s is None else loop.time() + limit_s
        while self._streams:
            outputs = self._take()
            if outputs:
                return outputs
            if self._waiter is not None and not self._waiter.done():
                msg = "this reader is being read already"
                raise RaycoreError(msg)
            self._waiter = loop.create_future()
            if self._streams:
                try:
                    async with asyncio.timeout_at(until_s):
                        await self._waiter
                except TimeoutError:
                    return []
        return []

    async def abort(self, request_ids: Iterable[str]) -> None:
        """End requests of this reader early; each ends with finish reason "abort". Other ids are ignored."""
        await self._client.abort_requests([request_id for request_id in request_ids if request_id in self._streams])

    async def aclose(self) -> None:
        """Abort what runs and forget it. Idempotent."""
        self._is_closed = True
        streams, self._streams = self._streams, {}
        self._news.clear()
        for watch in self._watches.values():
            watch.cancel()
        self._watches.clear()
        for stream in streams.values():
            await stream.aclose()
        self._wake()

    def _watch(self, request_id: str, stream: Any) -> None:
        async def watch() -> None:
            await stream.wait()
            del self._watches[request_id]
            self._news[request_id] = None
            self._wake()

        self._watches[request_id] = asyncio.get_running_loop().create_task(watch())

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    def _take(self) -> list[RequestOutput]:
        news, self._news = self._news, {}
        outputs: list[RequestOutput] = []
        for request_id in news:
            stream = self._streams[request_id]
            try:
                output = stream.take()
            except RaycoreError as error:
                output = RequestOutput(RequestId(request_id), [], rank=stream.rank, error=error)
            if output is not None:
                outputs.append(output)
            if output is None or output.error is not None or (output.finish_reason and isinstance(stream, RequestStream)):
                del self._streams[request_id]
            else:  # a stream of several answers says by None that all have ended
                self._watch(request_id, stream)
        return outputs
