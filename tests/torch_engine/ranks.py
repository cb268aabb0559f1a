"""Engines of one expert-parallel model as threads of this process, with a real Gloo group, stepping together until none has work."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from raycore import gloo
from raycore.engines.torch import TorchEngine
from raycore.groups import GroupKind, ProcessGroup
from raycore.ids import Epoch, GroupStamp, Term
from raycore.membership import GroupAddress
from raycore.sampling import SamplingParams
from tests.torch_engine.conftest import STEP_LIMIT, Driver, Result
from tests.torch_engine.tiny import engine_on

LIMIT_S = 30.0


class Ranks:
    """`size` engines and their group; every method acts on all ranks, each on its own thread."""

    def __init__(self, path: Path, size: int, **options: Any) -> None:
        self.size = size
        self.drivers = [Driver(engine_on(path, rank=rank, data_parallel_size=size, **options)) for rank in range(size)]
        self.groups: list[ProcessGroup] = []
        self._threads = ThreadPoolExecutor(size)
        self._epoch = 0
        self.meet()

    def engine(self, rank: int) -> TorchEngine:
        return self.drivers[rank].engine

    def meet(self) -> None:
        """Give the engines a new group of all ranks."""
        for group in self.groups:
            group.close()
        self.take(self.form())

    def take(self, groups: list[ProcessGroup]) -> None:
        self.groups = groups
        for rank, group in enumerate(groups):
            self.engine(rank).set_group(group)

    def form(self) -> list[ProcessGroup]:
        """A group of all ranks that no engine has."""
        self._epoch += 1
        store = gloo.GroupStore("127.0.0.1", limit_s=LIMIT_S)
        address = GroupAddress(GroupStamp(Epoch(self._epoch), Term(1)), store.host, {GroupKind.EP: store.port})
        form = {"local_host": "127.0.0.1", "form_s": LIMIT_S, "collective_s": LIMIT_S}
        return self.on_all(lambda rank: gloo.form_groups(address, rank, self.size, **form)[GroupKind.EP])

    def replace(self, drivers: list[Driver]) -> list[Driver]:
        """These are the ranks now, in this order; those that were."""
        before, self.drivers = self.drivers, drivers
        self.size = len(drivers)
        self._threads.shutdown()
        self._threads = ThreadPoolExecutor(self.size)
        return before

    def on_all(self, work: Callable[[int], Any], ranks: Sequence[int] | None = None) -> list[Any]:
        """`work(rank)` on these ranks at once, all if none are named."""
        return list(self._threads.map(work, range(self.size) if ranks is None else ranks))

    def generate(self, prompts: Sequence[list[int]], sampling: SamplingParams, *, on: Sequence[int] | None = None) -> list[Result]:
        """Prompt i on rank `on[i]`, by default the ranks in turn."""
        where = on or [i % self.size for i in range(len(prompts))]
        results = [self.drivers[rank].add(prompt, sampling) for prompt, rank in zip(prompts, where, strict=True)]
        self.run()
        return results

    def run(self) -> None:
        """Step together until nobody has work."""
        self.on_all(self._run_one)

    def _run_one(self, rank: int) -> None:
        for _ in range(STEP_LIMIT):
            working = np.array([self.engine(rank).has_work()], np.int64)
            self.groups[rank].sum(working)
            if not working[0]:
                return
            self.step(rank)
        raise AssertionError("the ranks do not finish")

    def step(self, rank: int) -> None:
        """One step of this rank, of work or of a dummy batch."""
        driver = self.drivers[rank]
        if driver.engine.has_work():
            driver.step()
        else:
            driver.engine.idle_step()

    def close(self) -> None:
        for driver in self.drivers:
            driver.engine.check_invariants()
            driver.engine.close()
        for group in self.groups:
            group.close()
        self._threads.shutdown()


@contextlib.contextmanager
def ranks_on(path: Path, size: int, **options: Any) -> Iterator[Ranks]:
    ranks = Ranks(path, size, **options)
    try:
        yield ranks
    finally:
        ranks.close()
