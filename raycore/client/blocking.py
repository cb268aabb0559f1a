"""The blocking façade: the async client on an event loop that somebody turns, and nothing of its own."""

from __future__ import annotations

import asyncio
import threading
import weakref
from collections.abc import Awaitable, Callable, Coroutine, Iterable, Iterator, Sequence
from types import TracebackType
from typing import Any, Protocol, TypeVar

import numpy as np
from numpy.typing import NDArray

from raycore.client.admission import Prompt
from raycore.client.client import EngineCoreClient
from raycore.client.control import ScalingReport
from raycore.client.fan_out import FanOutStream
from raycore.client.journal import RequestOutput
from raycore.client.operations import BlockingOperations
from raycore.client.stream import RequestStream
from raycore.engine import EngineInfo, EngineLoad
from raycore.errors import ClientClosedError
from raycore.ids import RequestId
from raycore.membership import Membership
from raycore.routing.decisions import Decision
from raycore.sampling import SamplingParams
from raycore.tokenizer import Tokenizer

T = TypeVar("T")


class LoopTurner(Protocol):
    """Turns an event loop while a blocking call waits."""

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        """The result of a coroutine on the loop. An interrupt cancels it and is raised."""
        ...

    def is_here(self) -> bool:
        """Whether the calling code runs on the loop, so that waiting for it would never end."""
        ...

    def close(self) -> None:
        """The loop ends. Idempotent."""
        ...


def new_event_loop() -> asyncio.AbstractEventLoop:
    """uvloop where it is installed: a wake-up costs half as much there."""
    try:
        import uvloop
    except ImportError:
        return asyncio.new_event_loop()
    return uvloop.new_event_loop()


class ThreadTurner:
    """The loop runs in a daemon thread of its own."""

    def __init__(self) -> None:
        self._loop = new_event_loop()
        self._thread = threading.Thread(target=self._turn, name="raycore-client", daemon=True)
        self._thread.start()

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        """Hand the coroutine to the loop and wait for it."""
        if not self._thread.is_alive():
            work.close()
            msg = "the client is closed"
            raise ClientClosedError(msg)
        future = asyncio.run_coroutine_threadsafe(work, self._loop)
        try:
            return future.result()
        except BaseException:
            future.cancel()
            raise

    def is_here(self) -> bool:
        """Whether this is the loop's thread."""
        return threading.current_thread() is self._thread

    def close(self) -> None:
        """Stop the loop and join its thread."""
        if self._thread.is_alive():
            self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join()

    def _turn(self) -> None:
        try:
            self._loop.run_forever()
        finally:
            self._loop.run_until_complete(self._loop.shutdown_asyncgens())
            self._loop.close()


class BlockingStream:
    """One request's stream as a plain iterator; leaving it early aborts the request."""

    def __init__(self, stream: RequestStream | FanOutStream, turner: LoopTurner) -> None:
        self._stream = stream
        self._turner = turner

    @property
    def request_id(self) -> str:
        """The request's id."""
        return self._stream.request_id

    @property
    def rank(self) -> int:
        """The rank that serves it."""
        return self._stream.rank

    def __iter__(self) -> Iterator[RequestOutput]:
        return self

    def __next__(self) -> RequestOutput:
        """The next new tokens. They are taken only once the wait is over, so that Ctrl-C at any moment loses none of them."""
        self._turner.run(self._stream.wait())
        output = self._stream.take()
        if output is None:
            raise StopIteration
        return output

    def collect(self) -> RequestOutput:
        """All tokens and text from here to the end."""
        return self._turner.run(self._stream.collect())

    def collect_all(self) -> list[RequestOutput]:
        """Every answer of a request as a whole, by index."""
        return self._turner.run(self._stream.collect_all())

    def close(self) -> None:
        """Stop reading; aborts the request if it runs."""
        self._turner.run(self._stream.aclose())

    def __enter__(self) -> BlockingStream:
        return self

    def __exit__(self, _kind: type[BaseException] | None, _error: BaseException | None, _trace: TracebackType | None) -> None:
        self.close()


class _BlockingCalls:
    """Carries out operations for `BlockingOperations`."""

    def __init__(self, client: EngineCoreClient, turner: LoopTurner) -> None:
        self._client = client
        self._turner = turner

    def call_operation(self, method: str, rank: int | None, timeout_s: float | None, arguments: dict[str, Any]) -> Any:
        """Call with the operation's own fan-out, and wait."""
        return self._turner.run(self._client.call_operation(method, rank, timeout_s, arguments))


