"""Fronts for tests: an application over engine cores in this process, and ways to ask it."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any

import httpx

from raycore.client.client import EngineCoreClient
from raycore.client.control import ScalingReport
from raycore.client.in_process import NoControlPlane
from raycore.http.app import FrontSettings, HttpApp
from raycore.http.keys import digest_of
from tests.support.scripted import Rig, memory_client

MODEL = "scripted"


class Controller(NoControlPlane):
    """A controller that scales in its books only; `error` is what it raises instead."""

    def __init__(self) -> None:
        self.sizes: list[int] = []
        self.error: Exception | None = None
        self.phase = "reserve"

    async def scale(self, target: int) -> ScalingReport:
        if self.error is not None:
            raise self.error
        self.sizes.append(target)
        self.phase = "done"
        return ScalingReport(operation="pool-1", ranks=tuple(range(target)), joined=(1,), phases_s={"reserve": 0.5})

    async def begin_scaling(self, target: int) -> str:
        if self.error is not None:
            raise self.error
        self.sizes.append(target)
        return "pool-1"

    async def status(self) -> dict[str, Any]:
        return {"operations": [{"operation": "pool-1", "phase": self.phase, "target": self.sizes[-1]}] if self.sizes else []}


@dataclass
class Fixture:
    """An application, its client and engine, and how to ask it."""

    app: HttpApp
    client: EngineCoreClient
    rig: Rig
    controller: Controller
    http: httpx.AsyncClient
    headers: dict[str, str] = field(default_factory=dict)

    async def ask(self, method: str, path: str, body: Any = None, **options: Any) -> httpx.Response:
        if body is not None:
            options["content" if isinstance(body, bytes) else "json"] = body
        return await self.http.request(method, path, headers=self.headers, **options)

    async def post(self, path: str, body: Any = None, **options: Any) -> httpx.Response:
        return await self.ask("POST", path, body, **options)

    async def refusal(self, path: str, body: Any, status: int = 400, method: str = "POST") -> dict[str, Any]:
        """The error object of an answer that must be one, in OpenAI's shape."""
        answer = await self.ask(method, path, body)
        assert answer.status_code == status, answer.text
        assert answer.headers["content-type"] == "application/json"
        error = answer.json()["error"]
        assert set(error) == {"message", "type", "param", "code"}
        assert error["message"]
        assert error["type"]
        return error


@contextlib.asynccontextmanager
async def front_of(rig: Rig, *, key: str | None = None, **settings: Any) -> AsyncIterator[Fixture]:
    controller = Controller()
    async with memory_client(rig, control=controller, limits=settings.pop("limits", None)) as client:
        app = HttpApp(client, FrontSettings(model=MODEL, key_digest=digest_of(key), **settings), desk=controller)
        transport = httpx.ASGITransport(app=app)
        async with httpx.AsyncClient(transport=transport, base_url="http://front", timeout=60) as http:
            yield Fixture(app, client, rig, controller, http)


def events_of(text: str) -> list[dict[str, Any]]:
    """The chunks of a stream that ended as it must."""
    blocks = text.split("\n\n")
    assert blocks[-2:] == ["data: [DONE]", ""]
    assert all(block.startswith("data: ") for block in blocks[:-1])
    return [json.loads(block.removeprefix("data: ")) for block in blocks[:-2]]


@dataclass
class RawCall:
    """A request spoken to the application by hand: what it sent, and a caller that may leave."""

    sent: list[dict[str, Any]] = field(default_factory=list)
    left: asyncio.Event = field(default_factory=asyncio.Event)
    has_begun: asyncio.Event = field(default_factory=asyncio.Event)

    async def run(self, app: HttpApp, path: str, body: dict[str, Any], headers: list[tuple[bytes, bytes]] | None = None) -> None:
        raw = json.dumps(body).encode()
        inbox = [
            {"type": "http.request", "body": raw[:7], "more_body": True},
            {"type": "http.request", "body": raw[7:], "more_body": False},
        ]

        async def receive() -> dict[str, Any]:
            if inbox:
                return inbox.pop(0)
            await self.left.wait()
            return {"type": "http.disconnect"}

        async def send(message: Any) -> None:
            self.sent.append(message)
            if message["type"] == "http.response.body":
                self.has_begun.set()

        scope = {
            "type": "http",
            "asgi": {"version": "3.0"},
            "http_version": "1.1",
            "method": "POST",
            "scheme": "http",
            "path": path,
            "raw_path": path.encode(),
            "root_path": "",
            "query_string": b"",
            "headers": headers or [],
            "server": ("front", 80),
        }
        await app(scope, receive, send)
