"""The client actor: one `EngineCoreClient` behind Ray calls, for callers that want a handle instead of sockets of their own.

A token costs a Ray message here (docs/benchmarks.md), so a process that can should `connect` itself. It holds no decision: requests go
to the client, and who called is `actors/callers.py`'s to know.
"""

from __future__ import annotations

import asyncio
import contextvars
import os
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from typing import Any

import ray

from actors.callers import Callers
from actors.launch import Connection, connect
from raycore.client.client import EngineCoreClient
from raycore.client.control import ScalingReport
from raycore.client.journal import RequestOutput
from raycore.client.reader import BatchReader
from raycore.config import log_level
from raycore.logs import log_everything_as
from raycore.operations import TABLE, Operation
from raycore.sampling import SamplingParams

STREAMS = 4096
"""Calls that may run at once, each stream and each attached caller being one; Ray's default of 1000 is too near to what a Serve
deployment may ask."""
AHEAD = 4
"""Items that a stream may be ahead of its reader; from then on the journal merges."""

ATTENDANCE_S = 0.5
"""Pause between the items of an attendance: so long after its death, at most, is a caller missed."""

Request = tuple[Any, SamplingParams | None, dict[str, Any]]
"""Prompt, sampling, and the other options of `generate`."""

_STREAMING: dict[str, Any] = {"num_returns": "streaming", "_generator_backpressure_num_objects": AHEAD}


