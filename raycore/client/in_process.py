"""In-process use, for debugging and for one engine without Ray: the engine core is stepped by the thread that waits."""

from __future__ import annotations

import asyncio
import contextlib
import math
import signal
import threading
from collections.abc import Callable, Coroutine, Generator
from types import FrameType
from typing import Any, TypeVar

import msgspec

from raycore.client.blocking import BlockingClient
from raycore.client.client import EngineCoreClient
from raycore.client.control import PoolAccess, ScalingReport
from raycore.client.links import MemoryLinks
from raycore.config import PoolConfig, parse_config
from raycore.core.engine_core import EngineCore
from raycore.engine import Engine
from raycore.engines import make_engine
from raycore.errors import ClientClosedError, ConfigurationError, NotSupportedError
from raycore.ids import EngineId, Epoch, Incarnation, Rank, Term
from raycore.membership import Endpoints, Member, Membership
from raycore.tokenizer import Tokenizer, load_tokenizer
from raycore.transport.memory import MemoryListener

T = TypeVar("T")

_ENGINE = EngineId(Rank(0), Incarnation("in-process"))


class CallerTurner:
    """A private event loop in the caller's thread; while a call waits, the engine core turns between the loop's other callbacks."""

    def __init__(self, core: EngineCore, listener: MemoryListener) -> None:
        self._core = core
        self._loop = asyncio.new_event_loop()
        self._has_work = asyncio.Event()
        listener.on_wake = self._has_work.set
        self._pump: asyncio.Task[None] | None = None
        self._is_closed = False
        self._has_failed = False

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        """Turn loop and engine until the coroutine is done. Ctrl-C waits for the end of a step, so that no step is half taken in."""
        if self._is_closed:
            work.close()
            msg = "the client is closed"
            raise ClientClosedError(msg)
        task = self._loop.create_task(work)
        if self._pump is None or self._pump.done():
            self._pump = self._loop.create_task(self._turn_engine(), name="raycore-in-process-engine")
        with _interrupts_cancel(task) as was_interrupted:
            # the engine's failure ends the pump; its last frame is on its way to the client, which then fails what waits
            self._loop.run_until_complete(asyncio.wait({task}))
        if was_interrupted.is_set():
            raise KeyboardInterrupt
        return task.result()

    def is_here(self) -> bool:
        """Whether the loop is turning right now, below the calling code."""
        return self._loop.is_running()

    def close(self) -> None:
        """End the loop."""
        if self._is_closed:
            return
        self._is_closed = True
        if self._pump is not None:
            self._pump.cancel()
            self._loop.run_until_complete(asyncio.gather(self._pump, return_exceptions=True))
        self._loop.close()

    async def _turn_engine(self) -> None:
        while not self._has_failed:
            self._has_work.clear()
            try:
                has_more = self._core.turn(may_wait=False)
            except Exception as error:  # noqa: BLE001 -- whatever it is, the client is told, as over a socket
                self._has_failed = True
                self._core.fail(error)
                return
            if has_more:
                await asyncio.sleep(0)
            else:
                await self._has_work.wait()


@contextlib.contextmanager
def _interrupts_cancel(task: asyncio.Task[Any]) -> Generator[threading.Event]:
    """Ctrl-C cancels `task` between two callbacks instead of raising wherever the interpreter is.

    Only in the main thread; elsewhere there is none.
    """
    was_interrupted = threading.Event()
    if threading.current_thread() is not threading.main_thread() or signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        yield was_interrupted
        return

    def on_interrupt(_number: int, _frame: FrameType | None) -> None:
        was_interrupted.set()
        task.get_loop().call_soon_threadsafe(task.cancel)

    signal.signal(signal.SIGINT, on_interrupt)
    try:
        yield was_interrupted
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)


class NoControlPlane:
    """There is no control plane in one process."""

    def watch(self, engine: EngineId, on_death: Callable[[EngineId, str], None]) -> None:
        """The engine cannot die alone."""

    def forget(self, engine: EngineId) -> None:
        """Nothing is watched."""

    async def report_suspect(self, engine: EngineId, cause: str) -> None:
        """Nobody to tell."""

    async def refresh(self) -> Membership | None:
        """It never changes."""
        return None

    async def scale(self, target: int) -> ScalingReport:
        """One engine in this process is all there is."""
        raise NotSupportedError(f"an engine in process cannot scale to {target} ranks; use launch()", method="scale_elastic_ep")

    async def remove_ranks(self, ranks: tuple[int, ...]) -> ScalingReport:
        """Likewise."""
        raise NotSupportedError(f"an engine in process cannot let ranks {list(ranks)} leave; use launch()", method="remove_ranks")

    async def coordinator(self) -> Endpoints | None:
        """There is none."""
        return None

    async def shutdown_pool(self, drain_s: float) -> None:
        """The pool ends with its client."""

    async def close(self) -> None:
        """Nothing is held."""


def in_process_client(*, engine_instance: Engine | None = None, tokenizer: Tokenizer | None = None, **values: Any) -> BlockingClient:
    """A blocking client and its engine in this thread.

    `values` are `PoolConfig` fields; an `engine_instance` may be handed in instead of a name.
    """
    config = parse_config({"pool": "in-process", **values})
    if config.data_parallel_size != 1:
        msg = f"in process there is one engine, not data_parallel_size={config.data_parallel_size}"
        raise ConfigurationError(msg)
    engine = engine_instance
    if engine is None:
        engine = make_engine(config.engine, config.model, config.engine_options, config.device)
        if tokenizer is None:
            # as over sockets: a model without a tokenizer takes and gives token ids
            with contextlib.suppress(ConfigurationError):
                tokenizer = load_tokenizer(config.model)
    return _client_of(config, engine, tokenizer)


def _client_of(config: PoolConfig, engine: Engine, tokenizer: Tokenizer | None) -> BlockingClient:
    listener = MemoryListener()
    # the loop turns only while a call waits, so a thoughtful caller must not lose its session
    limits = msgspec.structs.replace(config.limits, lease_s=math.inf)
    member = Member(_ENGINE, Endpoints("in-process", "", ""), engine.info, 0)
    membership = Membership(config.pool, Epoch(1), Term(1), (member,))
    core = EngineCore(
        _ENGINE,
        engine,
        listener,
        membership,
        limits=limits,
        timeouts=config.timeouts,
        step_budget_s=config.health.step_budget_s,
        allow_pickle=config.allow_pickle,
        debug_checks=config.debug_checks,
    )

    async def make() -> EngineCoreClient:
        client = EngineCoreClient(
            PoolAccess(membership=membership, allow_pickle=config.allow_pickle),
            NoControlPlane(),
            MemoryLinks(listener),
            timeouts=config.timeouts,
            limits=limits,
            tokenizer=tokenizer,
            in_process=True,
        )
        await client.start()
        return client

    return BlockingClient(make, turner=CallerTurner(core, listener), on_close=engine.close)
