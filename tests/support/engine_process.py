"""Echo engines in processes of their own, as a pool without Ray; and clients of them."""

from __future__ import annotations

import contextlib
import multiprocessing as mp
import os
import queue
import secrets
import signal
import threading
from collections.abc import AsyncIterator, Iterator
from multiprocessing.connection import Connection
from typing import Any

import msgspec
import pytest

from raycore import tensors
from raycore.client.client import EngineCoreClient
from raycore.client.control import PoolAccess
from raycore.client.in_process import NoControlPlane
from raycore.client.links import SocketLinks
from raycore.config import EngineSpec, HealthConfig, Limits, Timeouts
from raycore.core.host import EngineHost
from raycore.ids import EngineId, Epoch, Term
from raycore.membership import Member, Membership
from raycore.tokenizer import ByteTokenizer
from raycore.transport import endpoints
from raycore.transport.keys import curve_keys

START_LIMIT_S = 60.0
ANSWER_LIMIT_S = 20.0
ECHO: dict[str, Any] = {
    "vocab_size": 32_000,
    "max_model_len": 1 << 20,
    "kv_tokens": 1 << 24,
    "max_batch_tokens": 1 << 20,
    "max_sequences": 256,
    "base_s": 0.001,
}
"""A step takes a millisecond, so that what is long stays long on a fast machine."""


class CoreState(msgspec.Struct, frozen=True):
    """What an engine core holds; taken on its step thread, after its tables were checked."""

    sessions: int
    requests: int
    bad_frames: int
    stale_frames: int
    ended_sessions: int
    known_peers: int


def serve(connection: Connection, spec: EngineSpec) -> None:
    """An engine process: start, say where, then serve until told to stop."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    host = EngineHost(spec, node_ip="127.0.0.1")
    connection.send(host.start())
    host.set_membership(connection.recv())
    threading.Thread(target=_answer, args=(connection, host), daemon=True).start()
    with contextlib.suppress(Exception):  # a step that was told to fail; its clients know
        host.run()


def _answer(connection: Connection, host: EngineHost) -> None:
    while True:
        match connection.recv():
            case "state":
                answers: queue.SimpleQueue[Any] = queue.SimpleQueue()
                host.core.post(lambda answers=answers: answers.put(_state(host)))
                connection.send(answers.get())
            case ("membership", membership):
                host.set_membership(membership)
            case ("stop", drain_s):
                host.stop(drain_s)
                return


def _state(host: EngineHost) -> CoreState | str:
    core: Any = host.core
    try:
        core.check_invariants()
    except AssertionError as error:
        return f"invariants: {error}"
    counters, sessions = core.counters, core._sessions
    held = sum(len(session.handle_of) for session in sessions.all())
    peers = len(core._listener._zeromq._router_of) + len(core._listener._streams._by_session)
    return CoreState(len(sessions), held, counters.bad_frames, counters.stale_frames, counters.ended_sessions, peers)


class EngineProcess:
    """One rank."""

    def __init__(self, spec: EngineSpec) -> None:
        context = mp.get_context("spawn")
        self._connection, theirs = context.Pipe()
        self.process = context.Process(target=serve, args=(theirs, spec), daemon=True)
        self.process.start()
        theirs.close()
        self.member: Member

    def wait_until_up(self) -> None:
        assert self._connection.poll(START_LIMIT_S), "the engine did not start"
        self.member = self._connection.recv()

    def join_pool(self, membership: Membership) -> None:
        self._connection.send(membership)

    @property
    def pid(self) -> int:
        assert self.process.pid is not None
        return self.process.pid

    def state(self) -> CoreState:
        """Raises where the engine's own tables are wrong, or when it does not answer."""
        self._connection.send("state")
        assert self._connection.poll(ANSWER_LIMIT_S), "the step thread does not answer"
        state = self._connection.recv()
        assert isinstance(state, CoreState), state
        return state

    def signal(self, number: int) -> None:
        os.kill(self.pid, number)

    def stop(self, drain_s: float = 0.0) -> None:
        with contextlib.suppress(OSError):
            self._connection.send(("stop", drain_s))

    def end(self) -> None:
        """Whatever state it is in."""
        with contextlib.suppress(ProcessLookupError):
            self.signal(signal.SIGCONT)
        self.stop()
        self.process.join(5)
        if self.process.is_alive():
            self.process.kill()
            self.process.join(5)
        self._connection.close()


