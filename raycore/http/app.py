"""The ASGI application over a client that was made already: uvicorn serves it alone, a Ray Serve replica inside Serve."""

from __future__ import annotations

import contextlib
import importlib.metadata
from collections.abc import AsyncIterator, Callable
from typing import Any

import msgspec
from starlette.exceptions import HTTPException
from starlette.routing import Route, Router
from starlette.types import Receive, Scope, Send

from raycore.client.client import EngineCoreClient
from raycore.http.admin import Administration, PoolDesk
from raycore.http.chat import ChatCompletions
from raycore.http.completions import Completions
from raycore.http.embeddings import Embeddings
from raycore.http.endpoint import JSON, Access, Asked, Endpoint, Handler, Reply
from raycore.http.errors import HttpError
from raycore.http.front import Front
from raycore.http.keys import KeyGuard
from raycore.http.metrics import CONTENT_TYPE, HttpMetrics
from raycore.http.replies import encode

MAX_BODY_BYTES = 32 << 20
"""More than a million token ids take; a larger body is refused before it is read to its end."""


class FrontSettings(msgspec.Struct, frozen=True, kw_only=True):
    """What an operator decides of the front."""

    model: str
    """The name that callers know the model by."""
    key_digest: bytes | None = None
    """`raycore.http.keys.digest_of` the API key; None: no key is asked for, and administrative routes are closed."""
    max_body_bytes: int = MAX_BODY_BYTES
    replica: str = "0"
    """Tells this front's metrics from those of others of the same pool."""


class HttpApp:
    """The ASGI application. `on_close` runs when the server ends it."""

    def __init__(
        self,
        client: EngineCoreClient,
        settings: FrontSettings,
        *,
        desk: PoolDesk | None = None,
        on_close: Callable[[], Any] | None = None,
    ) -> None:
        self._metrics = HttpMetrics(client, settings.replica)
        self._front = Front(client, settings.model, self._metrics)
        self._guard = KeyGuard(settings.key_digest)
        self._settings = settings
        self._on_close = on_close
        self._router = Router(self._routes(Administration(client, desk)), redirect_slashes=False, lifespan=self._lifespan)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One request, or the application's life."""
        scope["app"] = self  # with it the router raises what it would otherwise answer in plain text
        try:
            await self._router(scope, receive, send)
        except HTTPException as error:
            await _refuse(HttpError(error.status_code, f"{scope['method']} {scope['path']}: {error.detail}", headers=error.headers), send)

    @contextlib.asynccontextmanager
    async def _lifespan(self, _app: Any) -> AsyncIterator[None]:
        await self._front.texts.warm()
        try:
            yield
        finally:
            if self._on_close is not None:
                await self._on_close()

    def _routes(self, admin: Administration) -> list[Route]:
        front = self._front
        key, administration, is_open = Access.KEY, Access.ADMINISTRATION, Access.OPEN
        rows: tuple[tuple[str, str, Handler, Access], ...] = (
            ("POST", "/v1/completions", Completions(front), key),
            ("POST", "/v1/chat/completions", ChatCompletions(front), key),
            ("POST", "/v1/embeddings", Embeddings(front), key),
            ("GET", "/v1/models", self._models, key),
            ("GET", "/v1/models/{model:path}", self._model, key),
            ("POST", "/tokenize", self._tokenize, key),
            ("POST", "/detokenize", self._detokenize, key),
            ("GET", "/health", admin.health, is_open),
            ("GET", "/metrics", self._metrics_text, is_open),
            ("GET", "/version", self._version, key),
            ("POST", "/scale_elastic_ep", admin.scale, administration),
            ("GET POST", "/is_scaling_elastic_ep", admin.is_scaling, key),
            ("GET", "/operations", admin.operations, key),
            ("GET", "/operations/{operation}", admin.operation, key),
            ("POST", "/pause", admin.pause, administration),
            ("POST", "/resume", admin.resume, administration),
            ("GET", "/is_paused", admin.is_paused, key),
            ("POST", "/sleep", admin.sleep, administration),
            ("POST", "/wake_up", admin.wake_up, administration),
            ("GET", "/is_sleeping", admin.is_sleeping, key),
        )
        limit = self._settings.max_body_bytes
        return [
            Route(path, Endpoint(path, handler, access, self._guard, self._metrics, limit), methods=methods.split())
            for methods, path, handler, access in rows
        ]

    async def _models(self, _asked: Asked) -> Reply:
        return Reply(await self._front.models())

    async def _model(self, asked: Asked) -> Reply:
        adapter = await self._front.adapter(asked.path_params["model"])
        return Reply(encode(self._front.describe(adapter)))

    async def _tokenize(self, asked: Asked) -> Reply:
        return Reply(await self._front.texts.tokenize(asked.body))

    async def _detokenize(self, asked: Asked) -> Reply:
        return Reply(await self._front.texts.detokenize(asked.body))

    async def _metrics_text(self, _asked: Asked) -> Reply:
        return Reply(self._metrics.text(), content_type=CONTENT_TYPE)

    async def _version(self, _asked: Asked) -> Reply:
        return Reply(encode({"version": importlib.metadata.version("raycore")}))


async def _refuse(error: HttpError, send: Send) -> None:
    body = error.body()
    fields = {"content-type": JSON, "content-length": str(len(body)), **error.headers}
    headers = [(name.lower().encode(), value.encode()) for name, value in fields.items()]
    await send({"type": "http.response.start", "status": error.status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
