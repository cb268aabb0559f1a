"""The front in a process of its own: uvicorn around the application, without Ray Serve between."""

from __future__ import annotations

import asyncio
import socket

import uvicorn

from raycore.errors import ConfigurationError
from raycore.http.app import HttpApp

STOP_S = 10
"""After a signal, answers that run may take so long; then their requests are aborted."""

KEEP_ALIVE_S = 90
"""Idle connections, as Serve's proxy has it; uvicorn's 5 s would close them under clients that pause between two requests."""


def bound_socket(host: str, port: int) -> socket.socket:
    """A listening socket; port 0 takes a free one. ConfigurationError where it cannot be had."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((host, port))
        listener.listen(2048)
    except OSError as error:
        listener.close()
        raise ConfigurationError(f"cannot listen on {host} port {port}: {error}") from error
    return listener


class HttpServer:
    """Serves an application on a socket while its block is entered, or until a signal ends `wait`."""

    def __init__(self, app: HttpApp, listener: socket.socket) -> None:
        config = uvicorn.Config(
            app,
            log_level="warning",
            access_log=False,
            ws="none",
            lifespan="on",
            timeout_keep_alive=KEEP_ALIVE_S,
            timeout_graceful_shutdown=STOP_S,
            server_header=False,
        )
        self._server = uvicorn.Server(config)
        self._listener = listener
        self._task: asyncio.Task[None] | None = None

    @property
    def port(self) -> int:
        """Where it listens."""
        return self._listener.getsockname()[1]

    async def __aenter__(self) -> HttpServer:
        self._task = asyncio.create_task(self._server.serve(sockets=[self._listener]))
        return self

    async def __aexit__(self, *_: object) -> None:
        self._server.should_exit = True
        await self.wait()

    async def wait(self) -> None:
        """Until it has ended."""
        if self._task is not None:
            await self._task
