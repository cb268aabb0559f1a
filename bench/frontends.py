"""Frontends on a pool: what a client actor costs beside a client of one's own, and how soon a killed client's requests are aborted.

python -m bench.frontends [--json FILE] [--repeat N]
"""

from __future__ import annotations

import asyncio
import logging
import multiprocessing
import os
import signal
import time
from collections.abc import Awaitable, Callable
from multiprocessing.connection import Connection
from typing import Any

import ray

from actors.client_actor import AHEAD
from actors.client_handle import ClientHandle
from actors.launch import pool_access
from bench.floors import ray_call_seconds
from bench.report import Row, arguments, median, publish
from bench.transport import PROMPT, on_loop
from raycore import api
from raycore.client.client import EngineCoreClient
from raycore.client.control import PoolAccess
from raycore.client.in_process import NoControlPlane
from raycore.client.links import SocketLinks
from raycore.sampling import SamplingParams

POOL = "bench-frontends"
STREAMS, TOKENS = 64, 128
PACED_S = 0.02
"""A step's time in the paced pool, as a decode step's of a real model."""
ENDLESS = SamplingParams(max_tokens=1_000_000)
POLL_S = 0.002
CHANNELS = ("stream", "ipc", "tcp")


@ray.remote(num_cpus=0, max_concurrency=4096)
class Bare:
    """The floor: an async actor's streaming generator of small items, with the same back-pressure."""

    @ray.method(num_returns="streaming", _generator_backpressure_num_objects=AHEAD)
    async def items(self, count: int) -> Any:
        for number in range(count):
            yield number
            await asyncio.sleep(0)


async def rate(read: Callable[[], Awaitable[int]]) -> float:
    """Tokens a second of STREAMS readers together."""
    begin = time.perf_counter()
    counts = await asyncio.gather(*(read() for _ in range(STREAMS)))
    if set(counts) != {TOKENS}:
        raise RuntimeError(f"{sorted(set(counts))} tokens instead of {TOKENS}")
    return STREAMS * TOKENS / (time.perf_counter() - begin)


async def streams(client: EngineCoreClient | ClientHandle) -> float:
    sampling = SamplingParams(max_tokens=TOKENS)

    async def read() -> int:
        return sum([len(output.token_ids) async for output in client.generate(PROMPT, sampling)])

    return await rate(read)


async def as_one_stream(handle: ClientHandle) -> float:
    begin, count = time.perf_counter(), 0
    requests: Any = [(PROMPT, SamplingParams(max_tokens=TOKENS), {}) for _ in range(STREAMS)]
    async for outputs in handle.generate_many(requests):
        count += sum(len(output.token_ids) for output in outputs)
    if count != STREAMS * TOKENS:
        raise RuntimeError(f"{count} tokens instead of {STREAMS * TOKENS}")
    return count / (time.perf_counter() - begin)


async def bare_items(actor: Any) -> float:
    async def read() -> int:
        return len([await ref async for ref in actor.items.remote(TOKENS)])

    return await rate(read)


async def round_trips(client: EngineCoreClient | ClientHandle, rounds: int) -> float:
    times: list[float] = []
    for _ in range(rounds):
        begin = time.perf_counter()
        await client.generate(PROMPT, SamplingParams(max_tokens=1)).collect()
        times.append(time.perf_counter() - begin)
    return median(times)


async def actors(samples: dict[str, list[float]]) -> None:
    """Unpaced, so that whoever carries the tokens is the limit; then paced."""
    for name, step_s in (("", 0.0), ("paced ", PACED_S)):
        config: Any = {"pool": POOL, "engine": "echo", "engine_options": {"base_s": step_s, "vocab_size": 32_000}, "data_parallel_size": 2}
        async with api.launch(**config) as client:
            handle = api.client_actor(POOL)
            bare: Any = Bare.remote()
            await handle.status()
            for _ in range(2):  # the first is for warmth
                rows = {
                    "direct": await streams(client),
                    "actor": await streams(handle),
                    "one stream": await as_one_stream(handle),
                    "bare": await bare_items(bare),
                }
            for what, value in rows.items():
                samples[name + what].append(value)
            if not step_s:
                samples["direct round trip"].append(await round_trips(client, 300))
                samples["actor round trip"].append(await round_trips(handle, 300))
            await handle.end()
            ray.kill(bare)


