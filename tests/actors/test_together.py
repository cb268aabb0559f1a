"""Work that is begun together ends together."""

from __future__ import annotations

import asyncio

import pytest

from actors.together import all_of


async def test_results_come_in_the_order_of_the_work() -> None:
    second_is_done = asyncio.Event()

    async def first() -> int:
        await second_is_done.wait()
        return 1

    async def second() -> int:
        second_is_done.set()
        return 2

    assert await all_of([first(), second()]) == [1, 2]


async def test_what_runs_beside_a_failure_has_ended_before_the_failure_is_raised() -> None:
    ended = False

    async def goes_on() -> None:
        nonlocal ended
        try:
            await asyncio.Event().wait()
        finally:
            await asyncio.sleep(0)  # what it holds is put down, which may take a while
            ended = True

    async def fails() -> None:
        raise ValueError("it cannot be")

    with pytest.raises(ValueError, match="it cannot be"):
        await all_of([goes_on(), fails()])
    assert ended


async def test_a_caller_that_is_cancelled_takes_the_work_along() -> None:
    begun, ended = asyncio.Event(), asyncio.Event()

    async def goes_on() -> None:
        begun.set()
        try:
            await asyncio.Event().wait()
        finally:
            ended.set()

    caller = asyncio.ensure_future(all_of([goes_on()]))
    await begun.wait()
    caller.cancel()
    with pytest.raises(asyncio.CancelledError):
        await caller
    assert ended.is_set()
