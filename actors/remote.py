"""The edge to Ray: a bounded await of a remote call, and the one place where Ray's errors become ours."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable
from typing import TypeVar

import ray.exceptions

from raycore.errors import DeadlineError, EngineDeadError, PoolError, RaycoreError
from raycore.ids import EngineId

Result = TypeVar("Result")

_DEATHS = (
    ("killed by `ray.kill`", "killed through Ray"),
    ("out of memory", "killed by Ray's memory monitor: the node was out of memory"),
    ("its owner has died", "its owner died"),
    ("placement group was removed", "its placement group was removed"),
    ("its node has died", "its node died"),
    ("node was terminated", "its node died"),
    ("creation task", "its constructor failed"),
    ("unexpectedly exits with a connection error", "its process died unexpectedly (SIGKILL, the kernel's OOM killer or a crash)"),
    ("intended", "its process exited"),
)
"""What Ray's paragraph contains, and what it means; first match wins."""


async def remote_call(ref: Awaitable[Result], *, limit_s: float, what: str, engine: EngineId | None = None) -> Result:
    """A Ray call's result within `limit_s`; our errors are raised as they are, Ray's as DeadlineError, EngineDeadError or PoolError."""
    try:
        async with asyncio.timeout(limit_s):
            return await ref
    except TimeoutError as error:
        if isinstance(error, RaycoreError):
            raise
        message = f"{what} took longer than {limit_s:g} s"
        raise DeadlineError(message) from error
    except ray.exceptions.RayError as error:
        raise translate(error, what=what, engine=engine) from error


def translate(error: ray.exceptions.RayError, *, what: str, engine: EngineId | None = None) -> RaycoreError:
    """Our error for one of Ray's."""
    if isinstance(error, ray.exceptions.RayTaskError):
        cause = error.cause
        if isinstance(cause, RaycoreError):
            return cause
        text = f"{type(cause).__name__}: {cause}" if cause is not None else str(error)
        return _at_fault(f"{what}: {text}", engine, text)
    if isinstance(error, ray.exceptions.RayActorError):
        text = death_cause(error)
        return _at_fault(f"{what}: {text}", engine, text)
    return PoolError(f"{what}: {type(error).__name__}: {error}")


def death_cause(error: BaseException) -> str:
    """Why an actor ended, in one short line."""
    if isinstance(error, ray.exceptions.RayTaskError):
        return f"its step loop failed: {type(error.cause).__name__}: {error.cause}"
    if isinstance(error, ray.exceptions.ActorUnavailableError):
        return "it cannot be reached"
    text = str(error)
    lowered = text.lower()
    for needle, meaning in _DEATHS:
        if needle in lowered:
            return meaning
    return text.strip().splitlines()[-1][:200] if text.strip() else type(error).__name__


def _at_fault(message: str, engine: EngineId | None, cause: str) -> RaycoreError:
    if engine is None:
        return PoolError(message)
    return EngineDeadError(message, rank=engine.rank, cause=cause)
