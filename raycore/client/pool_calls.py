"""Calls to all ranks, and to those that are about to join when the call changes engines."""

from __future__ import annotations

import asyncio
import logging
import secrets
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

from raycore.client.fleet import EngineFleet
from raycore.client.session import EngineSession
from raycore.errors import EngineDeadError, RaycoreError

_log = logging.getLogger(__name__)

Ask = Callable[[EngineSession], Awaitable[Any]]
"""Asks one engine; errors as of any call."""


def new_pool_call() -> str:
    """A name for a call that changes the engines of all ranks, by which an engine knows that it has carried it out."""
    return secrets.token_hex(8)


async def ask_each(sessions: Sequence[EngineSession], fleet: EngineFleet, ask: Ask) -> dict[int, Any]:
    """Each rank's result, or its error as the value. NoEngineError without ranks."""
    if not sessions:
        raise fleet.no_engine()
    answers = await asyncio.gather(*(ask(session) for session in sessions), return_exceptions=True)
    for answer in answers:
        if isinstance(answer, BaseException) and not isinstance(answer, RaycoreError):
            raise answer
    return {session.engine.rank: answer for session, answer in zip(sessions, answers, strict=True)}


async def ask_all_and_joiners(fleet: EngineFleet, ask: Ask) -> dict[int, Any]:
    """Each rank's result or error, of those that joined meanwhile too.

    An engine that carries a call out when it knows who joins has told this client before it answers, so those are asked as well; what a
    member did before it knew, it gives to the joiner with its state.
    """
    serving = fleet.sessions()
    joiners = fleet.joiners()
    asked = {session.engine for session in (*serving, *joiners)}
    served = {session.engine.rank for session in serving}
    answers = await ask_each((*serving, *joiners), fleet, ask) if serving else await ask_each((), fleet, ask)
    while fresh := [session for session in (*fleet.sessions(), *fleet.joiners()) if session.engine not in asked]:
        asked.update(session.engine for session in fresh)
        answers.update(await ask_each(fresh, fleet, ask))
    serves_now = {session.engine.rank for session in fleet.sessions()}
    found: dict[int, Any] = {}
    for rank, answer in sorted(answers.items()):
        if rank in served or rank in serves_now:
            found[rank] = answer
        elif isinstance(answer, RaycoreError) and not isinstance(answer, EngineDeadError):
            _log.warning("rank %d, which is about to join: %s", rank, answer)
    return found