class BlockingClient:
    """The client for code without an event loop; same names, same errors, thread-safe where the loop has a thread."""

    def __init__(
        self,
        make: Callable[[], Awaitable[EngineCoreClient]],
        *,
        turner: LoopTurner | None = None,
        on_close: Callable[[], None] | None = None,
    ) -> None:
        self._turner: LoopTurner = turner or ThreadTurner()
        self._on_close = on_close
        try:
            self._client = self._turner.run(_made(make))
        except BaseException:
            self._turner.close()
            raise
        # neither of these refers to self: the client is freed when its last user lets go of it, not when the collector finds a cycle
        self.operations = BlockingOperations(_BlockingCalls(self._client, self._turner))
        self._finalizer = weakref.finalize(self, _close, self._client, self._turner, on_close)

    def __enter__(self) -> BlockingClient:
        return self

    def __exit__(self, _kind: type[BaseException] | None, _error: BaseException | None, _trace: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """Leave the pool; idempotent."""
        self._finalizer()

    def shutdown(self, timeout_s: float | None = None) -> None:
        """End the pool: drain for `timeout_s` seconds, then take it down."""
        self._run(lambda client: client.shutdown(timeout_s))
        self.close()

    @property
    def pool(self) -> str:
        """The pool's name."""
        return self._client.pool

    @property
    def info(self) -> EngineInfo:
        """What the engines say of themselves."""
        return self._client.info

    @property
    def membership(self) -> Membership:
        """The newest membership that the client knows."""
        return self._client.membership

    def ranks(self) -> tuple[int, ...]:
        """The ranks that serve, in order."""
        return self._client.ranks()

    def loads(self) -> dict[int, EngineLoad]:
        """Each rank's last reported load."""
        return self._client.loads()

    def explain(self, request_id: str) -> Decision | None:
        """Why a request went to its engine; None when that is too long ago."""
        return self._client.explain(request_id)

    def in_flight(self) -> int:
        """Requests of this client that have not ended."""
        return self._client.in_flight()

    @property
    def tokenizer(self) -> Tokenizer | None:
        """The model's tokenizer, where this host has it."""
        return self._client.tokenizer

    def chat_prompt(self, messages: Sequence[dict[str, str]]) -> list[int]:
        """Token ids of a conversation under the model's chat template."""
        return self._client.chat_prompt(messages)

    def generate(self, prompt: Prompt | None, sampling: SamplingParams | None = None, **options: Any) -> BlockingStream:
        """Send a request now and iterate over its outputs; options as in the async client."""

        async def begin() -> RequestStream | FanOutStream:
            return self._client.generate(prompt, sampling, **options)

        return BlockingStream(self._turner.run(begin()), self._turner)

    def add_request(self, prompt: Prompt | None, sampling: SamplingParams | None = None, **options: Any) -> RequestId:
        """Send a request whose outputs come through `outputs()`."""
        return self._run(lambda client: client.add_request(prompt, sampling, **options))

    def add_requests(self, requests: Iterable[tuple[Prompt | None, SamplingParams | None]]) -> list[RequestId]:
        """Send many in one turn of the loop: far cheaper than one at a time."""

        async def add_all() -> list[RequestId]:
            added: list[RequestId] = []
            try:
                for prompt, sampling in requests:
                    added.append(await self._client.add_request(prompt, sampling))
            except BaseException:
                await self._client.abort_requests(added)  # nobody would ever learn their ids
                raise
            return added

        return self._turner.run(add_all())

    def embed(self, prompts: Prompt | Sequence[Prompt], **options: Any) -> NDArray[np.float32]:
        """Vectors of prompts; options as in the async client."""
        return self._run(lambda client: client.embed(prompts, **options))

    def outputs(self) -> list[RequestOutput]:
        """Everything new of all requests made with `add_request`; waits for at least one output."""
        while True:
            self._run(lambda client: client.wait_for_outputs())
            outputs = self._client.take_outputs()
            if outputs:
                return outputs

    def abort_requests(self, request_ids: Iterable[str]) -> None:
        """End requests early."""
        self._run(lambda client: client.abort_requests(request_ids))

    def call(self, method: str, /, *, rank: int, timeout_s: float | None = None, **arguments: Any) -> Any:
        """Call an operation on one rank."""
        return self._run(lambda client: client.call(method, rank=rank, timeout_s=timeout_s, **arguments))

    def call_all(self, method: str, /, *, timeout_s: float | None = None, **arguments: Any) -> dict[int, Any]:
        """Call an operation on every rank; results and errors by rank."""
        return self._run(lambda client: client.call_all(method, timeout_s=timeout_s, **arguments))

    def call_agree(self, method: str, /, *, timeout_s: float | None = None, **arguments: Any) -> Any:
        """Call an operation on every rank; their one result, or DisagreementError."""
        return self._run(lambda client: client.call_agree(method, timeout_s=timeout_s, **arguments))

    def scale_elastic_ep(self, data_parallel_size: int) -> ScalingReport:
        """Grow or shrink the pool while it serves; see `EngineCoreClient.scale_elastic_ep`."""
        return self._run(lambda client: client.scale_elastic_ep(data_parallel_size))

    def remove_ranks(self, ranks: Iterable[int]) -> ScalingReport:
        """Let these ranks leave; see `EngineCoreClient.remove_ranks`."""
        return self._run(lambda client: client.remove_ranks(ranks))

    def _run(self, work: Callable[[EngineCoreClient], Coroutine[Any, Any, T]]) -> T:
        return self._turner.run(work(self._client))


async def _made(make: Callable[[], Awaitable[EngineCoreClient]]) -> EngineCoreClient:
    return await make()


def _close(client: EngineCoreClient, turner: LoopTurner, on_close: Callable[[], None] | None) -> None:
    """Close the client on its loop, then the loop, then what lies below."""
    if turner.is_here():  # the collector ran on the loop's own thread, which must not wait for itself
        threading.Thread(target=_close, args=(client, turner, on_close), name="raycore-client-close").start()
        return
    try:
        turner.run(client.aclose())
    except ClientClosedError:
        pass
    finally:
        turner.close()
        if on_close is not None:
            on_close()
