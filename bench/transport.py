"""The data plane: async client and echo engine in different processes, with all that the product does, beside floors of the same run.

python -m bench.transport [--json FILE] [--repeat N] [--skip-ray]
"""

from __future__ import annotations

import asyncio
import gc
import os
import resource
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import numpy as np

from bench.engine_process import engine_process
from bench.floors import BarePair, copy_seconds, ray_call_seconds
from bench.report import Row, arguments, median, publish
from raycore.client.blocking import BlockingClient, new_event_loop
from raycore.client.client import EngineCoreClient
from raycore.client.control import PoolAccess
from raycore.client.in_process import NoControlPlane
from raycore.client.links import SocketLinks
from raycore.config import Limits
from raycore.ids import SessionId
from raycore.membership import Member
from raycore.metrics import Metric
from raycore.sampling import SamplingParams
from raycore.transport.channel import Buffer, ClientChannel, Message

PROMPT = list(range(1, 17))
IN_FLIGHT = 256
OPTIONS = {"vocab_size": 32_000, "max_sequences": IN_FLIGHT}
UTILITY_IN_FLIGHT = 64
TENSOR_BYTES = 16 << 20


class CountingLinks(SocketLinks):
    """The product's links, with the bytes that each channel received counted."""

    def __init__(self, access: PoolAccess) -> None:
        super().__init__(access, Limits())
        self.received_bytes = 0

    def channel(self, member: Member, session: SessionId) -> ClientChannel:
        """A channel that counts."""
        return _CountingChannel(super().channel(member, session), self)


class _CountingChannel:
    def __init__(self, inner: ClientChannel, links: CountingLinks) -> None:
        self._inner = inner
        self._links = links

    def open(self, on_messages: Callable[[list[Message]], None], on_closed: Callable[[str, bool], None]) -> None:
        def count(messages: list[Message]) -> None:
            self._links.received_bytes += sum(memoryview(part).nbytes for message in messages for part in message)
            on_messages(messages)

        self._inner.open(count, on_closed)

    def send(self, message: Sequence[Buffer]) -> None:
        self._inner.send(message)

    def close(self) -> None:
        self._inner.close()

    def flush_and_close(self) -> None:
        self._inner.flush_and_close()


class NobodySink:
    """Metrics are counted as in a pool, and given to nobody: what Ray's agents cost is `bench.metrics_cost`'s."""

    def record(self, metric: Metric, value: float, tags: Mapping[str, str]) -> None:
        """Nothing."""


@asynccontextmanager
async def client_of(access: PoolAccess, links: SocketLinks | None = None) -> AsyncIterator[EngineCoreClient]:
    """A started client."""
    client = EngineCoreClient(access, NoControlPlane(), links or SocketLinks(access, Limits()), metrics=NobodySink())
    async with client:
        yield client


def on_loop(work: Callable[[], Awaitable[Any]]) -> Any:
    """Run on the loop that the product's own façade uses."""
    loop = new_event_loop()
    try:
        return loop.run_until_complete(work())
    finally:
        loop.close()


async def burst(client: EngineCoreClient, requests: int, tokens: int) -> tuple[float, float]:
    """`requests` requests from 256 tasks, each awaiting its own; wall and client CPU seconds."""
    sampling = SamplingParams(max_tokens=tokens)
    left = requests

    async def worker() -> None:
        nonlocal left
        while left > 0:
            left -= 1
            count = 0
            async for output in client.generate(PROMPT, sampling):
                count += len(output.token_ids)
            if count != tokens:
                raise RuntimeError(f"{count} tokens instead of {tokens}")

    cpu, wall = time.process_time(), time.perf_counter()
    await asyncio.gather(*(worker() for _ in range(IN_FLIGHT)))
    return time.perf_counter() - wall, time.process_time() - cpu


def round_trip(repeat: int, ray_s: float | None) -> list[Row]:
    """One request at a time, one token, each end on its own CPU."""
    rounds = 3000

    async def measure(access: PoolAccess) -> float:
        async with client_of(access) as client:
            sampling = SamplingParams(max_tokens=1)
            times: list[float] = []
            for _ in range(rounds):
                begin = time.perf_counter()
                async for _output in client.generate(PROMPT, sampling):
                    pass
                times.append(time.perf_counter() - begin)
            return median(times)

    mine: list[float] = []
    sleeping: list[float] = []
    bare: list[float] = []
    everywhere = os.sched_getaffinity(0)
    cpus = sorted(everywhere)
    pair = BarePair(cpu=cpus[-1])
    with (
        engine_process(OPTIONS, cpu=cpus[-1]) as access,
        engine_process(OPTIONS, cpu=cpus[-1], busy_poll_s=0.0) as sleeper,
    ):
        os.sched_setaffinity(0, {cpus[0]})
        try:
            for _ in range(repeat):
                bare.append(median(pair.seconds(1, 1, rounds)))
                mine.append(on_loop(lambda: measure(access)))
                sleeping.append(on_loop(lambda: measure(sleeper)))
        finally:
            os.sched_setaffinity(0, everywhere)
            pair.close()
    value, floor, sleeping_value = median(mine) * 1e6, median(bare) * 1e6, median(sleeping) * 1e6
    rows = [
        Row("round trip, 1 token, p50, pinned", value, "us", floor, "bare pyzmq", "<= 1.2 x bare", value <= 1.2 * floor, mine),
        Row(
            "  with limits.busy_poll_s = 0: the engine sleeps at once",
            sleeping_value,
            "us",
            floor,
            "bare pyzmq",
            "<= 1.2 x bare",
            sleeping_value <= 1.2 * floor,
            sleeping,
        ),
    ]
    if ray_s is not None:
        rows.append(Row("round trip beside a Ray actor call", value, "us", ray_s * 1e6, "Ray call", "<= 0.2 x", value <= 0.2e6 * ray_s))
    return rows


