"""Runs one coroutine to its end for a caller without an event loop, in a thread, so that a caller inside a loop (a notebook) works too."""

from __future__ import annotations

import asyncio
import concurrent.futures
import threading
from collections.abc import Coroutine
from typing import Any, TypeVar

Result = TypeVar("Result")


def run_blocking(work: Coroutine[Any, Any, Result]) -> Result:
    """The coroutine's result. An interrupt of the caller cancels it, and is raised when its clean-up is done."""
    outcome: concurrent.futures.Future[Result] = concurrent.futures.Future()
    is_started = threading.Event()
    running: list[tuple[asyncio.AbstractEventLoop, asyncio.Task[Result]]] = []

    async def run() -> Result:
        task = asyncio.ensure_future(work)
        running.append((asyncio.get_running_loop(), task))
        is_started.set()
        return await task

    def main() -> None:
        try:
            outcome.set_result(asyncio.run(run()))
        except BaseException as error:  # noqa: BLE001 -- raised in the caller's thread
            outcome.set_exception(error)

    thread = threading.Thread(target=main, name="raycore-blocking", daemon=True)
    thread.start()
    try:
        return outcome.result()
    except KeyboardInterrupt:
        is_started.wait()
        loop, task = running[0]
        if not outcome.done():
            loop.call_soon_threadsafe(task.cancel)
        concurrent.futures.wait([outcome])
        raise
    finally:
        thread.join()
