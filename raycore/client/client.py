"""The engine-core client: a fleet of sessions, a desk for requests and one for utility calls, on one event loop."""

from __future__ import annotations

import asyncio
import os
import secrets
from collections.abc import Iterable, Sequence
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from raycore.client.admission import Ask, Prompt, sort_prompts
from raycore.client.control import ControlPlane, PoolAccess, ScalingReport
from raycore.client.fan_out import FanOutStream
from raycore.client.fleet import EngineFleet
from raycore.client.journal import RequestOutput, RequestRecord
from raycore.client.links import Links
from raycore.client.meter import FLUSH_S, ClientMeter
from raycore.client.operations import AsyncOperations
from raycore.client.requests import RequestDesk
from raycore.client.scope import Routing
from raycore.client.session import EngineSession
from raycore.client.stream import RequestStream
from raycore.client.utility import UtilityDesk
from raycore.config import HealthConfig, Limits, Timeouts
from raycore.engine import EMBED, EngineInfo, EngineLoad
from raycore.errors import ClientClosedError, ErrorRecord, InvalidArgumentsError, NoEngineError, NotSupportedError
from raycore.ids import RequestId
from raycore.membership import Membership
from raycore.messages import CallResult
from raycore.metrics import MetricsSink
from raycore.routing.decisions import Decision
from raycore.routing.selection import make_router, router_name
from raycore.sampling import SamplingParams
from raycore.tokenizer import Tokenizer


