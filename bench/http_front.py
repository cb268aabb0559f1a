"""What HTTP adds to the time to the first token: uvicorn alone and through Ray Serve, beside a client in the measuring process.

python -m bench.http_front [--json FILE] [--repeat N] [--streams N] [--step SECONDS] [--without-serve | --haproxy]

Two echo engines with a paced step; so many streams at once, each asked again a random moment after its end. The ways take turns, so that
a machine that others use is slow for all of them alike. Serve's own settings are taken from the environment (RAY_SERVE_...).
"""

from __future__ import annotations

import asyncio
import json
import logging
import multiprocessing
import os
import random
import socket
import time
from collections.abc import Awaitable, Callable
from contextlib import suppress
from multiprocessing.connection import Connection
from typing import Any

import ray

from actors.serve_flags import use_flags
from bench.report import Row, arguments, publish
from bench.transport import on_loop
from raycore import api
from raycore.client.client import EngineCoreClient
from raycore.sampling import SamplingParams

POOL = "bench-http"
PROMPT = "The quick brown fox jumps over the lazy dog"
TOKENS = 24
ROUND = 6
"""Requests of each stream in a turn of one way."""
END = b"\r\n0\r\n\r\n"
"""Of a chunked body."""

Ask = Callable[[], Awaitable[float]]
"""One request to its end: seconds to its first token."""


class Connected:
    """A connection that is kept, spoken to by hand: an HTTP client's own work would be measured as the server's."""

    def __init__(self, port: int) -> None:
        self._port = port
        body = json.dumps({"prompt": PROMPT, "max_tokens": TOKENS, "temperature": 0, "stream": True}).encode()
        head = f"POST /v1/completions HTTP/1.1\r\nhost: 127.0.0.1\r\ncontent-type: application/json\r\ncontent-length: {len(body)}\r\n\r\n"
        self._request = head.encode() + body
        self._streams: Any = None

    async def ask(self) -> float:
        if self._streams is None:
            self._streams = await asyncio.open_connection("127.0.0.1", self._port)
        reader, writer = self._streams
        begin = time.perf_counter()
        writer.write(self._request)
        found, first = b"", 0.0
        while not found.endswith(END):
            part = await reader.read(1 << 16)
            if not part:
                raise RuntimeError(f"the server hung up after {found[:200]!r}")
            found += part
            if not first and b"data: " in found:
                first = time.perf_counter() - begin
        if found.count(b"data: {") < 2 or b" 200 " not in found[:20]:
            raise RuntimeError(f"not a stream: {found[:300]!r}")
        return first

    def close(self) -> None:
        if self._streams is not None:
            self._streams[1].close()


def in_process(client: EngineCoreClient) -> Ask:
    sampling = SamplingParams(max_tokens=TOKENS)

    async def ask() -> float:
        begin, first = time.perf_counter(), 0.0
        async for _ in client.generate(PROMPT, sampling):
            first = first or time.perf_counter() - begin
        return first

    return ask


async def turn(asks: list[Ask], step_s: float, generator: random.Random) -> list[float]:
    """Every stream asks a few times; the first answer of each is not counted: it finds everything cold."""

    async def read(ask: Ask) -> list[float]:
        times: list[float] = []
        for _ in range(ROUND + 1):
            await asyncio.sleep(generator.uniform(0, 2 * step_s))
            times.append(await ask())
        return times[1:]

    return [time_s for times in await asyncio.gather(*map(read, asks)) for time_s in times]


async def measure(ports: dict[str, int], streams: int, step_s: float, repeat: int) -> dict[str, list[float]]:
    found: dict[str, list[float]] = {"client": [], **{name: [] for name in ports}}
    generator = random.Random(0)
    async with api.connect(POOL) as client:
        connections = {name: [Connected(port) for _ in range(streams)] for name, port in ports.items()}
        ways: dict[str, list[Ask]] = {name: [each.ask for each in some] for name, some in connections.items()}
        ways["client"] = [in_process(client)] * streams
        for _ in range(repeat):
            for name, asks in ways.items():
                found[name] += await turn(asks, step_s, generator)
        for some in connections.values():
            for each in some:
                each.close()
    return found


def front(connection: Connection, address: str) -> None:
    """A process with a front behind uvicorn."""
    from raycore.http.app import FrontSettings, HttpApp
    from raycore.http.server import HttpServer, bound_socket

    ray.init(address=address, logging_level=logging.ERROR, log_to_driver=False)

    async def serve() -> None:
        async with api.connect(POOL) as client:
            app = HttpApp(client, FrontSettings(model="echo"))
            async with HttpServer(app, bound_socket("127.0.0.1", 0)) as server:
                connection.send(server.port)
                await asyncio.to_thread(connection.recv)

    with suppress(EOFError):
        on_loop(serve)


def start_serve() -> int:
    """The shipped application of one replica, in front of the same pool; its port."""
    from ray import serve

    from actors.serve_flags import controller_options
    from actors.serving import build

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    logging.getLogger("ray.serve").setLevel(logging.ERROR)
    serve.start(proxy_location="HeadOnly", http_options={"host": "127.0.0.1", "port": port}, controller_options=controller_options())
    serve.run(build({"pool": POOL, "engine": "echo"}), name="bench", route_prefix="/")
    return port


def quantile(samples: list[float], share: float) -> float:
    ordered = sorted(samples)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]


def rows_of(found: dict[str, list[float]]) -> list[Row]:
    rows = []
    for share, name, aim_ms in ((0.5, "p50", 5.0), (0.95, "p95", 15.0)):
        base = quantile(found["client"], share) * 1e3
        rows.append(Row(f"time to first token, {name}: a client in this process", base, "ms", samples=[len(found["client"])]))
        for way, samples in found.items():
            if way != "client":
                added = quantile(samples, share) * 1e3 - base
                rows.append(Row(f"added, {name}: {way}", added, "ms", aim=f"<= {aim_ms:g} ms", is_met=added <= aim_ms))
    return rows


def main() -> None:
    """Measure and publish."""
    parser = arguments(__doc__ or "")
    parser.add_argument("--streams", type=int, default=32)
    parser.add_argument("--step", type=float, default=0.02, help="seconds of an engine's step")
    parser.add_argument("--without-serve", action="store_true")
    parser.add_argument("--haproxy", action="store_true", help="HAProxy instead of Serve's proxy")
    options = parser.parse_args()
    context = ray.init(
        address="local", num_cpus=8, include_dashboard=False, _node_ip_address="127.0.0.1", logging_level=logging.ERROR, log_to_driver=False
    )
    address = context.address_info["address"]
    with api.launch(pool=POOL, engine="echo", engine_options={"base_s": options.step}, data_parallel_size=2):
        ours, theirs = multiprocessing.get_context("spawn").Pipe()
        process = multiprocessing.get_context("spawn").Process(target=front, args=(theirs, address))
        process.start()
        try:
            ports = {"uvicorn": ours.recv()}
            if options.haproxy:
                use_flags(haproxy=True)
            if not options.without_serve:
                ports["Ray Serve"] = start_serve()
            found = on_loop(lambda: measure(ports, options.streams, options.step, options.repeat))
        finally:
            ours.send("end")
            process.join(20)
            process.kill()
            if not options.without_serve:
                from ray import serve

                serve.shutdown()
    ray.shutdown()
    flags = sorted(f"{name}={value}" for name, value in os.environ.items() if name.startswith("RAY_SERVE_"))
    title = f"HTTP: {options.streams} streams, a step of {options.step * 1e3:g} ms {' '.join(flags)}"
    publish(title, rows_of(found), options.json)


if __name__ == "__main__":
    main()
