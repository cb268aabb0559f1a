"""What a person sees while a pool starts: that it does, and a bar for each rank that loads weights."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator
from typing import Any

import ray
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

from actors.bars import drawn
from actors.naming import NAMESPACE, Role, named_actors
from actors.remote import remote_call
from raycore.console import error_console
from raycore.errors import RaycoreError
from raycore.ids import Rank
from raycore.load_progress import LoadProgress

_POLL_S = 0.3
_ANSWER_S = 2.0


class LoadView:
    """Bars by rank, gone when the engines are up; nothing where the console is no terminal."""

    def __init__(self, pool: str, console: Console | None = None) -> None:
        self._pool = pool
        columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[counted]}"), TimeElapsedColumn())
        self._progress = Progress(*columns, console=console or error_console(), transient=True)
        self._bars: dict[Rank, TaskID] = {}

    @contextlib.asynccontextmanager
    async def shown(self) -> AsyncGenerator[None]:
        """Watches the pool's engines while the block runs."""
        self._progress.add_task(f"{self._pool} starts", total=None, counted="")
        async with drawn(self._progress, self._watch):
            yield

    def show(self, rank: Rank, progress: LoadProgress) -> None:
        """What a rank said."""
        if not progress.total:
            return
        if rank not in self._bars:
            self._bars[rank] = self._progress.add_task(f"{self._pool} rank {rank} loads", total=progress.total, counted="")
        counted = f"{progress.done}/{progress.total} tensors"
        self._progress.update(self._bars[rank], completed=progress.done, total=progress.total, counted=counted)

    async def _watch(self) -> None:
        handles: dict[Rank, Any] = {}
        while True:
            await asyncio.sleep(_POLL_S)
            with contextlib.suppress(RaycoreError, ValueError):  # an engine that does not answer yet, or is gone
                await asyncio.to_thread(self._find, handles)
                for rank, handle in handles.items():
                    self.show(rank, await remote_call(handle.load_progress.remote(), limit_s=_ANSWER_S, what=f"rank {rank}: load progress"))

    def _find(self, handles: dict[Rank, Any]) -> None:
        for name in named_actors(self._pool):
            if name.role is Role.ENGINE and name.rank not in handles:
                handles[name.rank] = ray.get_actor(str(name), NAMESPACE)