class ClientActorBase:
    """The methods; `ClientActor` is the Ray actor of it, with a method more for each row of `raycore/operations.py`."""

    def __init__(self, pool: str, name: str) -> None:
        # Ray lets an actor without GPUs see all of its node's; whatever a tokenizer's library looks for, here are none.
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
        self._pool = pool
        self._name = name
        log_everything_as(pool, f"client {name}", log_level())
        self._connection: Connection | None = None
        self._connecting: asyncio.Task[EngineCoreClient] | None = None
        self._callers = Callers()

    def __repr__(self) -> str:
        return f"client {self._name} {self._pool}"

    @ray.method(**_STREAMING)
    async def generate(
        self, prompt: Any, sampling: SamplingParams | None = None, *, caller: str | None = None, **options: Any
    ) -> AsyncIterator[RequestOutput]:
        """Stream a request's outputs, with the options of `EngineCoreClient.generate`; tokens that came together travel together.

        Cancelling the task aborts the request; so does the death of its caller, where it is an attached one.
        """
        client = await self.client()
        stream = client.generate(prompt, sampling, **options)
        with self._callers.running(caller, stream):
            async with stream:
                async for output in stream:
                    yield output

    @ray.method(**_STREAMING)
    async def generate_many(self, requests: Iterable[Request], *, caller: str | None = None) -> AsyncIterator[list[RequestOutput]]:
        """Stream many requests as one: each item is everything new of all of them, so that a step costs one item and not one a request.

        A failed request's last output has `error` set. Nothing is sent when one of them is refused at the door.
        """
        reader = BatchReader(await self.client())
        with self._callers.running(caller, reader):
            try:
                for prompt, sampling, options in requests:
                    reader.add(prompt, sampling, **options)
                while outputs := await reader.outputs():
                    yield outputs
            finally:
                await reader.aclose()

    async def add_requests(self, caller: str, requests: Iterable[Request]) -> list[str]:
        """Send requests whose outputs the attached caller takes with `outputs`; their ids."""
        reader = self._callers.reader_of(caller, await self.client())
        return [reader.add(prompt, sampling, **options) for prompt, sampling, options in requests]

    async def outputs(self, caller: str, limit_s: float) -> tuple[list[RequestOutput], bool]:
        """Everything new of a caller's added requests, and whether none of them is left; waits for at most `limit_s` seconds."""
        reader = self._callers.reader_of(caller, await self.client())
        return await reader.outputs(limit_s), not reader

    async def abort_requests(self, request_ids: Iterable[str]) -> None:
        """End requests early, whoever made them; unknown ids are ignored. Each ends with finish reason "abort"."""
        await (await self.client()).abort_requests(request_ids)

    async def call(self, method: str, /, *, rank: int, timeout_s: float | None = None, **arguments: Any) -> Any:
        """An operation on one rank."""
        return await (await self.client()).call(method, rank=rank, timeout_s=timeout_s, **arguments)

    async def call_all(self, method: str, /, *, timeout_s: float | None = None, **arguments: Any) -> dict[int, Any]:
        """An operation on every serving rank: each one's result, or its error as the value."""
        return await (await self.client()).call_all(method, timeout_s=timeout_s, **arguments)

    async def call_agree(self, method: str, /, *, timeout_s: float | None = None, **arguments: Any) -> Any:
        """An operation on every serving rank, whose results must be equal."""
        return await (await self.client()).call_agree(method, timeout_s=timeout_s, **arguments)

    async def call_any(self, method: str, /, *, timeout_s: float | None = None, **arguments: Any) -> Any:
        """An operation on one serving rank, whichever."""
        return await (await self.client()).call_any(method, timeout_s=timeout_s, **arguments)

    async def call_operation(self, method: str, rank: int | None, timeout_s: float | None, arguments: dict[str, Any]) -> Any:
        """An operation with its own fan-out, or on one rank."""
        return await (await self.client()).call_operation(method, rank, timeout_s, arguments)

    async def scale_elastic_ep(self, data_parallel_size: int) -> ScalingReport:
        """Grow or shrink the pool, as the client's method of this name."""
        return await (await self.client()).scale_elastic_ep(data_parallel_size)

    async def remove_ranks(self, ranks: Sequence[int]) -> ScalingReport:
        """Let chosen ranks leave, as the client's method of this name."""
        return await (await self.client()).remove_ranks(ranks)

    async def status(self) -> dict[str, Any]:
        """What this client knows: its process, its pool's ranks, requests in flight, callers."""
        client = await self.client()
        return {
            "name": self._name,
            "pool": self._pool,
            "pid": os.getpid(),
            "ranks": client.ranks(),
            "in_flight": client.in_flight(),
            "callers": len(self._callers),
        }

    async def check_invariants(self) -> None:
        """Raise AssertionError when the client's tables disagree; for tests."""
        (await self.client()).check_invariants()

    @ray.method(num_returns="streaming", _generator_backpressure_num_objects=1)
    async def attend(self, caller: str) -> AsyncIterator[None]:
        """A stream that its caller keeps and does not read: it ends when the caller cancels it or dies, and the caller's requests with it.

        Ray itself neither cancels a dead caller's calls nor tells of them. But an item that its owner has not taken is a message that the
        owner has not answered, which fails when the process dies, and not while it is frozen; the next item then raises. Awaiting
        a reference that the caller owns was tried too: that it had died was told after a second, or not within 40.
        """
        self._callers.attach(caller)
        try:
            while True:
                yield
                await asyncio.sleep(ATTENDANCE_S)
        finally:
            await self._callers.detach(caller)

    async def leave(self) -> None:
        """Leave the pool in good order; the actor can be killed afterwards."""
        await self._callers.close()
        connection, self._connection = self._connection, None
        if connection is not None:
            await connection.__aexit__(None, None, None)

    async def client(self) -> EngineCoreClient:
        """The client, connected at first use; an attempt that failed is made again at the next."""
        if self._connecting is None or (self._connecting.done() and self._connecting.exception() is not None):
            self._connection = connect(self._pool, client=f"client-actor-{self._name}")
            # In a context of its own: what the client asks of Ray must not be a child of the first call, and be cancelled with it.
            self._connecting = asyncio.create_task(self._connection.__aenter__(), context=contextvars.Context())
        return await asyncio.shield(self._connecting)


def _method(operation: Operation) -> Callable[..., Any]:
    async def method(self: ClientActorBase, *, rank: int | None = None, timeout_s: float | None = None, **arguments: Any) -> Any:
        return await self.call_operation(operation.name, rank, timeout_s, arguments)

    method.__name__ = operation.name
    method.__qualname__ = f"ClientActor.{operation.name}"
    method.__doc__ = f"{operation.summary} Fan-out: {operation.fan_out.value}, or one rank. {operation.arguments.__doc__}"
    return method


_OPTIONS: dict[str, Any] = {"num_cpus": 0, "max_restarts": 0, "max_task_retries": 0, "max_concurrency": STREAMS}
_METHODS = {operation.name: _method(operation) for operation in TABLE}

ClientActor: Any = ray.remote(**_OPTIONS)(type("ClientActor", (ClientActorBase,), _METHODS))
"""The Ray actor class. `actors/client_handle.py` makes one and wraps its handle."""