def hold(connection: Connection, access: PoolAccess, over: str) -> None:
    """A client process that streams until it is killed."""

    async def main() -> None:
        links = SocketLinks(access, access.limits, use_tcp=over == "tcp", local_channel="zeromq" if over == "ipc" else "stream")
        async with EngineCoreClient(access, NoControlPlane(), links) as client:
            endless = [client.generate(PROMPT, ENDLESS) for _ in range(32)]
            await asyncio.gather(*(anext(stream) for stream in endless))
            connection.send("running")
            await asyncio.gather(*(stream.collect() for stream in endless))

    asyncio.run(main())


async def running(client: EngineCoreClient) -> int:
    return sum(row["running"] for row in (await client.call_all("collective_rpc", method="stats")).values())


async def deaths(samples: dict[str, list[float]]) -> None:
    """From SIGKILL of a client with 32 streams to no request of it on any engine."""
    options = {"base_s": 0.005, "vocab_size": 32_000, "max_model_len": 1 << 21, "kv_tokens": 1 << 24}
    config: Any = {"pool": POOL, "engine": "echo", "engine_options": options, "data_parallel_size": 2, "tcp": "always"}
    async with api.launch(**config) as client:
        access = await pool_access(POOL)
        for over in CHANNELS:
            ours, theirs = multiprocessing.get_context("spawn").Pipe()
            process = multiprocessing.get_context("spawn").Process(target=hold, args=(theirs, access, over), daemon=True)
            process.start()
            await asyncio.to_thread(ours.recv)
            os.kill(process.pid or 0, signal.SIGKILL)
            begin = time.perf_counter()
            while await running(client):  # noqa: ASYNC110 -- what is measured is in another process
                await asyncio.sleep(POLL_S)
            samples[f"death over {over}"].append(time.perf_counter() - begin)
            await asyncio.to_thread(process.join)


def main() -> None:
    """Measure and publish."""
    options = arguments(__doc__ or "").parse_args()
    ray.init(
        address="local", num_cpus=4, include_dashboard=False, _node_ip_address="127.0.0.1", logging_level=logging.ERROR, log_to_driver=False
    )
    names = [pace + what for pace in ("", "paced ") for what in ("direct", "actor", "one stream", "bare")]
    names += ["direct round trip", "actor round trip", *(f"death over {over}" for over in CHANNELS)]
    samples: dict[str, list[float]] = {name: [] for name in names}
    call_us = median(ray_call_seconds(300)) * 1e6
    logging.disable(logging.WARNING)
    for _ in range(options.repeat):
        on_loop(lambda: asyncio.wait_for(actors(samples), 500))
        on_loop(lambda: asyncio.wait_for(deaths(samples), 200))
    value = {name: median(rows) for name, rows in samples.items()}
    shape = f"{STREAMS} x {TOKENS} tokens"
    floor = (value["bare"], "bare Ray streaming items")
    paced_floor = (value["paced bare"], "bare Ray streaming items")
    rows = [
        Row(f"{shape}: a client of one's own", value["direct"], "tokens/s", *floor),
        Row(f"{shape}: client actor, a stream a request", value["actor"], "tokens/s", *floor),
        Row(f"{shape}: client actor, one stream for all", value["one stream"], "tokens/s", *floor),
        Row(f"paced {PACED_S * 1e3:.0f} ms: a client of one's own", value["paced direct"], "tokens/s", *paced_floor),
        Row(f"paced {PACED_S * 1e3:.0f} ms: client actor, a stream a request", value["paced actor"], "tokens/s", *paced_floor),
        Row(f"paced {PACED_S * 1e3:.0f} ms: client actor, one stream for all", value["paced one stream"], "tokens/s", *paced_floor),
        Row("round trip, p50: a client of one's own", value["direct round trip"] * 1e6, "us", call_us, "Ray call"),
        Row("round trip, p50: client actor", value["actor round trip"] * 1e6, "us", call_us, "Ray call"),
    ]
    rows += [
        Row(f"SIGKILL of a client over {over} to its aborts", (death := value[f"death over {over}"]), "s", aim="<= 2 s", is_met=death <= 2)
        for over in CHANNELS
    ]
    ray.shutdown()
    publish("Frontends", rows, options.json)


if __name__ == "__main__":
    main()
