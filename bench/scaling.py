"""Changes of size under load: the time of each phase, what new requests wait meanwhile, throughput beside before and after, control share.

Pools of echo engines on a local Ray, dense and in lockstep, go 1 -> 2 -> 4 -> 2 under requests that come at a steady rate (their first
token is what a new request waits for) while long streams keep the ranks stepping. The window of an operation is from its call to its
answer. The throughput of the window is compared with the mean of one second before and one second after it, on the same streams. The
survivors' longest gap between tokens is that of any stream during the commit. The control share is all phases but SPAWN (process start)
and the wait for Ray's placement groups (RESERVE is shown apart).

    python -m bench.scaling --json scaling.json
"""

from __future__ import annotations

import asyncio
import itertools
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from actors.launch import launch
from bench.report import Row, arguments, median, publish
from raycore.client.client import EngineCoreClient
from raycore.client.control import ScalingReport
from raycore.sampling import SamplingParams

POOLS: dict[str, dict[str, Any]] = {
    "dense": {"base_s": 0.002, "vocab_size": 32_000},
    "lockstep": {"base_s": 0.002, "vocab_size": 32_000, "lockstep": True},
}
SIZES = (2, 4, 2)
RATE = 100.0
"""New requests a second."""
STREAMS = 4
AROUND_S = 1.0
WAIT_AIM_MS, THROUGHPUT_AIM, CONTROL_AIM_MS = 20.0, 0.98, 250.0
LIMIT_S = 120.0


@dataclass
class Load:
    """Requests at a steady rate, and streams that never end."""

    client: EngineCoreClient
    waits: list[tuple[float, float]] = field(default_factory=list)
    """When each new request came, and how long its first token took."""
    tokens: list[list[float]] = field(default_factory=list)
    """When each stream's tokens came."""
    is_over: bool = False

    async def arrivals(self) -> None:
        tasks: set[asyncio.Task[None]] = set()
        due_s = time.perf_counter()
        while not self.is_over:
            due_s += 1 / RATE
            await asyncio.sleep(max(0.0, due_s - time.perf_counter()))
            task = asyncio.create_task(self._one())
            tasks.add(task)
            task.add_done_callback(tasks.discard)
        await asyncio.gather(*tasks)

    async def _one(self) -> None:
        begin_s = time.perf_counter()
        await self.client.generate([7, 8], SamplingParams(max_tokens=1)).collect()
        self.waits.append((begin_s, time.perf_counter() - begin_s))

    async def stream(self) -> None:
        times: list[float] = []
        self.tokens.append(times)
        while not self.is_over:
            async for _ in self.client.generate([5, 6], SamplingParams(max_tokens=2_000)):
                times.append(time.perf_counter())
                if self.is_over:
                    break

    def rate(self, begin_s: float, end_s: float) -> float:
        """Tokens a second of the streams."""
        return sum(begin_s <= at_s < end_s for times in self.tokens for at_s in times) / (end_s - begin_s)

    def waits_in(self, begin_s: float, end_s: float) -> list[float]:
        return sorted(wait_s for at_s, wait_s in self.waits if begin_s <= at_s < end_s)

    def longest_gap_s(self, begin_s: float, end_s: float) -> float:
        gaps = [b - a for times in self.tokens for a, b in itertools.pairwise(times) if begin_s <= b and a < end_s]
        return max(gaps, default=0.0)


@dataclass(frozen=True)
class Window:
    """One operation under load."""

    report: ScalingReport
    begin_s: float
    end_s: float

    @property
    def commit_s(self) -> tuple[float, float]:
        """When the commit began and ended."""
        end_s = self.end_s - self.report.phases_s.get("retire", 0.0)
        return end_s - self.report.phases_s["commit"], end_s


