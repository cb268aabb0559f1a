"""One replay of a trace by several client processes: started together, gathered, and put away."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Sequence
from typing import Any

import ray

from actors.load_actor import LoadActor
from actors.remote import remote_call
from raycore.errors import RaycoreError
from raycore.load import LoadShare, Shot
from raycore.traces import TraceRequest

_OPEN_S = 120.0
_CLOSE_S = 10.0
_LEAD_S = 0.5
"""From the order to begin to the first arrival, so that the order has reached everybody."""


async def replay_on_clients(
    pool: str, trace: Sequence[TraceRequest], clients: int, *, drain_limit_s: float, settings: dict[str, Any] | None = None
) -> list[LoadShare]:
    """What became of each client's share: every `clients`-th request each. DeadlineError or PoolError when a process is lost."""
    actors: list[Any] = [LoadActor.options(scheduling_strategy="SPREAD").remote(pool, f"load-{number}") for number in range(clients)]
    limit_s = (trace[-1].arrival_s if trace else 0.0) + drain_limit_s + _LEAD_S + _CLOSE_S
    try:
        await asyncio.gather(*(remote_call(a.open.remote(settings or {}), limit_s=_OPEN_S, what="a load client's start") for a in actors))
        begin_at_s = time.time() + _LEAD_S
        shares: list[list[Shot]] = [list(enumerate(trace))[number::clients] for number in range(clients)]
        calls = [actor.replay.remote(share, begin_at_s, drain_limit_s) for actor, share in zip(actors, shares, strict=True)]
        return await asyncio.gather(*(remote_call(call, limit_s=limit_s, what="a load client's replay") for call in calls))
    finally:
        await asyncio.shield(asyncio.gather(*map(_put_away, actors)))


async def _put_away(actor: Any) -> None:
    with contextlib.suppress(RaycoreError):  # the kill follows anyway
        await remote_call(actor.close.remote(), limit_s=_CLOSE_S, what="a load client's end")
    await asyncio.to_thread(ray.kill, actor)
