"""A bar of the weights that go to the ranks that join, while a pool scales and a person watches."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping
from typing import Any

from rich.console import Console
from rich.filesize import decimal
from rich.progress import BarColumn, DownloadColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from actors.bars import drawn
from raycore.console import error_console
from raycore.errors import RaycoreError

_POLL_S = 0.3


class CopyView:
    """Gone when the operation is over; nothing where the console is no terminal. `status`: asks for the pool's."""

    def __init__(self, pool: str, status: Callable[[], Awaitable[Mapping[str, Any]]], console: Console | None = None) -> None:
        self._pool = pool
        self._status = status
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            DownloadColumn(),
            TextColumn("{task.fields[rate]}/s"),
            TimeElapsedColumn(),
        )
        # on the console that `working` draws on, too
        self._progress = Progress(*columns, console=console or error_console(), transient=True)
        self._bar: TaskID | None = None

    @contextlib.asynccontextmanager
    async def shown(self) -> AsyncGenerator[None]:
        """Watches the pool's running operation while the block runs."""
        async with drawn(self._progress, self._watch):
            yield

    def show(self, status: Mapping[str, Any]) -> None:
        """What the controller said."""
        weights = next((operation["weights"] for operation in status["operations"]), None)
        if not weights or not weights["of_bytes"]:
            return
        if self._bar is None:
            self._bar = self._progress.add_task(f"{self._pool}: weights from peers", total=weights["of_bytes"], rate="")
        rate = decimal(int(weights["bytes_per_s"]))
        self._progress.update(self._bar, completed=weights["bytes"], total=weights["of_bytes"], rate=rate)

    async def _watch(self) -> None:
        while True:
            await asyncio.sleep(_POLL_S)
            with contextlib.suppress(RaycoreError):  # a controller that does not answer now
                self.show(await self._status())
