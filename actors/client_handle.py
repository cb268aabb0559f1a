"""The callers' side of client actors: get one by name or make it, and call it as one calls the client itself."""

from __future__ import annotations

import asyncio
import contextlib
import secrets
import weakref
from collections.abc import Awaitable, Iterable, Sequence
from typing import Any, Generic, Literal, TypeVar

import ray
import ray.exceptions

from actors.client_actor import ClientActor, Request
from actors.local_ray import ensure_ray
from actors.naming import NAMESPACE, Role, client_name, named_actors
from actors.remote import remote_call, translate
from raycore.client.collected import collected
from raycore.client.control import ScalingReport
from raycore.client.journal import RequestOutput
from raycore.client.operations import AsyncOperations
from raycore.errors import ClientClosedError, PoolNotFoundError, RaycoreError
from raycore.ids import RequestId
from raycore.sampling import SamplingParams

Item = TypeVar("Item")

_POLL_S = 10.0
"""How long one call of `outputs` waits in the actor before it is made again."""
_LEAVE_S = 5.0


def client_actor(
    pool: str, name: str = "default", *, lifetime: Literal["scoped", "detached"] = "scoped", num_cpus: float = 0
) -> ClientHandle:
    """The pool's client actor of this name, made where there is none."""
    full_name = client_name(pool, name)
    ensure_ray()
    if not any(found.role is not Role.CLIENT for found in named_actors(pool)):
        msg = f"there is no pool {pool!r} in this Ray cluster"
        raise PoolNotFoundError(msg)
    options = ClientActor.options(
        name=full_name,
        namespace=NAMESPACE,
        get_if_exists=True,
        lifetime="detached" if lifetime == "detached" else None,
        num_cpus=num_cpus,
        scheduling_strategy="DEFAULT",
    )
    return ClientHandle(options.remote(pool, name), pool, name)


class ClientHandle:
    """A client actor for one caller; a copy that is sent to another process is another caller there.

    `actor` is the Ray handle: its methods have the same names, take `.remote(...)`, and give object references. The methods here await
    them and raise raycore's errors; streams can also be read without an event loop. When this process ends, however it does, or the handle
    is closed or collected, the requests that it has running are aborted.
    """

    def __init__(self, actor: Any, pool: str, name: str) -> None:
        self.actor = actor
        self.pool = pool
        self.name = name
        self._caller: str | None = None
        self._attendance: Any = None
        self._finalizer: Any = None
        self._is_attached = False
        self._is_closed = False

    def __repr__(self) -> str:
        return f"ClientHandle({self.pool!r}, {self.name!r})"

    def __reduce__(self) -> tuple[Any, ...]:
        return ClientHandle, (self.actor, self.pool, self.name)

    @property
    def operations(self) -> AsyncOperations:
        """Every declared operation as a coroutine method, as on the client."""
        return AsyncOperations(self)  # not kept: the cycle would keep a dropped handle attached until the next collection

    def generate(self, prompt: Any, sampling: SamplingParams | None = None, **options: Any) -> ActorStream[RequestOutput]:
        """Send a request and stream its outputs, with the options of the client's `generate`. A refusal is raised by the first item."""
        return ActorStream(self.actor.generate.remote(prompt, sampling, caller=self._attach(), **options), self, "generate")

    def generate_many(self, requests: Iterable[Request]) -> ActorStream[list[RequestOutput]]:
        """Stream many requests as one; each request is prompt, sampling and a dict of options. The cheapest way through an actor."""
        return ActorStream(self.actor.generate_many.remote(list(requests), caller=self._attach()), self, "generate_many")

    async def add_request(self, prompt: Any, sampling: SamplingParams | None = None, **options: Any) -> RequestId:
        """Send a request whose outputs come through `outputs()`; its id."""
        return (await self.add_requests([(prompt, sampling, options)]))[0]

    async def add_requests(self, requests: Iterable[Request]) -> list[RequestId]:
        """The same for many, in one call."""
        return await self._ask(self.actor.add_requests.remote(await self._attached(), list(requests)), "add_requests")

    async def outputs(self) -> list[RequestOutput]:
        """Everything new of this caller's added requests, at least one output; empty when none of them is left."""
        caller = await self._attached()
        while True:
            outputs, is_idle = await self._ask(self.actor.outputs.remote(caller, _POLL_S), "outputs")
            if outputs or is_idle:
                return outputs

    async def abort_requests(self, request_ids: Iterable[str]) -> None:
        """End requests early; unknown ids are ignored. Each ends with finish reason "abort"."""
        await self._ask(self.actor.abort_requests.remote(list(request_ids)), "abort_requests")

    async def call(self, method: str, /, *, rank: int, timeout_s: float | None = None, **arguments: Any) -> Any:
        """An operation on one rank."""
        return await self._ask(self.actor.call.remote(method, rank=rank, timeout_s=timeout_s, **arguments), method)

    async def call_all(self, method: str, /, *, timeout_s: float | None = None, **arguments: Any) -> dict[int, Any]:
        """An operation on every serving rank: each one's result, or its error as the value."""
        return await self._ask(self.actor.call_all.remote(method, timeout_s=timeout_s, **arguments), method)

    async def call_agree(self, method: str, /, *, timeout_s: float | None = None, **arguments: Any) -> Any:
        """An operation on every serving rank, whose results must be equal."""
        return await self._ask(self.actor.call_agree.remote(method, timeout_s=timeout_s, **arguments), method)

    async def call_any(self, method: str, /, *, timeout_s: float | None = None, **arguments: Any) -> Any:
        """An operation on one serving rank, whichever."""
        return await self._ask(self.actor.call_any.remote(method, timeout_s=timeout_s, **arguments), method)

    async def call_operation(self, method: str, rank: int | None, timeout_s: float | None, arguments: dict[str, Any]) -> Any:
        """An operation with the fan-out that it declares, or on one rank."""
        return await self._ask(self.actor.call_operation.remote(method, rank, timeout_s, arguments), method)

    async def scale_elastic_ep(self, data_parallel_size: int) -> ScalingReport:
        """Grow or shrink the pool while it serves, as the client's method of this name."""
        return await self._ask(self.actor.scale_elastic_ep.remote(data_parallel_size), "scale_elastic_ep")

    async def remove_ranks(self, ranks: Sequence[int]) -> ScalingReport:
        """Let chosen ranks leave, as the client's method of this name."""
        return await self._ask(self.actor.remove_ranks.remote(tuple(ranks)), "remove_ranks")

    async def status(self) -> dict[str, Any]:
        """What the client actor knows: its process, the ranks, requests in flight, attached callers."""
        return await self._ask(self.actor.status.remote(), "status")

    def close(self) -> None:
        """This caller takes its leave: what it has running is aborted; the actor goes on. Idempotent."""
        self._is_closed = True
        if self._finalizer is not None:
            self._finalizer()

    async def end(self) -> None:
        """End the client actor, for all its callers."""
        self._is_closed = True
        with contextlib.suppress(RaycoreError):  # it is gone, or does not answer: then the kill is all there is
            await remote_call(self.actor.leave.remote(), limit_s=_LEAVE_S, what=f"{self!r}: leave")
        await asyncio.to_thread(ray.kill, self.actor)

    def _attach(self) -> str:
        """This caller's name in the actor, which learns by an open stream of when it is gone."""
        if self._is_closed:
            msg = f"{self!r} is closed"
            raise ClientClosedError(msg)
        if self._caller is None:
            self._caller = secrets.token_hex(8)
            self._attendance = self.actor.attend.remote(self._caller)
            self._finalizer = weakref.finalize(self, _cancel, self._attendance)
            self._finalizer.atexit = False  # Ray may be down by then; the actor learns of the process's end all the same
        return self._caller

    async def _attached(self) -> str:
        """Likewise, once the actor knows it: Ray does not promise that calls begin in their order."""
        caller = self._attach()
        if not self._is_attached:
            await self._ask(await anext(self._attendance), "attend")
            self._is_attached = True
        return caller

    async def _ask(self, ref: Awaitable[Any], what: str) -> Any:
        try:
            return await ref
        except ray.exceptions.RayError as error:
            raise translate(error, what=f"{self!r}: {what}") from error