class Pool:
    """Some ranks, their membership, and how to reach them."""

    def __init__(self, engines: list[EngineProcess], access: PoolAccess, *, use_tcp: bool | None) -> None:
        self.engines = engines
        self.access = access
        self.use_tcp = use_tcp

    @property
    def name(self) -> str:
        return self.access.membership.pool

    @property
    def engine(self) -> EngineProcess:
        return self.engines[0]

    def client(
        self, *, limits: Limits | None = None, health: HealthConfig | None = None, timeouts: Timeouts | None = None
    ) -> EngineCoreClient:
        limits = limits or self.access.limits
        links = SocketLinks(self.access, limits, use_tcp=self.use_tcp)
        return EngineCoreClient(
            self.access, NoControlPlane(), links, limits=limits, health=health, timeouts=timeouts, tokenizer=ByteTokenizer()
        )


@contextlib.contextmanager
def echo_pool(
    ranks: int = 1,
    *,
    options: dict[str, Any] | None = None,
    limits: Limits | None = None,
    health: HealthConfig | None = None,
    over_tcp: bool = False,
    name: str | None = None,
    on_engine_death: str = "fail",
    allow_pickle: bool = False,
    engine: str = "echo",
) -> Iterator[Pool]:
    """A pool of engines that is gone afterwards, with nothing of it left on the machine."""
    pool = name or f"t{secrets.token_hex(4)}"
    server, client = (curve_keys(), curve_keys()) if over_tcp else (("", ""), ("", ""))
    limits, health, timeouts = limits or Limits(), health or HealthConfig(), Timeouts()
    engines: list[EngineProcess] = []
    try:
        for rank in range(ranks):
            spec = EngineSpec(
                pool=pool,
                rank=rank,
                incarnation=f"i{rank}",
                engine=engine,
                model=None,
                engine_options={**(ECHO if engine == "echo" else {}), **(options or {})},
                device="cpu",
                tcp="always" if over_tcp else "never",
                limits=limits,
                timeouts=timeouts,
                health=health,
                server_public_key=server[0],
                server_secret_key=server[1],
                client_public_key=client[0],
                allow_pickle=allow_pickle,
                debug_checks=True,
            )
            engines.append(EngineProcess(spec))
        for process in engines:
            process.wait_until_up()
        membership = Membership(pool, Epoch(1), Term(1), tuple(process.member for process in engines))
        for process in engines:
            process.join_pool(membership)
        access = PoolAccess(
            membership=membership,
            client_public_key=client[0],
            client_secret_key=client[1],
            engine="echo",
            on_engine_death=on_engine_death,
            allow_pickle=allow_pickle,
            limits=limits,
            timeouts=timeouts,
            health=health,
        )
        yield Pool(engines, access, use_tcp=True if over_tcp else None)
    finally:
        for process in engines:
            process.end()
        # what killed processes left, as `raycore cleanup` would
        endpoints.sweep(pool)
        tensors.sweep(pool)


@contextlib.asynccontextmanager
async def client_of(pool: Pool, **settings: Any) -> AsyncIterator[EngineCoreClient]:
    """A client whose tables are right when it leaves."""
    async with pool.client(**settings) as client:
        yield client
        client.check_invariants()


def identity(pool: Pool, rank: int = 0) -> EngineId:
    return pool.engines[rank].member.engine


async def stats(client: EngineCoreClient, rank: int = 0) -> dict[str, int]:
    """The echo engine's own counters."""
    return await client.call("collective_rpc", rank=rank, method="stats")


async def is_empty(client: EngineCoreClient, rank: int = 0) -> bool:
    """Whether the echo engine holds nothing."""
    now = await stats(client, rank)
    return not (now["running"] or now["waiting"] or now["kv_tokens_used"])


def expected(prompt: list[int], count: int) -> list[int]:
    """What the echo engine says."""
    return [prompt[i % len(prompt)] for i in range(count)]


def check_empty(pool: Pool) -> None:
    """No rank holds a request."""
    for engine in pool.engines:
        state = engine.state()
        if state.requests:
            pytest.fail(f"requests are left: {state}")
