"""One route as an ASGI application: key, body, work that ends when its caller leaves, answer, error, and the measure of all that."""

from __future__ import annotations

import asyncio
import contextlib
import enum
import logging
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Coroutine, Mapping
from typing import Any

import msgspec
from starlette.types import Message, Receive, Scope, Send

from raycore.errors import RaycoreError
from raycore.http.errors import SERVER, HttpError, of_raycore
from raycore.http.keys import KeyGuard
from raycore.http.metrics import HttpMetrics
from raycore.http.replies import DONE

logger = logging.getLogger(__name__)

JSON, EVENTS = "application/json", "text/event-stream; charset=utf-8"


class Access(enum.Enum):
    """Who may use a route: anybody, whoever has the key where there is one, or nobody without a key."""

    OPEN = enum.auto()
    KEY = enum.auto()
    ADMINISTRATION = enum.auto()


class Asked(msgspec.Struct, frozen=True):
    """What a handler is given of a request."""

    body: bytes
    query: str
    path_params: Mapping[str, str]


class Reply(msgspec.Struct, frozen=True):
    """A whole answer."""

    body: bytes
    status: int = 200
    content_type: str = JSON


class EventStream(msgspec.Struct, frozen=True):
    """Server-sent events, each sent on its own as it comes; `scope` is left when they end or their caller leaves."""

    events: AsyncGenerator[bytes]
    scope: contextlib.AsyncExitStack


Handler = Callable[[Asked], Awaitable[Reply | EventStream]]


class CallerLeftError(Exception):
    """The caller is gone; nobody waits for an answer."""


class Endpoint:
    """The ASGI application of one route and method."""

    def __init__(self, route: str, handler: Handler, access: Access, guard: KeyGuard, metrics: HttpMetrics, max_body_bytes: int) -> None:
        self._route = route
        self._handler = handler
        self._access = access
        self._guard = guard
        self._metrics = metrics
        self._max_body_bytes = max_body_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        status = _Status(send)
        begin_s = time.perf_counter()
        self._metrics.begin()
        try:
            await self._answer(scope, receive, status)
        except CallerLeftError:
            status.code = 499  # nginx's name for it; nobody sees it but the metrics
        except Exception as error:
            await _say(error, status)
            if not isinstance(error, (RaycoreError, HttpError)):
                logger.exception("%s failed", self._route)
        finally:
            self._metrics.end(self._route, status.code, time.perf_counter() - begin_s)

    async def _answer(self, scope: Scope, receive: Receive, send: _Status) -> None:
        if self._access is not Access.OPEN:
            self._guard.check(scope["headers"], is_administration=self._access is Access.ADMINISTRATION)
        asked = Asked(await _body(receive, self._max_body_bytes), scope["query_string"].decode("latin-1"), scope.get("path_params") or {})
        await _unless_left(receive, self._work(asked, send))

    async def _work(self, asked: Asked, send: _Status) -> None:
        reply = await self._handler(asked)
        if isinstance(reply, Reply):
            await send.whole(reply.status, reply.body, reply.content_type, {})
            return
        async with reply.scope, contextlib.aclosing(reply.events) as events:
            await send.begin(200, EVENTS, {"cache-control": "no-cache", "x-accel-buffering": "no"})
            async for event in events:
                await send.more(event)
            await send.more(b"", is_last=True)


class _Status:
    """Sends, and remembers what was sent."""

    def __init__(self, send: Send) -> None:
        self._send = send
        self.code = 500
        self.is_begun = False
        self.is_events = False

    async def begin(self, code: int, content_type: str, headers: Mapping[str, str]) -> None:
        self.code, self.is_begun, self.is_events = code, True, content_type == EVENTS
        fields = {"content-type": content_type, **headers}
        raw = [(name.encode("latin-1"), value.encode("latin-1")) for name, value in fields.items()]
        await self._send({"type": "http.response.start", "status": code, "headers": raw})

    async def more(self, body: bytes, *, is_last: bool = False) -> None:
        await self._send({"type": "http.response.body", "body": body, "more_body": not is_last})

    async def whole(self, code: int, body: bytes, content_type: str, headers: Mapping[str, str]) -> None:
        await self.begin(code, content_type, {**headers, "content-length": str(len(body))})
        await self.more(body, is_last=True)


async def _say(error: Exception, send: _Status) -> None:
    """Tell the caller; in a stream that has begun as its last event."""
    told = error if isinstance(error, HttpError) else _unexpected(error)
    if not send.is_begun:
        await send.whole(told.status, told.body(), JSON, told.headers)
    elif send.is_events:
        send.code = told.status
        await send.more(b"data: " + told.body() + b"\n\n" + DONE, is_last=True)


def _unexpected(error: Exception) -> HttpError:
    if isinstance(error, RaycoreError):
        return of_raycore(error)
    return HttpError(500, "the server failed; its log says why", kind=SERVER, code="internal_error")


async def _body(receive: Receive, limit_bytes: int) -> bytes:
    parts: list[bytes] = []
    size = 0
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise CallerLeftError
        part = message.get("body", b"")
        size += len(part)
        if size > limit_bytes:
            raise HttpError(413, f"the body is larger than {limit_bytes} bytes", code="body_too_large", headers={"connection": "close"})
        parts.append(part)
        if not message.get("more_body", False):
            return parts[0] if len(parts) == 1 else b"".join(parts)


async def _unless_left(receive: Receive, work: Coroutine[Any, Any, None]) -> None:
    """Do the work; cancel it, and with it what runs on the engines, when the caller leaves. CallerLeftError then."""
    worker = asyncio.ensure_future(work)
    watcher = asyncio.ensure_future(_left(receive))
    try:
        await asyncio.wait((worker, watcher), return_when=asyncio.FIRST_COMPLETED)
        has_left = not worker.done()
    finally:
        watcher.cancel()
        worker.cancel()
        await asyncio.wait((worker, watcher))
    if has_left or worker.cancelled():
        raise CallerLeftError
    worker.result()


async def _left(receive: Receive) -> None:
    message: Message = {"type": ""}
    while message["type"] != "http.disconnect":
        message = await receive()
