"""Bars that are drawn while a block runs, and what keeps them up to date."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Callable, Coroutine
from typing import Any

from rich.progress import Progress


@contextlib.asynccontextmanager
async def drawn(progress: Progress, watch: Callable[[], Coroutine[Any, Any, None]]) -> AsyncGenerator[None]:
    """Draws on a terminal only; elsewhere `watch` is not even begun."""
    if not progress.console.is_terminal:
        yield
        return
    watching = asyncio.create_task(watch())
    try:
        with progress:
            yield
    finally:
        watching.cancel()
        await asyncio.gather(watching, return_exceptions=True)
