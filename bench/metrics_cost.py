"""What measuring costs a client: the same work with metrics that go to Ray, without, and without again, in turns, on one echo engine.

python -m bench.metrics_cost [--json FILE] [--repeat N]

The client's own CPU decides throughput where many requests are in flight, and says more than the wall clock on a machine that others use
too. The third client has no metrics either: what it differs by is noise.
"""

from __future__ import annotations

import gc
import os
import time
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack

import ray

from actors.metrics import RayMetrics
from bench.engine_process import engine_process
from bench.report import Row, arguments, median, publish
from bench.transport import OPTIONS, PROMPT, burst, on_loop
from raycore.client.client import EngineCoreClient
from raycore.client.control import PoolAccess
from raycore.client.in_process import NoControlPlane
from raycore.client.links import SocketLinks
from raycore.config import Limits
from raycore.sampling import SamplingParams

ROUNDS = 20
"""For each `--repeat`; the order within a round changes each time."""
MOST = 1.02
CLIENTS = ("with", "without", "without again")
Work = Callable[[EngineCoreClient], Awaitable[object]]


def client_of(access: PoolAccess, which: str) -> EngineCoreClient:
    """A client with everything on, or without metrics."""
    metrics = RayMetrics("bench", "echo", "127.0.0.1") if which == "with" else None
    return EngineCoreClient(access, NoControlPlane(), SocketLinks(access, Limits()), metrics=metrics)


async def one_at_a_time(client: EngineCoreClient) -> None:
    """A thousand requests of one token, each after the other."""
    sampling = SamplingParams(max_tokens=1)
    for _ in range(1_000):
        async for _output in client.generate(PROMPT, sampling):
            pass


KINDS: dict[str, Work] = {
    "256 in flight, 128 tokens each": lambda client: burst(client, 1_500, 128),
    "256 in flight, 1 token each": lambda client: burst(client, 8_000, 1),
    "one at a time, 1 token": one_at_a_time,
}
DECIDING = "256 in flight, 128 tokens each"


async def measure(access: PoolAccess, rounds: int) -> dict[str, list[dict[str, tuple[float, float]]]]:
    """Of each kind and round: wall and CPU seconds of each client, the CPU of the loop's thread alone."""
    found: dict[str, list[dict[str, tuple[float, float]]]] = {name: [] for name in KINDS}
    async with AsyncExitStack() as stack:
        clients = {which: await stack.enter_async_context(client_of(access, which)) for which in CLIENTS}
        for client in clients.values():
            await burst(client, 2_000, 8)
        for number in range(rounds):
            for name, work in KINDS.items():
                times: dict[str, tuple[float, float]] = {}
                for which in CLIENTS[number % 3 :] + CLIENTS[: number % 3]:
                    gc.collect()
                    wall, cpu = time.perf_counter(), time.thread_time()
                    await work(clients[which])
                    times[which] = (time.perf_counter() - wall, time.thread_time() - cpu)
                found[name].append(times)
    return found


def rows_of(name: str, rounds: list[dict[str, tuple[float, float]]]) -> list[Row]:
    """Medians of the rounds' own ratios."""
    rows: list[Row] = []
    for index, what in enumerate(("wall", "client CPU")):
        ratios = {which: [times[which][index] / times["without"][index] for times in rounds] for which in CLIENTS}
        value, noise = median(ratios["with"]), median(ratios["without again"])
        spread = sorted(ratios["with"])
        aim = f"quartiles {spread[len(spread) // 4]:.3f} to {spread[3 * len(spread) // 4]:.3f}"
        is_met = value <= MOST * max(1.0, noise) if index and name == DECIDING else None
        aim = f"<= {MOST:g}; {aim}" if is_met is not None else aim
        rows.append(Row(f"{name}: {what}", value, "x without", noise, "without again", aim, is_met, ratios["with"]))
    return rows


def main() -> None:
    """Measure and publish."""
    options = arguments(__doc__ or "").parse_args()
    os.environ.setdefault("RAY_AUTH_MODE", "disabled")
    ray.init(address="local", num_cpus=1, include_dashboard=False, log_to_driver=False)
    try:
        with engine_process(OPTIONS) as access:
            found = on_loop(lambda: measure(access, ROUNDS * options.repeat))
    finally:
        ray.shutdown()
    rows = [row for name, rounds in found.items() for row in rows_of(name, rounds)]
    publish("Metrics: the same work with and without, in turns", rows, options.json)


if __name__ == "__main__":
    main()
