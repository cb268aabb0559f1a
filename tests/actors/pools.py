"""Pools for tests: opened by a fixture, watched by conditions with limits."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from actors.control_plane import find_actor, find_engine
from actors.driver import PoolDriver
from actors.naming import controller_name
from actors.remote import remote_call
from raycore.client.control import PoolAccess
from raycore.config import HealthConfig, parse_config
from raycore.membership import Member, Membership

LIMIT_S = 40.0

QUICK: dict[str, Any] = {"engine": "echo", "data_parallel_size": 2, "health": HealthConfig(hang_after_s=2.0, first_beat_s=6.0)}
"""Two echo engines; a silence of two seconds is a hang."""


class PoolMaker:
    """Opens pools and closes them when the test ends."""

    def __init__(self) -> None:
        self._drivers: list[PoolDriver] = []

    async def open(self, pool: str, **changes: Any) -> PoolAccess:
        driver = PoolDriver(parse_config({**QUICK, "pool": pool, **changes}))
        self._drivers.append(driver)
        return await driver.open()

    async def close(self) -> None:
        while self._drivers:
            await self._drivers.pop().close()


async def ask_controller(pool: str, method: str, *args: Any) -> Any:
    controller = await find_actor(controller_name(pool))
    return await remote_call(getattr(controller, method).remote(*args), limit_s=LIMIT_S, what=method)


async def ask_engine(pool: str, member: Member, method: str, *args: Any) -> Any:
    actor = await find_engine(pool, member.engine)
    return await remote_call(getattr(actor, method).remote(*args), limit_s=LIMIT_S, what=method)


async def eventually(condition: Callable[[], Awaitable[Any]], what: str, limit_s: float = LIMIT_S) -> Any:
    """The first true answer of the condition, whose raycore errors mean "not yet"."""
    from raycore.errors import RaycoreError

    until_s = time.monotonic() + limit_s
    answer: object = None
    while time.monotonic() < until_s:
        try:
            answer = await condition()
        except RaycoreError as error:
            answer = None
            what = f"{what} ({error})" if str(error) not in what else what
        if answer:
            return answer
        await asyncio.sleep(0.02)
    pytest.fail(f"not within {limit_s:g} s: {what}")


async def membership_when(pool: str, condition: Callable[[Membership], bool]) -> Membership:
    """The controller's membership once it satisfies the condition."""
    seen: list[Membership] = []

    async def check() -> Membership | None:
        seen[:] = [await ask_controller(pool, "membership")]
        return seen[0] if condition(seen[0]) else None

    return await eventually(check, f"the membership of {pool}")


async def warm(pool: str, count: int, limit_s: float = LIMIT_S) -> list[dict[str, Any]]:
    """The pool's standbys once there are so many."""

    async def check() -> list[dict[str, Any]]:
        rows = [row for row in (await ask_controller(pool, "status"))["standbys"] if row["state"] == "warm"]
        return rows if len(rows) == count else []

    return await eventually(check, f"{count} standbys of {pool} are warm", limit_s)
