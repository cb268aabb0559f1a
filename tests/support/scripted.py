"""A scripted engine, an engine core on the in-memory channel with a fake clock, and peers that speak frames by hand."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
from collections import Counter
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from typing import Any

import numpy as np

from raycore.client.client import EngineCoreClient
from raycore.client.control import ControlPlane, PoolAccess
from raycore.client.in_process import NoControlPlane
from raycore.client.scope import Routing
from raycore.codec import FrameDecoder, FrameEncoder
from raycore.config import HealthConfig, Limits, Timeouts
from raycore.core.engine_core import EngineCore
from raycore.engine import EMPTY, Activity, Detail, Engine, EngineInfo, EngineLoad, EngineRequest, FinishReason, LogprobRows, StepOutput
from raycore.ids import EngineId, Epoch, Incarnation, Rank, Term
from raycore.membership import Endpoints, Member, Membership
from raycore.messages import PROTOCOL_VERSION, Abort, Add, Attach, Call, CallResult, ClientFrame, EngineFrame, StepColumns
from raycore.metrics import MetricsSink
from raycore.operations import OPERATIONS
from raycore.sampling import SamplingParams
from raycore.tensors import TensorReader
from raycore.tokenizer import ByteTokenizer
from raycore.transport.memory import MemoryChannel, MemoryListener

POOL = "memory"


class FakeClock:
    """Time that moves when a test says so."""

    def __init__(self) -> None:
        self.now_s = 1000.0

    def __call__(self) -> float:
        return self.now_s

    def advance(self, seconds: float) -> None:
        self.now_s += seconds


class ScriptedEngine:
    """Gives request r's i-th token as `prompt[i % len]`, one a step, unless `before_step` or the tables of errors say otherwise."""

    def __init__(self, **info: Any) -> None:
        facts = {"vocab_size": 1000, "max_model_len": 4096, "kv_tokens": 1 << 20, "tasks": ("generate",), "gives_logprobs": True, **info}
        self._info = EngineInfo(engine="scripted", model="none", **facts)
        self.requests: dict[int, EngineRequest] = {}
        self.produced: dict[int, int] = {}
        self.log: list[tuple[str, Any]] = []
        self.add_errors: dict[str, Exception] = {}
        self.before_step: Callable[[], StepOutput | None] = lambda: None
        self.methods: dict[str, Callable[..., Any]] = {}
        self.rpc: dict[str, Callable[..., Any]] = {"echo": lambda *args, **kwargs: {"args": list(args), "kwargs": kwargs}}
        self.is_closed = False

    @property
    def info(self) -> EngineInfo:
        return self._info

    def add(self, request: EngineRequest) -> None:
        self.log.append(("add", request.request_id))
        error = self.add_errors.get(request.request_id)
        if error is not None:
            raise error
        self.requests[request.handle] = request
        self.produced[request.handle] = len(request.delivered)

    def abort(self, handles: Sequence[int]) -> None:
        for handle in handles:
            request = self.requests.pop(handle, None)
            if request is not None:
                self.log.append(("abort", request.request_id))

    def step(self) -> StepOutput:
        self.log.append(("step", len(self.requests)))
        scripted = self.before_step()
        if scripted is not None:
            return scripted
        handles = list(self.requests)
        tokens, finished, logprobs = [], [], []
        for handle in handles:
            request, position = self.requests[handle], self.produced[handle]
            tokens.append(int(request.prompt_token_ids[position % len(request.prompt_token_ids)]))
            logprobs += scripted_logprobs(handle, request, position, tokens[-1])
            self.produced[handle] = position + 1
            if position + 1 >= request.sampling.max_tokens:
                finished.append(handle)
                del self.requests[handle]
        return StepOutput(
            np.array(handles, np.uint32),
            np.array(tokens, np.uint32),
            finished=np.array(finished, np.uint32),
            reasons=bytes([FinishReason.LENGTH]) * len(finished),
            logprobs=logprobs,
        )

    def end_all(self, reason: FinishReason, detail: Detail | None = None, *, with_token: bool = True) -> StepOutput:
        """A step in which every request ends."""
        handles = np.array(list(self.requests), np.uint32)
        self.requests.clear()
        columns = (handles, np.full(len(handles), 7, np.uint32)) if with_token else (EMPTY, EMPTY)
        details = [] if detail is None else [(int(handle), detail) for handle in handles]
        return StepOutput(*columns, finished=handles, reasons=bytes([reason]) * len(handles), details=details)

    def has_work(self) -> bool:
        return bool(self.requests)

    def idle_step(self) -> None:
        self.log.append(("idle", 0))

    def load(self) -> EngineLoad:
        return EngineLoad(running=len(self.requests))

    def utilities(self) -> Mapping[str, Callable[..., Any]]:
        return self.methods

    def rpc_methods(self) -> Mapping[str, Callable[..., Any]]:
        return self.rpc

    def budget_s(self, activity: Activity) -> float | None:
        del activity
        return None

    def close(self) -> None:
        self.is_closed = True