class ActorStream(Generic[Item]):
    """Items of a client actor's stream, with or without an event loop; leaving it early, closing it or dropping it aborts its requests.

    Ray itself would let a dropped generator's task run on (tried), so this cancels it.
    """

    def __init__(self, generator: Any, handle: ClientHandle, what: str) -> None:
        self._generator = generator
        self._handle = handle  # the caller must stay attached while this is read
        self._what = what
        self._ref: Any = None
        """An item that was announced and not read yet: a cancelled read must not lose it."""
        self._is_over = False

    def __aiter__(self) -> ActorStream[Item]:
        return self

    async def __anext__(self) -> Item:
        """The next item. Raises the request's typed error when it failed."""
        if self._is_over:
            raise StopAsyncIteration
        try:
            if self._ref is None:
                self._ref = await anext(self._generator)
            item = await self._ref
        except StopAsyncIteration:
            self._is_over = True
            raise
        except ray.exceptions.RayError as error:
            self._is_over = True
            raise self._translated(error) from error
        self._ref = None
        return item

    def __iter__(self) -> ActorStream[Item]:
        return self

    def __next__(self) -> Item:
        """The next item, blocking."""
        if self._is_over:
            raise StopIteration
        try:
            if self._ref is None:
                self._ref = next(self._generator)
            item: Any = ray.get(self._ref)
        except StopIteration:
            self._is_over = True
            raise
        except ray.exceptions.RayError as error:
            self._is_over = True
            raise self._translated(error) from error
        self._ref = None
        return item

    async def collect(self) -> RequestOutput:
        """All of one request as one output; for streams of `generate`."""
        outputs: Sequence[Any] = [output async for output in self]
        return collected(outputs)

    def close(self) -> None:
        """Stop reading; aborts what runs. Idempotent."""
        if not self._is_over:
            self._is_over = True
            _cancel(self._generator)

    def __del__(self) -> None:
        self.close()

    def _translated(self, error: ray.exceptions.RayError) -> Exception:
        return translate(error, what=f"{self._handle!r}: {self._what}")


def _cancel(generator: Any) -> None:
    """End a stream's task; not what it asked of Ray in its turn, which is the client's."""
    if ray.is_initialized():
        ray.cancel(generator, recursive=False)