class EngineCoreClient:
    """Routes requests to the pool's engines, streams their outputs and resolves utility calls. Use it on one event loop."""

    def __init__(
        self,
        access: PoolAccess,
        control: ControlPlane,
        links: Links,
        *,
        timeouts: Timeouts | None = None,
        limits: Limits | None = None,
        health: HealthConfig | None = None,
        tokenizer: Tokenizer | None = None,
        routing: Routing | None = None,
        name: str | None = None,
        in_process: bool = False,
        metrics: MetricsSink | None = None,
    ) -> None:
        self.pool = access.membership.pool
        self.name = name or f"client-{os.getpid()}-{secrets.token_hex(3)}"
        self.tokenizer = tokenizer
        self.operations = AsyncOperations(self)
        """Every declared operation as a coroutine method: `await client.operations.pause_scheduler(mode="wait")`."""
        self._timeouts = timeouts or access.timeouts
        self._control = control
        self._in_process = in_process
        self._metrics = metrics
        self._meter = meter = None if metrics is None else ClientMeter()
        self._flushing: asyncio.Task[None] | None = None
        self._allow_pickle = access.allow_pickle
        routing = routing or Routing()
        self._fleet = EngineFleet(
            access.membership,
            control,
            links,
            client=self.name,
            timeouts=self._timeouts,
            limits=limits or access.limits,
            health=health or access.health,
            scope=routing.scope,
            meter=meter,
        )
        router, options = (access.router, access.router_options) if routing.router is None else (routing.router, routing.options)
        self._requests = RequestDesk(
            self._fleet,
            make_router(router, options),
            tokenizer,
            router_name=router_name(router),
            client=self.name,
            replays_deaths=access.on_engine_death == "replay",
            limits=limits or access.limits,
            meter=meter,
        )
        self._calls: UtilityDesk | None = None
        self._is_closed = False

    async def start(self) -> None:
        """Open a session with every member. DeadlineError or EngineDeadError when one does not answer in time."""
        self._loop = asyncio.get_running_loop()
        self._calls = UtilityDesk(
            self._fleet, self._timeouts, in_process=self._in_process, allow_pickle=self._allow_pickle, meter=self._meter
        )
        try:
            await self._fleet.start(self, self)
        except BaseException:
            await self.aclose()
            raise
        if self._meter is not None:
            self._flushing = self._loop.create_task(self._flush(), name="raycore-metrics")

    async def __aenter__(self) -> EngineCoreClient:
        await self.start()
        return self

    async def __aexit__(self, _kind: type[BaseException] | None, _error: BaseException | None, _trace: TracebackType | None) -> None:
        await self.aclose()

    async def aclose(self) -> None:
        """Leave the pool: running requests are aborted, what waits fails with ClientClosedError, nothing of this client is left.

        Idempotent.
        """
        if self._is_closed:
            return
        self._is_closed = True
        self._requests.close(ClientClosedError("the client was closed"))
        if self._calls is not None:
            self._calls.close()
            await self._calls.wait_closed()
        await self._fleet.close()
        if self._flushing is not None:
            self._flushing.cancel()
            await asyncio.gather(self._flushing, return_exceptions=True)
            if self._meter is not None and self._metrics is not None:
                self._meter.flush(self._metrics)

    async def _flush(self) -> None:
        """Hand the figures on, again and again."""
        while self._meter is not None and self._metrics is not None:
            await asyncio.sleep(FLUSH_S)
            self._meter.flush(self._metrics)

    async def shutdown(self, timeout_s: float | None = None) -> None:
        """End the pool: let this client's requests finish for `timeout_s` seconds (default `Timeouts.drain_s`; 0 aborts), then take it
        down.
        """
        self._check_open()
        drain_s = self._timeouts.drain_s if timeout_s is None else timeout_s
        until_s = self._loop.time() + drain_s
        if drain_s > 0:
            await self._requests.wait_until_idle(drain_s)
        await self._control.shutdown_pool(max(0.0, until_s - self._loop.time()))
        await self.aclose()

    async def scale_elastic_ep(self, data_parallel_size: int) -> ScalingReport:
        """Grow or shrink the pool to `data_parallel_size` ranks while it serves; returns when that is done.

        The lowest free ranks join, the highest leave; what ran on a leaver goes on elsewhere. A repetition of the running operation waits
        for it. ScalingBusyError while another runs; CapacityError, ScalingError when it was undone, and the old ranks serve on.
        """
        self._check_open()
        return await self._learn(await self._control.scale(data_parallel_size))

    async def remove_ranks(self, ranks: Iterable[int]) -> ScalingReport:
        """Let these ranks leave, whichever they are; like `scale_elastic_ep` otherwise. UnknownRankError for one that does not serve."""
        self._check_open()
        try:
            wanted = tuple(ranks)
        except TypeError as error:
            msg = f"ranks is a list of the ranks that shall leave, not {ranks!r}"
            raise InvalidArgumentsError(msg, method="remove_ranks") from error
        return await self._learn(await self._control.remove_ranks(wanted))

    async def _learn(self, report: ScalingReport) -> ScalingReport:
        """Know the new members before the caller does, whatever the engines' own news take."""
        membership = await self._control.refresh()
        if membership is not None:
            self._fleet.on_membership(membership)
        await self._fleet.wait_attached()
        return report

    @property
    def info(self) -> EngineInfo:
        """What the engines say of themselves; the strictest of each limit."""
        if self._fleet.info is None:
            msg = "no engine has answered yet"
            raise NoEngineError(msg)
        return self._fleet.info

    @property
    def membership(self) -> Membership:
        """The newest membership that this client knows."""
        return self._fleet.membership

    def ranks(self) -> tuple[int, ...]:
        """The ranks that serve, in order."""
        return tuple(session.engine.rank for session in self._fleet.sessions())

    def loads(self) -> dict[int, EngineLoad]:
        """Each rank's last reported load."""
        return {session.engine.rank: session.ledger.load for session in self._fleet.sessions()}

    def explain(self, request_id: str) -> Decision | None:
        """Why a request went to its engine: the policy, and what it knew of each engine that it looked at.

        None when the client has made more than `raycore.routing.decisions.KEPT` decisions since.
        """
        return self._requests.explain(request_id)

    def in_flight(self) -> int:
        """Requests of this client that have not ended."""
        return len(self._requests)

    def chat_prompt(self, messages: Sequence[dict[str, str]]) -> list[int]:
        """Token ids of a conversation under the model's chat template."""
        if self.tokenizer is None:
            msg = "this client has no tokenizer for the pool's model"
            raise NotSupportedError(msg)
        return self.tokenizer.apply_chat_template(list(messages))

    # -- requests ---------------------------------------------------------------------------------------------------------

    def generate(
        self,
        prompt: Prompt | None,
        sampling: SamplingParams | None = None,
        *,
        request_id: str | None = None,
        data_parallel_rank: int | None = None,
        priority: int = 0,
        tensors: dict[str, Any] | None = None,
        detokenize: bool | None = None,
        lora: str | int | None = None,
    ) -> RequestStream | FanOutStream:
        """Send a request now and stream its outputs. Raises at once for a request that cannot be served.

        `prompt` is text, token ids, or None beside `tensors={"prompt_embeds": ...}`, a tensor [prompt tokens, `info.embedding_size`].
        `priority`: the lower number goes first. `detokenize`: whether outputs carry text; None: where the prompt is text. With `sampling.n`
        above 1 the outputs of all answers come as one stream. `lora`: name or id of a loaded adapter to run with.
        """
        self._check_open()
        records = self._requests.admit(Ask(prompt, sampling, request_id, data_parallel_rank, priority, tensors, detokenize, lora=lora))
        if len(records) == 1:
            return RequestStream(records[0], self._requests.abort, self._loop)
        return FanOutStream(records, self._requests.abort, self._loop)

    async def add_request(
        self,
        prompt: Prompt | None,
        sampling: SamplingParams | None = None,
        *,
        request_id: str | None = None,
        data_parallel_rank: int | None = None,
        priority: int = 0,
        tensors: dict[str, Any] | None = None,
        detokenize: bool | None = None,
        lora: str | int | None = None,
    ) -> RequestId:
        """Send a request as `generate` does; its outputs come through `outputs()`, under this id for all its answers."""
        self._check_open()
        records = self._requests.admit(Ask(prompt, sampling, request_id, data_parallel_rank, priority, tensors, detokenize, True, lora))
        return records[0].parent_id or records[0].request_id

    async def embed(
        self,
        prompts: Prompt | Sequence[Prompt],
        *,
        data_parallel_rank: int | None = None,
        priority: int = 0,
    ) -> NDArray[np.float32]:
        """Vectors of prompts, as a pool of task "embed" gives them: [size] float32 for one prompt, [prompts, size] for a list of them.

        All are sent at once and computed together. When one fails, or the caller is cancelled, the others are aborted.
        """
        self._check_open()
        is_single, asked = sort_prompts(prompts)
        streams: list[RequestStream] = []
        try:
            for prompt in asked:
                ask = Ask(prompt, None, None, data_parallel_rank, priority, detokenize=False, task=EMBED)
                streams.append(RequestStream(self._requests.admit(ask)[0], self._requests.abort, self._loop))
            vectors = await asyncio.gather(*(stream.vector() for stream in streams))
        finally:
            for stream in streams:
                await stream.aclose()
        return vectors[0] if is_single else np.stack(vectors)

    async def outputs(self) -> list[RequestOutput]:
        """Everything new of all requests made with `add_request`, at least one output; a failed request's last output has `error` set."""
        while True:
            await self.wait_for_outputs()
            outputs = self.take_outputs()
            if outputs:
                return outputs

    async def wait_for_outputs(self) -> None:
        """Until `take_outputs` has something to give."""
        self._check_open()
        await self._requests.wait_for_mail()

    def take_outputs(self) -> list[RequestOutput]:
        """What `outputs()` would give, without waiting; from one thread at a time."""
        return self._requests.take_mail()

    async def abort_requests(self, request_ids: Iterable[str]) -> None:
        """End requests early; ids that are not in flight are ignored. Each ends with finish reason "abort"."""
        self._check_open()
        self._requests.abort_ids(request_ids)

    # -- utility calls ----------------------------------------------------------------------------------------------------

    async def call(self, method: str, /, *, rank: int, timeout_s: float | None = None, **arguments: Any) -> Any:
        """Call an operation on one rank. Errors are typed and name method and rank."""
        return await self._desk().one(method, rank, timeout_s, arguments)

    async def call_all(self, method: str, /, *, timeout_s: float | None = None, **arguments: Any) -> dict[int, Any]:
        """Call an operation on every serving rank; each rank's result, or its error as the value."""
        return await self._desk().all(method, timeout_s, arguments)

    async def call_agree(self, method: str, /, *, timeout_s: float | None = None, **arguments: Any) -> Any:
        """Call an operation on every serving rank; their one result. The first error is raised, unequal results raise DisagreementError."""
        return await self._desk().agree(method, timeout_s, arguments)

    async def call_any(self, method: str, /, *, timeout_s: float | None = None, **arguments: Any) -> Any:
        """Call an operation on one serving rank, whichever."""
        return await self._desk().any(method, timeout_s, arguments)

    async def call_operation(self, method: str, rank: int | None, timeout_s: float | None, arguments: dict[str, Any]) -> Any:
        """Call with the fan-out that the operation declares, or on one rank."""
        return await self._desk().declared(method, rank, timeout_s, arguments)

    # -- news, as `FleetListener` and `RequestSink` -----------------------------------------------------------------------

    def on_session_lost(self, old: EngineSession, fresh: EngineSession, records: list[RequestRecord], reason: str) -> None:
        """Calls of a lost session fail, its requests go on in the fresh one."""
        self._desk().on_session_lost(old, reason)
        self._requests.on_session_lost(fresh, records, reason)

    def on_engine_gone(self, session: EngineSession, records: list[RequestRecord], cause: str) -> None:
        """Calls of a dead engine fail, its requests fail or go elsewhere."""
        self._desk().on_engine_gone(session, cause)
        self._requests.on_engine_gone(session, records, cause)

    def on_engine_left(self, session: EngineSession, records: list[RequestRecord]) -> None:
        """The engine left by the pool's choice: its calls fail, its requests move."""
        self._desk().on_engine_gone(session, "left the pool")
        self._requests.on_engine_left(session, records)

    def on_finished(self, record: RequestRecord) -> None:
        """A request ended on its engine."""
        self._requests.on_finished(record)

    def on_refused(self, session: EngineSession, record: RequestRecord, error: ErrorRecord) -> None:
        """An engine refused a request."""
        self._requests.on_refused(session, record, error)

    def on_not_member(self, session: EngineSession, records: list[RequestRecord]) -> None:
        """An engine takes nothing new."""
        self._fleet.on_leaving(session)
        self._requests.on_not_member(records)

    def on_pause_stamp(self) -> None:
        """A rank carried out a pause or resume over all ranks."""
        if self._calls is not None:
            self._calls.on_pause_stamp()

    def on_call_result(self, session: EngineSession, result: CallResult) -> None:
        """A utility call was answered; while the client closes, nobody waits for it any more."""
        if self._calls is not None:
            self._calls.on_result(session, result)

    def _desk(self) -> UtilityDesk:
        if self._calls is None or self._is_closed:
            self._check_open()
            msg = "the client has not started"
            raise ClientClosedError(msg)
        return self._calls

    def _check_open(self) -> None:
        if self._is_closed or self._calls is None:
            msg = "the client is closed" if self._is_closed else "the client has not started"
            raise ClientClosedError(msg)

    def check_invariants(self) -> None:
        """Raise AssertionError when journal, sessions and ledgers disagree; for tests."""
        self._requests.check_invariants(self._fleet.check_invariants())