def scripted_logprobs(handle: int, request: EngineRequest, position: int, token: int) -> list[LogprobRows]:
    """What the scripted engine says of an output token: log probability -position / 4 and rank position + 1; of prompt token i: -i / 4."""
    parts = []
    prompt = request.prompt_token_ids.tolist()
    if request.sampling.prompt_logprobs is not None and not position:
        places = range(1, len(prompt))
        parts.append(logprob_rows(handle, prompt[1:], places, request.sampling.prompt_logprobs, of_prompt=True))
    if request.sampling.logprobs is not None:
        parts.append(logprob_rows(handle, [token], range(position, position + 1), request.sampling.logprobs))
    return parts


def logprob_rows(handle: int, tokens: Sequence[int], places: range, width: int, *, of_prompt: bool = False) -> LogprobRows:
    count = len(tokens)
    column = np.array(places, np.uint32)
    top = np.tile(np.arange(width, dtype=np.uint32), count)
    return LogprobRows(
        np.full(count, handle, np.uint32),
        np.array(tokens, np.uint32),
        column.astype(np.float32) / -4,
        column + np.uint32(1),
        np.full(count, width, np.uint32),
        top,
        -top.astype(np.float32),
        of_prompt,
    )


class Rig:
    """One engine core on a memory listener; every turn checks its tables."""

    def __init__(
        self,
        engine: Engine | None = None,
        *,
        limits: Limits | None = None,
        capacity: int | None = None,
        clock: Callable[[], float] | None = None,
        rank: int = 0,
        is_member: bool = True,
    ) -> None:
        self.engine: Any = engine or ScriptedEngine()
        self.clock = FakeClock() if clock is None else clock
        self.listener = MemoryListener(capacity=capacity)
        self.id = EngineId(Rank(rank), Incarnation(f"i{rank}"))
        self.member = Member(self.id, Endpoints("memory", "", ""), self.engine.info, 0)
        self.membership = Membership(POOL, Epoch(1), Term(1), (self.member,)) if is_member else Membership(POOL)
        self.core = EngineCore(
            self.id,
            self.engine,
            self.listener,
            self.membership,
            limits=limits or Limits(),
            timeouts=Timeouts(),
            step_budget_s=30.0,
            clock=self.clock,
        )

    def turn(self, times: int = 1) -> None:
        for _ in range(times):
            self.core.turn(may_wait=False)
            self.core.check_invariants()

    def finish(self, limit: int = 1000) -> None:
        """Turn until the engine has nothing to do."""
        for _ in range(limit):
            self.turn()
            if not self.engine.has_work():
                return
        raise AssertionError(f"the engine still works after {limit} turns")

    def peer(self, **attach: Any) -> Peer:
        """A client that speaks frames by hand; attached."""
        peer = Peer(self)
        peer.attach(**attach)
        self.turn()
        return peer


