"""An engine core in a plain process of its own, so that transport is measured without a cluster's background work."""

from __future__ import annotations

import multiprocessing
import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection
from typing import Any

from raycore.client.control import PoolAccess
from raycore.config import EngineSpec, HealthConfig, Limits, Timeouts
from raycore.core.host import EngineHost
from raycore.ids import Epoch, Term
from raycore.membership import Membership

POOL = "bench"


@contextmanager
def engine_process(
    options: dict[str, Any],
    *,
    cpu: int | None = None,
    ranks: int = 1,
    busy_poll_s: float | None = None,
    engine: str = "echo",
    model: str | None = None,
) -> Iterator[PoolAccess]:
    """Engines with everything the product does switched on; they end with the block."""
    context = multiprocessing.get_context("spawn")
    pipes: list[Any] = []
    processes: list[Any] = []
    for rank in range(ranks):
        ours, theirs = context.Pipe()
        process = context.Process(target=_serve, args=(theirs, rank, options, cpu, busy_poll_s, engine, model), daemon=True)
        process.start()
        pipes.append(ours)
        processes.append(process)
    members = tuple(pipe.recv() for pipe in pipes)
    membership = Membership(POOL, Epoch(1), Term(1), members)
    for pipe in pipes:
        pipe.send(membership)
    try:
        yield PoolAccess(membership=membership, engine=engine)
    finally:
        for pipe in pipes:
            pipe.send("stop")
        for process in processes:
            process.join(10)
            if process.is_alive():
                process.kill()


def _serve(
    pipe: Connection, rank: int, options: dict[str, Any], cpu: int | None, busy_poll_s: float | None, engine: str, model: str | None
) -> None:
    if cpu is not None:
        os.sched_setaffinity(0, {cpu})
    spec = EngineSpec(
        pool=POOL,
        rank=rank,
        incarnation=f"bench{rank}",
        engine=engine,
        model=model,
        engine_options=options,
        device="cpu",
        tcp="never",
        limits=Limits() if busy_poll_s is None else Limits(busy_poll_s=busy_poll_s),
        timeouts=Timeouts(),
        health=HealthConfig(),
    )
    host = EngineHost(spec, node_ip="127.0.0.1")
    pipe.send(host.start())
    host.set_membership(pipe.recv())

    def wait_for_stop() -> None:
        pipe.recv()
        host.stop(0.0)

    threading.Thread(target=wait_for_stop, daemon=True).start()
    host.run()