async def run(name: str, samples: dict[str, list[float]]) -> None:
    """One pool through its sizes."""
    options = POOLS[name]
    async with launch(pool=f"bench-scaling-{name}", engine="echo", engine_options=options, num_cpus_per_engine=0.1) as client:
        load = Load(client)
        tasks = [asyncio.create_task(load.arrivals()), *(asyncio.create_task(load.stream()) for _ in range(STREAMS))]
        windows: list[Window] = []
        for size in SIZES:
            await asyncio.sleep(2 * AROUND_S)
            begin_s = time.perf_counter()
            report = await client.scale_elastic_ep(size)
            windows.append(Window(report, begin_s, time.perf_counter()))
        await asyncio.sleep(2 * AROUND_S)
        load.is_over = True
        await asyncio.wait_for(asyncio.gather(*tasks), LIMIT_S)
    for size, window in zip(SIZES, windows, strict=True):
        _take(f"{name} to {size}", load, window, samples)


def _take(name: str, load: Load, window: Window, samples: dict[str, list[float]]) -> None:
    begin_s, end_s = window.begin_s, window.end_s
    for phase, took_s in window.report.phases_s.items():
        samples.setdefault(f"{name}: {phase}, ms", []).append(took_s * 1e3)
    waits, usual = load.waits_in(begin_s, end_s), load.waits_in(begin_s - AROUND_S, begin_s) + load.waits_in(end_s, end_s + AROUND_S)
    if waits and usual:
        samples.setdefault(f"{name}: p99 wait of new requests in the window, ms", []).append(_p99(waits) * 1e3)
        samples.setdefault(f"{name}: p99 wait before and after, ms", []).append(_p99(sorted(usual)) * 1e3)
    around = (load.rate(begin_s - AROUND_S, begin_s) + load.rate(end_s, end_s + AROUND_S)) / 2
    samples.setdefault(f"{name}: throughput of the window over that around it", []).append(load.rate(begin_s, end_s) / around)
    samples.setdefault(f"{name}: longest gap of a stream at commit, ms", []).append(load.longest_gap_s(*window.commit_s) * 1e3)


def _p99(waits: Sequence[float]) -> float:
    return waits[min(len(waits) - 1, int(0.99 * len(waits)))]


async def control_share(samples: dict[str, list[float]]) -> None:
    """1 -> 8, without load: what the controller adds to process starts."""
    options = POOLS["dense"]
    async with launch(pool="bench-scaling-8", engine="echo", engine_options=options, num_cpus_per_engine=0.1) as client:
        phases = (await client.scale_elastic_ep(8)).phases_s
    samples.setdefault("1 to 8: placement groups (reserve), ms", []).append(phases["reserve"] * 1e3)
    samples.setdefault("1 to 8: process start (spawn), ms", []).append(phases["spawn"] * 1e3)
    rest_s = sum(took_s for phase, took_s in phases.items() if phase not in {"reserve", "spawn"})
    samples.setdefault("1 to 8: control share, ms", []).append((phases["reserve"] + rest_s) * 1e3)


def _row(name: str, values: list[float]) -> Row:
    value = median(values)
    unit = "ms" if name.endswith(", ms") else "x"
    title = name.removesuffix(", ms")
    if "in the window" in name:
        return Row(title, value, unit, aim=f"<= {WAIT_AIM_MS:g} ms", is_met=value <= WAIT_AIM_MS, samples=values)
    if "throughput" in name:
        return Row(title, value, unit, aim=f">= {THROUGHPUT_AIM}", is_met=value >= THROUGHPUT_AIM, samples=values)
    if "control share" in name:
        return Row(title, value, unit, aim=f"<= {CONTROL_AIM_MS:g} ms", is_met=value <= CONTROL_AIM_MS, samples=values)
    return Row(title, value, unit, samples=values)


def main() -> None:
    """Measure and publish."""
    options = arguments(__doc__ or "").parse_args()
    samples: dict[str, list[float]] = {}
    for _ in range(options.repeat):
        for name in POOLS:
            asyncio.run(run(name, samples))
        asyncio.run(control_share(samples))
    publish("Scaling: changes of size under load", [_row(name, values) for name, values in samples.items()], options.json)


if __name__ == "__main__":
    main()
