"""Sleep and wake-up over all ranks: a pause of all, each rank's own part, and a resume of all."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable
from typing import Any

import msgspec

from raycore.client.fleet import EngineFleet
from raycore.client.pause_desk import PauseDesk
from raycore.client.pool_calls import ask_all_and_joiners, ask_each, new_pool_call
from raycore.client.session import EngineSession
from raycore.errors import EngineStateError, RaycoreError
from raycore.operations import (
    SLEEP_PHASE,
    WAKE_PHASE,
    Operation,
    PauseArguments,
    SleepArguments,
    SleepPhaseArguments,
    WakeReport,
    WakeUpArguments,
)

PartSender = Callable[[Operation, EngineSession, msgspec.Struct, float, str], Awaitable[Any]]
"""Sends one rank its part, with a deadline and the call's name at all ranks; errors as of any call."""

_SLEEP, _RESUME = "sleep", "resume_scheduler"
_UNDO_LIMIT_S = 600.0
"""As long as a wake-up may take that somebody asks for."""
_SHORTEST_S = 1e-3
"""A deadline that has passed is still a deadline."""


class SleepDesk:
    """Holds nothing between calls: whether a rank sleeps, and whether waking it ends its pause, is known to the rank."""

    def __init__(self, fleet: EngineFleet, pauses: PauseDesk, send: PartSender) -> None:
        self._fleet = fleet
        self._pauses = pauses
        self._send = send

    async def sleep(self, wanted: SleepArguments, limit_s: float) -> None:
        """All ranks asleep, or, with a rank's error, as they were. What is wrong before is said before anything is paused."""
        until_s = asyncio.get_running_loop().time() + limit_s
        await self._check_all(SleepPhaseArguments(level=wanted.level, only_check=True), limit_s)
        was_paused = await self._pauses.is_paused(_SLEEP, limit_s)
        await self._pauses.set_paused(_SLEEP, PauseArguments(mode=wanted.mode, clear_cache=False), _left_s(until_s))
        try:
            await self._ask_all(SLEEP_PHASE, SleepPhaseArguments(level=wanted.level, resumes=not was_paused), _left_s(until_s))
        except BaseException:
            await self._undo(was_paused=was_paused)
            raise

    async def _undo(self, *, was_paused: bool) -> None:
        """Wake what has fallen asleep, also a rank that answered too late: its wake-up comes after its sleep. What fails stays asleep."""
        with contextlib.suppress(RaycoreError):
            await self._ask_all(WAKE_PHASE, WakeUpArguments(), _UNDO_LIMIT_S)
            if not was_paused:
                await self._pauses.set_paused(_RESUME, None, _UNDO_LIMIT_S)

    async def wake_up(self, wanted: WakeUpArguments, limit_s: float) -> bool:
        """Whether all ranks are awake, and go on where the sleep had paused them. EngineStateError when none slept."""
        until_s = asyncio.get_running_loop().time() + limit_s
        reports: list[WakeReport] = await self._ask_all(WAKE_PHASE, wanted, limit_s)
        if all(report.refusal for report in reports):
            raise EngineStateError(reports[0].refusal, method="wake_up")
        is_awake = all(report.is_awake for report in reports)
        if is_awake and any(report.resumes for report in reports):
            await self._pauses.set_paused(_RESUME, None, _left_s(until_s))
        return is_awake

    async def _check_all(self, arguments: msgspec.Struct, limit_s: float) -> None:
        sessions = self._fleet.sessions()
        _values(await ask_each(sessions, self._fleet, lambda s: self._send(SLEEP_PHASE, s, arguments, limit_s, "")))

    async def _ask_all(self, phase: Operation, arguments: msgspec.Struct, limit_s: float) -> list[Any]:
        """Every rank's answer, once all have answered, those that join too; raises the first error."""
        pool_call = new_pool_call()
        return _values(await ask_all_and_joiners(self._fleet, lambda s: self._send(phase, s, arguments, limit_s, pool_call)))


def _values(answers: dict[int, Any]) -> list[Any]:
    for answer in answers.values():
        if isinstance(answer, BaseException):
            raise answer
    return list(answers.values())


def _left_s(until_s: float) -> float:
    return max(_SHORTEST_S, until_s - asyncio.get_running_loop().time())