def throughput(repeat: int) -> list[Row]:
    """256 in flight, each awaited by its own task, 1 and 128 tokens each; bytes a token."""
    one: list[tuple[float, float]] = []
    many: list[tuple[float, float]] = []
    bare_one: list[float] = []
    bare_many: list[float] = []
    bytes_a_token: list[float] = []
    n_one, n_many = 50_000, 6_000

    async def measure(access: PoolAccess) -> None:
        links = CountingLinks(access)
        async with client_of(access, links) as client:
            await burst(client, 5_000, 1)
            one.append(await burst(client, n_one, 1))
            before = links.received_bytes
            many.append(await burst(client, n_many, 128))
            bytes_a_token.append((links.received_bytes - before) / (n_many * 128))

    pair = BarePair()
    try:
        with engine_process(OPTIONS) as access:
            for _ in range(repeat):
                times = pair.seconds(IN_FLIGHT, 1, 200)
                bare_one.append(IN_FLIGHT / median(times))
                times = pair.seconds(IN_FLIGHT, 128, 50)
                bare_many.append(IN_FLIGHT * 128 / median(times))
                on_loop(lambda: measure(access))
    finally:
        pair.close()
    rate = median([n_one / wall for wall, _ in one])
    cpu = median([cpu / n_one * 1e6 for _, cpu in one])
    tokens = median([n_many * 128 / wall for wall, _ in many])
    token_cpu = median([cpu / n_many / 128 * 1e6 for _, cpu in many])
    size = median(bytes_a_token)
    return [
        Row("256 in flight, 1 token each", rate, "req/s", median(bare_one), "bare pyzmq, no tasks", ">= 90,000", rate >= 90_000),
        Row("  client CPU a request", cpu, "us", aim="<= 12", is_met=cpu <= 12),
        Row("256 in flight, 128 tokens each", tokens, "tokens/s", median(bare_many), "bare pyzmq, no tasks", ">= 3.5 M", tokens >= 3.5e6),
        Row("  client CPU a token", token_cpu, "us", aim="<= 0.3", is_met=token_cpu <= 0.3),
        Row("  bytes on the wire a token", size, "B", aim="<= 10", is_met=size <= 10),
    ]


async def bare_wake_ups(steps: int) -> float:
    """CPU microseconds to wake one of 256 tasks every 5 ms, with nothing else to do."""
    loop = asyncio.get_running_loop()
    waiters: list[asyncio.Future[None]] = [loop.create_future() for _ in range(IN_FLIGHT)]

    async def worker(number: int) -> None:
        for _ in range(steps):
            await waiters[number]
            waiters[number] = loop.create_future()

    tasks = [loop.create_task(worker(number)) for number in range(IN_FLIGHT)]
    await asyncio.sleep(0)
    cpu = time.process_time()
    for _ in range(steps):
        for waiter in waiters:
            waiter.set_result(None)
        await asyncio.sleep(0.005)
    spent = time.process_time() - cpu
    await asyncio.gather(*tasks)
    return spent / steps / IN_FLIGHT * 1e6


def paced(repeat: int) -> list[Row]:
    """Steps paced at 5 ms, 256 streams."""
    cpus: list[float] = []
    delays: list[float] = []
    tokens = 400

    async def measure(access: PoolAccess) -> None:
        late: list[int] = []
        async with client_of(access) as client:
            sampling = SamplingParams(max_tokens=tokens)

            async def worker(number: int) -> int:
                stream = client.generate(PROMPT, sampling)
                count = 0
                is_sampled = number % 8 == 0  # taking times costs CPU that is not the client's
                async for output in stream:
                    if is_sampled:
                        late.append(time.monotonic_ns() - stream.engine_stamp_ns)
                    count += len(output.token_ids)
                return count

            cpu = time.process_time()
            total = sum(await asyncio.gather(*(worker(number) for number in range(IN_FLIGHT))))
            cpus.append((time.process_time() - cpu) / total * 1e6)
            delays.append(median(late) / 1e3)

    with engine_process({**OPTIONS, "base_s": 0.005}) as access:
        for _ in range(repeat):
            on_loop(lambda: measure(access))
    cpu, delay = median(cpus), median(delays)
    floor = median([on_loop(lambda: bare_wake_ups(tokens)) for _ in range(repeat)])
    return [
        Row("paced 5 ms, 256 streams: client CPU a token", cpu, "us", floor, "a bare task's wake-up", "<= 2.0", cpu <= 2.0),
        Row("  engine stamp to task, p50", delay, "us", aim="<= 450", is_met=delay <= 450),
    ]