class Peer:
    """A client's end without a client: what it was sent, decoded, and the streams of its slots."""

    _ids = itertools.count(1)

    def __init__(self, rig: Rig) -> None:
        self.rig = rig
        self.id = b"\x01" + next(self._ids).to_bytes(15, "big")
        self.seq = 0
        self.inbox: list[list[Any]] = []
        self.is_frozen = False
        self.tokens: dict[int, list[int]] = {}
        self.ended: dict[int, FinishReason] = {}
        self.ends: list[tuple[int, FinishReason]] = []
        self._adds: Counter[int] = Counter()
        self._encoder = FrameEncoder()
        self._decoder = FrameDecoder(EngineFrame, TensorReader(POOL))
        self._slots: list[int] = []
        rig.listener.connect(self.id, self)  # type: ignore[arg-type]

    # what the listener asks of a channel

    @property
    def backlog(self) -> int:
        return len(self.inbox)

    def deliver(self, message: list[Any]) -> None:
        self.inbox.append(message)

    # what a test does

    def send(self, *items: Any, seq: int | None = None) -> None:
        number = self.seq if seq is None else seq
        self.seq = number + 1
        self.rig.listener.push(self.id, self._encoder.encode(ClientFrame(number, list(items))))

    def send_raw(self, *parts: bytes) -> None:
        self.rig.listener.push(self.id, list(parts))

    def attach(self, *items: Any, **changes: Any) -> None:
        fields: dict[str, Any] = {
            "version": PROTOCOL_VERSION,
            "pool": POOL,
            "incarnation": self.rig.id.incarnation,
            "lease_s": 30.0,
            **changes,
        }
        self.send(Attach(client=f"peer-{self.id[-1]}", **fields), *items)

    def add(
        self, slot: int, prompt: Sequence[int] = (1, 2, 3), *, name: str | None = None, delivered: Sequence[int] = (), **sampling: Any
    ) -> Add:
        self._adds[slot] += 1
        column = np.array(prompt, np.uint32).tobytes()
        known = np.array(delivered, np.uint32).tobytes()
        return Add(slot, name or f"{self.id[-1]}-{slot}", column, SamplingParams(**sampling), known)  # type: ignore[arg-type]

    def abort(self, *slots: int) -> Abort:
        return Abort(np.array(slots, np.uint32).tobytes())

    def call(self, call_id: int, method: str, /, **arguments: Any) -> Call:
        operation = OPERATIONS.get(method)
        struct: Any = operation.arguments(**arguments) if operation else arguments
        return Call(call_id, method, self._encoder.encode_part(struct))  # type: ignore[arg-type]

    def frames(self) -> list[EngineFrame]:
        """Every frame since the last call, decoded; streams are kept up to date."""
        messages, self.inbox = self.inbox, []
        frames = [self._decoder.decode(message) for message in messages]
        for frame in frames:
            for item in frame.items:
                if isinstance(item, StepColumns):
                    self._take(item)
        return frames

    def items(self, kind: type | None = None) -> list[Any]:
        return [item for frame in self.frames() for item in frame.items if kind is None or isinstance(item, kind)]

    def results(self) -> dict[int, CallResult]:
        return {result.call_id: result for result in self.items(CallResult)}

    def value(self, result: CallResult, kind: Any = Any) -> Any:
        assert result.error is None, result.error
        return self._decoder.decode_part(result.result, kind)

    def _take(self, columns: StepColumns) -> None:
        for slot, offset in columns.offsets:
            assert slot not in self.tokens
            self.tokens[slot] = [-1] * offset
        if columns.tokens:
            if columns.slots:
                self._slots = np.frombuffer(columns.slots, np.uint32).tolist()
            tokens = np.frombuffer(columns.tokens, np.uint32).tolist()
            counts = np.frombuffer(columns.counts, np.uint32).tolist() if columns.counts else [1] * len(self._slots)
            assert sum(counts) == len(tokens)
            assert len(counts) == len(self._slots)
            for slot, count in zip(self._slots, counts, strict=True):
                self.tokens.setdefault(slot, []).extend(tokens[:count])
                del tokens[:count]
        for slot, reason in zip(np.frombuffer(columns.finished, np.uint32).tolist(), columns.reasons, strict=True):
            self.ends.append((slot, FinishReason(reason)))
            assert sum(ended == slot for ended, _ in self.ends) <= self._adds[slot], "ended twice"
            self.ended[slot] = FinishReason(reason)


class RankLinks:
    """Links to several engine cores in this process."""

    def __init__(self, rigs: Sequence[Rig]) -> None:
        self._listeners = {rig.id: rig.listener for rig in rigs}
        self.channels: list[MemoryChannel] = []

    def start(self, health: Any, on_verdict: Any) -> None:
        pass

    def channel(self, member: Member, session: Any) -> MemoryChannel:
        channel = MemoryChannel(self._listeners[member.engine], session)
        self.channels.append(channel)
        return channel

    def files(self, member: Member) -> None:
        return None

    def watch(self, member: Member) -> None:
        pass

    def forget(self, engine: EngineId) -> None:
        pass

    def snapshots(self, endpoints: Endpoints) -> None:
        return None

    async def close(self) -> None:
        pass


@contextlib.asynccontextmanager
async def memory_client(
    *rigs: Rig,
    limits: Limits | None = None,
    on_engine_death: str = "fail",
    control: ControlPlane | None = None,
    routing: Routing | None = None,
    members: int | None = None,
    metrics: MetricsSink | None = None,
) -> AsyncIterator[EngineCoreClient]:
    """A client of engine cores that a task turns on the same loop; whatever the loop's callbacks raise fails the test.

    `members`: how many of them are, the first ones; None: all.
    """
    loop = asyncio.get_running_loop()
    raised: list[dict[str, Any]] = []
    loop.set_exception_handler(lambda _loop, context: raised.append(context))
    membership = Membership(POOL, Epoch(1), Term(1), tuple(rig.member for rig in rigs[:members]))
    for rig in rigs[:members]:
        rig.core.set_membership(Membership(POOL, Epoch(2), Term(1), membership.members))
    access = PoolAccess(membership=Membership(POOL, Epoch(2), Term(1), membership.members), on_engine_death=on_engine_death)
    turners = [asyncio.create_task(_turn(rig)) for rig in rigs]
    try:
        client = EngineCoreClient(
            access,
            control or NoControlPlane(),
            RankLinks(rigs),
            limits=limits or Limits(),
            health=HealthConfig(),
            tokenizer=ByteTokenizer(),
            routing=routing,
            metrics=metrics,
        )
        async with client:
            yield client
            client.check_invariants()
    finally:
        for turner in turners:
            turner.cancel()
        await asyncio.gather(*turners, return_exceptions=True)
    assert not raised, raised


async def _turn(rig: Rig) -> None:
    while True:
        try:
            rig.core.turn(may_wait=False)
        except Exception as error:  # noqa: BLE001 -- as the core's own loop does
            rig.core.fail(error)
            return
        await asyncio.sleep(0)
