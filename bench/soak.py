"""Soak: pools of echo engines, in lockstep and not, cycle through 2 -> 4 -> 2 -> 3 ranks under a steady load; nothing is lost or left.

Every answer is compared with what the echo engine must say: a token that is lost, duplicated or out of order shows, and so does a request
that is refused or fails. After each cycle, at two ranks, everything of the pool is counted: actors, placement groups, and the threads,
descriptors and memory of the processes that stay (client, controller, coordinator, ranks 0 and 1). What grows from the first cycle to the
last is a failure.

    python -m bench.soak --cycles 50 --json soak.json      (`make soak`)
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import os
import time
from collections import Counter
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from actors.groups import pool_groups
from actors.launch import launch
from actors.naming import named_actors
from actors.nodes import actor_processes
from bench.report import Row, median, publish
from raycore.client.client import EngineCoreClient
from raycore.errors import RaycoreError
from raycore.sampling import SamplingParams

SIZES = (4, 2, 3, 2)
RATE = 120.0
"""Requests a second."""
TOKENS = 12
ANSWER_S = 60.0
"""A request that takes longer counts as lost."""
THREAD_SLACK, DESCRIPTOR_SLACK = 2, 8
"""Ray's and Python's pools of threads, and what they hold, come and go."""
MEMORY_SLACK_MIB = 24.0
SETTLE_S = 20.0
VOCABULARY = 32_000


@dataclass(frozen=True)
class Usage:
    """What one process holds."""

    threads: int
    descriptors: int
    memory_mib: float

    @classmethod
    def of(cls, pid: int) -> Usage:
        status = Path(f"/proc/{pid}/status").read_text(encoding="utf-8").splitlines()
        facts = dict(line.split(":", 1) for line in status if ":" in line)
        return cls(int(facts["Threads"]), len(os.listdir(f"/proc/{pid}/fd")), int(facts["VmRSS"].split()[0]) / 1024)


@dataclass
class Soak:
    """What came of it."""

    answers: int = 0
    seconds: float = 0.0
    wrong: Counter[str] = field(default_factory=Counter)
    """Answers that were not as they must be, by what was wrong; 0 of each is the aim."""
    cycles: list[dict[str, Usage]] = field(default_factory=list)
    counts: list[tuple[int, int]] = field(default_factory=list)
    """Actors and placement groups after each cycle."""
    waits_s: list[float] = field(default_factory=list)
    """From each request to its first token."""

    def growth(self) -> list[str]:
        """What grew from the first cycle to the last, in words."""
        found = [f"{name}: {a} -> {b}" for name, a, b in _pairs(self.cycles[0], self.cycles[-1]) if a.threads + THREAD_SLACK < b.threads]
        found += [
            f"{name}: {a} -> {b}"
            for name, a, b in _pairs(self.cycles[0], self.cycles[-1])
            if a.descriptors + DESCRIPTOR_SLACK < b.descriptors
        ]
        found += [
            f"{name}: {a} -> {b}"
            for name, a, b in _pairs(self.cycles[0], self.cycles[-1])
            if a.memory_mib + MEMORY_SLACK_MIB < b.memory_mib
        ]
        if len(set(self.counts)) > 1:
            found.append(f"actors and placement groups after each cycle: {self.counts}")
        return found


def _pairs(first: dict[str, Usage], last: dict[str, Usage]) -> list[tuple[str, Usage, Usage]]:
    return [(name, first[name], last[name]) for name in first if name in last]


def echoed(prompt: Sequence[int], count: int) -> list[int]:
    """What the echo engine answers."""
    return [prompt[i % len(prompt)] for i in range(count)]


class Load:
    """Asks at a steady rate, whatever the answers take, and checks each."""

    def __init__(self, client: EngineCoreClient, soak: Soak) -> None:
        self._client = client
        self._soak = soak
        self._number = 0

    @contextlib.asynccontextmanager
    async def on(self) -> AsyncIterator[None]:
        """While the block runs; every answer is in when it ends."""
        running: set[asyncio.Task[None]] = set()
        pace = asyncio.create_task(self._pace(running))
        try:
            yield
        finally:
            pace.cancel()
            await asyncio.gather(pace, return_exceptions=True)
            await asyncio.gather(*running)

    async def _pace(self, running: set[asyncio.Task[None]]) -> None:
        due_s = time.monotonic()
        while True:
            self._number += 1
            task = asyncio.create_task(self._ask(self._number))
            running.add(task)
            task.add_done_callback(running.discard)
            due_s += 1 / RATE
            await asyncio.sleep(max(0.0, due_s - time.monotonic()))

    async def _ask(self, number: int) -> None:
        soak, prompt = self._soak, [300 + number % 20_000, 400 + number % 997, 7]
        begun_s = time.monotonic()
        try:
            async with asyncio.timeout(ANSWER_S):
                stream = self._client.generate(prompt, SamplingParams(max_tokens=TOKENS))
                first = await anext(stream)
                soak.waits_s.append(time.monotonic() - begun_s)
                rest = await stream.collect() if first.finish_reason is None else None
        except TimeoutError:
            soak.wrong["lost"] += 1
        except RaycoreError as error:
            soak.wrong[f"refused or failed: {type(error).__name__}: {error}"] += 1
        else:
            tokens = [*first.token_ids, *(() if rest is None else rest.token_ids)]
            if tokens != echoed(prompt, TOKENS):
                soak.wrong["duplicated, lost or reordered tokens"] += 1
            soak.answers += 1


async def soak(pool: str, cycles: int, *, lockstep: bool) -> Soak:
    """Run one pool through its cycles."""
    found = Soak()
    options = {"vocab_size": VOCABULARY, "base_s": 0.002, "lockstep": lockstep}
    timeouts = {"drain_s": 0.2}
    async with launch(pool=pool, engine="echo", engine_options=options, data_parallel_size=2, timeouts=timeouts) as client:
        begun_s = time.monotonic()
        async with Load(client, found).on():
            for _ in range(cycles):
                for size in SIZES:
                    report = await client.scale_elastic_ep(size)
                    if len(report.ranks) != size:
                        found.wrong[f"{size} ranks were asked for, {len(report.ranks)} serve"] += 1
                found.counts.append(await _settled(pool, ranks=2))
                found.cycles.append(await asyncio.to_thread(_usage, pool))
        found.seconds = time.monotonic() - begun_s
        client.check_invariants()
    return found


async def _settled(pool: str, ranks: int) -> tuple[int, int]:
    """Actors and placement groups, once Ray has forgotten those that were put away or will not."""
    until_s = time.monotonic() + SETTLE_S
    while True:
        names = await asyncio.to_thread(named_actors, pool)
        groups = await asyncio.to_thread(pool_groups, pool)
        engines = [name for name in names if name.role == "engine"]
        if len(engines) == len(groups) == ranks or time.monotonic() > until_s:
            return len(names), len(groups)
        await asyncio.sleep(0.05)


def _usage(pool: str) -> dict[str, Usage]:
    """The processes that last: this one, controller, coordinator, the two ranks that never leave."""
    pids = {"client": os.getpid()}
    for process in actor_processes(pool):
        name = process.name
        if name.role in {"controller", "coordinator"}:
            pids[str(name.role)] = process.pid
        elif name.role == "engine" and name.rank < min(SIZES):
            pids[f"rank {name.rank}"] = process.pid
    return {name: Usage.of(pid) for name, pid in pids.items()}


def rows(name: str, found: Soak) -> list[Row]:
    """What is printed of one pool."""
    waits = sorted(found.waits_s)
    return [
        Row(f"{name}: answers", found.answers, "", aim=">= 100 a second", is_met=found.answers >= 100 * found.seconds),
        Row(f"{name}: answers a second", found.answers / found.seconds, "1/s"),
        Row(f"{name}: lost, duplicated, reordered, refused", found.wrong.total(), "", aim="0", is_met=not found.wrong),
        Row(f"{name}: first token, median", median(waits), "s"),
        Row(f"{name}: first token, 99th of 100", waits[len(waits) * 99 // 100], "s"),
        Row(f"{name}: kinds of growth over the cycles", len(found.growth()), "", aim="0", is_met=not found.growth()),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cycles", type=int, default=50)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--only", choices=["dense", "lockstep"])
    options = parser.parse_args()
    table: list[Row] = []
    problems: list[Any] = []
    for name in [options.only] if options.only else ["dense", "lockstep"]:
        found = asyncio.run(soak(f"soak-{name}", options.cycles, lockstep=name == "lockstep"))
        table += rows(name, found)
        problems += [*found.wrong.items(), *found.growth()]
    publish(f"soak: {options.cycles} cycles of 2 -> 4 -> 2 -> 3 ranks", table, options.json)
    if problems:
        raise SystemExit("\n".join(map(str, problems)))


if __name__ == "__main__":
    main()