def utilities(repeat: int) -> list[Row]:
    """64 utility calls in flight."""
    rates: list[float] = []
    bare: list[float] = []
    total = 30_000

    async def measure(access: PoolAccess) -> None:
        async with client_of(access) as client:
            left = total

            async def worker() -> None:
                nonlocal left
                while left > 0:
                    left -= 1
                    await client.call("is_scheduler_paused", rank=0)

            begin = time.perf_counter()
            await asyncio.gather(*(worker() for _ in range(UTILITY_IN_FLIGHT)))
            rates.append(total / (time.perf_counter() - begin))

    pair = BarePair()
    try:
        with engine_process(OPTIONS) as access:
            for _ in range(repeat):
                bare.append(UTILITY_IN_FLIGHT / median(pair.call_seconds(UTILITY_IN_FLIGHT, 300)))
                on_loop(lambda: measure(access))
    finally:
        pair.close()
    rate = median(rates)
    return [Row("64 utility calls in flight", rate, "calls/s", median(bare), "bare pyzmq, no tasks", ">= 60,000", rate >= 60_000)]


def tensors(repeat: int) -> list[Row]:
    """A 16 MiB tensor with a request, to its first token, less a request without one."""
    costs: list[float] = []
    tensor = np.random.default_rng(0).random(TENSOR_BYTES // 8)

    async def measure(access: PoolAccess) -> None:
        async with client_of(access) as client:
            sampling = SamplingParams(max_tokens=1)

            async def seconds(tensors: dict[str, Any] | None) -> float:
                times: list[float] = []
                for _ in range(30):
                    begin = time.perf_counter()
                    await client.generate(PROMPT, sampling, tensors=tensors).collect()
                    times.append(time.perf_counter() - begin)
                return median(times)

            costs.append(await seconds({"embeddings": tensor}) - await seconds(None))

    with engine_process(OPTIONS) as access:
        for _ in range(repeat):
            on_loop(lambda: measure(access))
    value, floor = median(costs) * 1e3, median(copy_seconds(TENSOR_BYTES, 30)) * 1e3
    return [Row("16 MiB tensor in a request, same node", value, "ms", floor, "one copy", "<= 1.7", value <= 1.7)]


def memory() -> list[Row]:
    """Growth of the client's memory over 200,000 requests."""

    def resident() -> int:
        gc.collect()
        pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
        return pages * resource.getpagesize()

    async def measure(access: PoolAccess) -> float:
        async with client_of(access) as client:
            await burst(client, 50_000, 1)
            before = resident()
            await burst(client, 200_000, 1)
            return (resident() - before) / (1 << 20)

    with engine_process(OPTIONS) as access:
        grown = on_loop(lambda: measure(access))
    return [Row("client memory over 200,000 requests", grown, "MiB", aim="<= 1", is_met=grown <= 1)]


def blocking(repeat: int) -> list[Row]:
    """The blocking façade: one at a time, and 256 at a time through add_requests and outputs."""
    single: list[float] = []
    batched: list[float] = []
    with engine_process(OPTIONS) as access:

        async def make() -> EngineCoreClient:
            client = EngineCoreClient(access, NoControlPlane(), SocketLinks(access, Limits()), metrics=NobodySink())
            await client.start()
            return client

        with BlockingClient(make) as client:
            sampling = SamplingParams(max_tokens=1)
            for _ in range(repeat):
                times: list[float] = []
                for _ in range(500):
                    begin = time.perf_counter()
                    client.generate(PROMPT, sampling).collect()
                    times.append(time.perf_counter() - begin)
                single.append(median(times))
                begin = time.perf_counter()
                for _ in range(40):
                    client.add_requests([(PROMPT, sampling)] * IN_FLIGHT)
                    ended = 0
                    while ended < IN_FLIGHT:
                        ended += sum(output.finish_reason is not None for output in client.outputs())
                batched.append(40 * IN_FLIGHT / (time.perf_counter() - begin))
    return [
        Row("blocking facade: round trip, p50", median(single) * 1e6, "us"),
        Row("blocking facade: 256 at a time, 1 token each", median(batched), "req/s"),
    ]


def main() -> None:
    """Measure everything and publish."""
    parser = arguments(__doc__ or "")
    parser.add_argument("--skip-ray", action="store_true", help="leave the Ray call's floor out")
    options = parser.parse_args()
    ray_s = None if options.skip_ray else median(ray_call_seconds(300))
    rows = round_trip(options.repeat, ray_s)
    rows += throughput(options.repeat)
    rows += paced(options.repeat)
    rows += utilities(options.repeat)
    rows += tensors(options.repeat)
    rows += memory()
    rows += blocking(options.repeat)
    publish("Transport: async client and echo engine in different processes", rows, options.json)


if __name__ == "__main__":
    main()
