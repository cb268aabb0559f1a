"""Standbys: how long until one serves as a rank, beside a rank that is started from nothing, and until a killed rank is replaced.

A pool of echo engines on a local Ray, one rank and one standby. Promotion is the phase SPAWN of the operation: the standby binds its
sockets and begins to step. The whole operation and the recovery also hold what every scaling holds: telling everybody, comparing states.

    python -m bench.standby --json standby.json
"""

from __future__ import annotations

import asyncio
import os
import signal
import time

from actors.control_plane import find_actor
from actors.launch import launch
from actors.naming import controller_name
from actors.remote import remote_call
from bench.report import Row, arguments, median, publish
from raycore.client.client import EngineCoreClient
from raycore.sampling import SamplingParams

POOL = "bench-standby"
PROMOTION_AIM_S = 0.1
LIMIT_S = 60.0


async def until_warm(pool: str, limit_s: float, *, count: int | None = None) -> None:
    """Until no operation runs and the pool has so many standbys, or all that it shall have. TimeoutError."""
    controller = await find_actor(controller_name(pool))
    until_s = time.monotonic() + limit_s
    while time.monotonic() < until_s:
        status = await remote_call(controller.status.remote(), limit_s=limit_s, what="status")
        is_idle = all(operation["phase"] in {"done", "undone"} for operation in status["operations"])
        states = [row["state"] == "warm" for row in status["standbys"]]
        if is_idle and sum(states) >= (len(states) if count is None else min(count, len(states))):
            return
        await asyncio.sleep(0.05)
    raise TimeoutError(f"not all standbys are there after {limit_s:g} s")


async def _serve_from(client: EngineCoreClient, rank: int) -> None:
    await client.generate([5], SamplingParams(max_tokens=1), data_parallel_rank=rank).collect()


async def _scale_up(client: EngineCoreClient) -> tuple[float, float]:
    """Seconds of the promotion, and until the new rank has answered."""
    begun_s = time.perf_counter()
    report = await client.scale_elastic_ep(2)
    await _serve_from(client, 1)
    return report.phases_s["spawn"], time.perf_counter() - begun_s


async def _recover(client: EngineCoreClient) -> float:
    """Seconds from the kill of rank 1 until a standby in its place has answered."""
    pid = client.membership.members[1].pid
    begun_s = time.perf_counter()
    os.kill(pid, signal.SIGKILL)
    while [member.pid for member in client.membership.members][1:] in ([pid], []):  # noqa: ASYNC110 -- the client has no event for it
        await asyncio.sleep(0.002)
    await _serve_from(client, 1)
    return time.perf_counter() - begun_s


async def measure(repeat: int) -> list[Row]:
    """Every figure, each the median of `repeat` rounds."""
    promotions: list[float] = []
    warm: list[float] = []
    recoveries: list[float] = []
    cold: list[float] = []
    options = {"pool": POOL, "engine": "echo", "data_parallel_size": 1, "timeouts": {"drain_s": 0.0}}
    async with launch(**options, standby=1) as client:
        for _ in range(repeat):
            await until_warm(POOL, LIMIT_S)
            promotion_s, whole_s = await _scale_up(client)
            promotions.append(promotion_s)
            warm.append(whole_s)
            await until_warm(POOL, LIMIT_S)
            recoveries.append(await _recover(client))
            await until_warm(POOL, LIMIT_S)
            await client.scale_elastic_ep(1)
    async with launch(**options) as client:
        for _ in range(repeat):
            cold.append((await _scale_up(client))[1])
            await client.scale_elastic_ep(1)
    promotion_s = median(promotions)
    floor = {"floor": median(cold), "floor_name": "without a standby"}
    return [
        Row("promotion of a standby", promotion_s, "s", aim="<= 0.1 s", is_met=promotion_s <= PROMOTION_AIM_S, samples=promotions),
        Row("1 -> 2 ranks with a standby, until the new rank answers", median(warm), "s", samples=warm, **floor),
        Row("a killed rank, until a standby in its place answers", median(recoveries), "s", samples=recoveries, **floor),
    ]


def main() -> None:
    options = arguments(__doc__ or "").parse_args()
    publish("standbys (echo engines, one host)", asyncio.run(measure(options.repeat)), options.json)


if __name__ == "__main__":
    main()
