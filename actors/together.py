"""Several pieces of work at once: none outlives the others' failure, or each goes on whatever becomes of the others."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Iterable
from typing import Any, TypeVar

Result = TypeVar("Result")


async def all_of(work: Iterable[Coroutine[Any, Any, Result]]) -> list[Result]:
    """Every result, in order. When one fails, or the caller is cancelled, the others are cancelled and have ended before it is raised."""
    tasks = [asyncio.ensure_future(each) for each in work]
    try:
        return await asyncio.gather(*tasks)
    except BaseException:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        raise


async def each_of(work: Iterable[Coroutine[Any, Any, None]], on_failure: Callable[[BaseException], None]) -> None:
    """Do all of it; `on_failure` is called with each failure, in order, when the last has ended."""
    for outcome in await asyncio.gather(*work, return_exceptions=True):
        if outcome is not None:
            on_failure(outcome)
