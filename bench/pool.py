"""A pool on Ray: how long it takes to come up, to answer through an actor-hosted engine, to notice a death, and to be gone.

python -m bench.pool [--json FILE] [--repeat N]
"""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import time

import ray

from bench.floors import ray_call_seconds
from bench.report import Row, arguments, median, publish
from bench.transport import OPTIONS, PROMPT, burst, on_loop
from raycore import api
from raycore.errors import EngineDeadError
from raycore.sampling import SamplingParams

POOL = "bench-pool"


async def life(samples: dict[str, list[float]]) -> None:
    """One pool of two echo engines: up, asked, one killed, down."""
    begin = time.perf_counter()
    async with api.launch(pool=POOL, engine="echo", engine_options=OPTIONS, data_parallel_size=2) as client:
        samples["up"].append(time.perf_counter() - begin)
        sampling = SamplingParams(max_tokens=1)
        times: list[float] = []
        for _ in range(500):
            begin = time.perf_counter()
            await client.generate(PROMPT, sampling).collect()
            times.append(time.perf_counter() - begin)
        samples["round trip"].append(median(times))
        await burst(client, 2_000, 1)
        wall, _ = await burst(client, 20_000, 1)
        samples["requests"].append(20_000 / wall)
        wall, _ = await burst(client, 3_000, 128)
        samples["tokens"].append(3_000 * 128 / wall)
        await client.call("pause_scheduler", rank=1, mode="keep")
        stream = client.generate(PROMPT, sampling, data_parallel_rank=1)
        victim = next(member for member in client.membership.members if member.engine.rank == 1)
        begin = time.perf_counter()
        os.kill(victim.pid, signal.SIGKILL)
        try:
            await stream.collect()
        except EngineDeadError:
            samples["death"].append(time.perf_counter() - begin)
        begin = time.perf_counter()
    samples["down"].append(time.perf_counter() - begin)


def main() -> None:
    """Measure and publish."""
    options = arguments(__doc__ or "").parse_args()
    ray.init(
        address="local", num_cpus=4, include_dashboard=False, _node_ip_address="127.0.0.1", logging_level=logging.ERROR, log_to_driver=False
    )
    samples: dict[str, list[float]] = {name: [] for name in ("up", "round trip", "requests", "tokens", "death", "down")}

    floor = median(ray_call_seconds(300)) * 1e6
    logging.disable(logging.WARNING)
    for _ in range(options.repeat):
        on_loop(lambda: asyncio.wait_for(life(samples), 300))
    rows = [
        Row("two echo engines up, Ray running", median(samples["up"]), "s", samples=samples["up"]),
        Row("round trip to an engine in an actor, p50", median(samples["round trip"]) * 1e6, "us", floor, "Ray call"),
        Row("256 in flight, 1 token each, two engines", median(samples["requests"]), "req/s"),
        Row("256 in flight, 128 tokens each, two engines", median(samples["tokens"]), "tokens/s"),
        Row("SIGKILL of an engine to its request's error", median(samples["death"]) * 1e3, "ms", samples=samples["death"]),
        Row("pool down, nothing left", median(samples["down"]) * 1e3, "ms"),
    ]
    ray.shutdown()
    publish("Pool: engine cores as Ray actors", rows, options.json)


if __name__ == "__main__":
    main()
